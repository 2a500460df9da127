"""What the video VAE needs on the device, whole frames against tiles: `python -m cosmos_jax.codecs.wan.bench`.

In: a size of video, tiles, a dtype. Out: a table. Programs are compiled for this machine and asked for their memory;
nothing is run and no weights are needed. On another device the same command gives that device's numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cosmos_jax.codecs.wan import network, vae
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.codecs.wan.params import abstract
from cosmos_jax.codecs.wan.tiling import Window, tiles
from cosmos_jax.precision import Precision

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """One program, for every latent frame but the first."""

    temporary: int  # bytes of intermediate results
    cache: int  # bytes that one latent frame leaves to the next
    total: int  # bytes of everything the program touches, weights included
    work: float  # floating-point operations, over all tiles


def need(
    step: Callable, cfg: WanConfig, sides: tuple[int, int], channels: int, precision: Precision, *window: Window
) -> Need:
    """Compile `step` for inputs of these sides and channels."""
    frames = cfg.temporal if step in (vae.encode_step, vae.encode_local) else 1
    dtype = precision.dtype if step in (vae.encode_global, vae.decode_local) else jnp.float32  # features: as computed
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, precision.dtype), abstract(cfg))
    first, later = (jax.ShapeDtypeStruct((1, n, *sides, channels), dtype) for n in (1, frames))
    _, cache = jax.eval_shape(lambda p, x: vae.run_piece(step, p, cfg, x, None, precision, *window), params, first)
    compiled = vae.compiled_piece.lower(step, params, cfg, later, cache, precision, *window).compile()
    m = compiled.memory_analysis()
    own = m.output_size_in_bytes - m.alias_size_in_bytes
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    total = m.temp_size_in_bytes + m.argument_size_in_bytes + own
    return Need(m.temp_size_in_bytes, kept, total, compiled.cost_analysis()["flops"])


def measure(cfg: WanConfig, what: str, latents: tuple[int, int], tile: int | None, precision: Precision) -> Need:
    """The most that encoding or decoding frames of so many latents needs: of several programs, the larger numbers."""
    height, width = latents
    video = (height * cfg.spatial, width * cfg.spatial)
    if tile is None and what == "encode":
        return need(vae.encode_step, cfg, video, 3, precision)
    if tile is None:
        return need(vae.decode_step, cfg, latents, cfg.z_dim, precision)
    if what == "encode":
        sights = network.encoder_sights(abstract(cfg)["encoder"])
        whole = need(vae.encode_global, cfg, latents, cfg.encoder_dims[-1], precision)
    else:
        sights = network.decoder_sights(abstract(cfg)["decoder"])
        whole = need(vae.decode_global, cfg, latents, cfg.z_dim, precision)
    parts = list(tiles(height, width, tile, sights))
    rows, cols = (side.stop - side.start for side in parts[0].source)
    if what == "encode":
        sides = (rows * cfg.patch_size, cols * cfg.patch_size)
        one = need(vae.encode_local, cfg, sides, 3, precision, parts[0].window)
    else:
        one = need(vae.decode_local, cfg, (rows, cols), cfg.decoder_dims[0], precision, parts[0].window)
    return Need(
        max(one.temporary, whole.temporary),
        max(one.cache, whole.cache),
        max(one.total, whole.total),
        len(parts) * one.work + whole.work,
    )


def main(argv: list[str] | None = None, cfg: WanConfig | None = None) -> None:
    parser = argparse.ArgumentParser("python -m cosmos_jax.codecs.wan.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--height", type=int, default=480, help="pixels, a multiple of 16")
    parser.add_argument("--width", type=int, default=832, help="pixels, a multiple of 16")
    parser.add_argument("--tile", type=int, nargs="+", default=[8, 16, 24], help="latents per side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(argv)
    cfg = cfg or WanConfig()
    if (
        min(options.height, options.width, *options.tile) < 1
        or options.height % cfg.spatial
        or options.width % cfg.spatial
    ):
        parser.error(f"height and width must be multiples of {cfg.spatial}, tiles at least 1.")
    latents = (options.height // cfg.spatial, options.width // cfg.spatial)
    precision = Precision(options.dtype)
    size, device = f"{options.height}×{options.width}", jax.default_backend()
    print(f"{size}, {options.dtype}, {device}; GiB for one latent frame at a time")
    print("          tile  temporary  (less)  cache  total with weights  (less)  work")
    for what in ("encode", "decode"):
        whole = measure(cfg, what, latents, None, precision)
        for tile in (None, *options.tile):
            n = whole if tile is None else measure(cfg, what, latents, tile, precision)
            temporary = f"{n.temporary / GIB:9.2f}  {whole.temporary / n.temporary:5.1f}×"
            total = f"{n.total / GIB:18.2f}  {whole.total / n.total:5.1f}×"
            print(
                f"{what}  {tile or 'none':>6}  {temporary}  {n.cache / GIB:5.2f}  {total}  {n.work / whole.work:.1f}×"
            )


if __name__ == "__main__":
    main()
