"""How much memory the video VAE needs on the device, asked of the compiler; nothing is run, no weights are needed.

In: sizes, a dtype, tiles or whole frames. Out: `Need`. `generate` asks before it reads a weight; bench.py prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cosmos_jax.codecs.wan import network, vae
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.codecs.wan.params import abstract
from cosmos_jax.codecs.wan.tiling import Window, tiles
from cosmos_jax.precision import Precision
from pallas_kernels.platform import temporaries


@dataclass(frozen=True)
class Need:
    """One program, for every piece of a clip but the first."""

    temporary: int  # bytes of intermediate results
    cache: int  # bytes that one piece leaves to the next
    total: int  # bytes of everything the program touches, weights included
    work: float  # floating-point operations, over all tiles


def need(
    step: Callable, cfg: WanConfig, sides: tuple[int, int], channels: int, precision: Precision, *window: Window,
    chunk: int = 1,
) -> Need:  # fmt: skip
    """Compile `step` for inputs of these sides and channels, `chunk` latent frames per call."""
    frames = chunk * (cfg.temporal if step in (vae.encode_step, vae.encode_local) else 1)
    dtype = precision.dtype if step in (vae.encode_global, vae.decode_local) else jnp.float32  # features: as computed
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, precision.dtype), abstract(cfg))
    first, later = (jax.ShapeDtypeStruct((1, n, *sides, channels), dtype) for n in (1, frames))
    _, cache = jax.eval_shape(lambda p, x: vae.run_piece(step, p, cfg, x, None, precision, *window), params, first)
    compiled = vae.compiled_piece.lower(step, params, cfg, later, cache, precision, *window).compile()
    m = compiled.memory_analysis()
    own = m.output_size_in_bytes - m.alias_size_in_bytes
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    temporary = temporaries(m)
    total = temporary + m.argument_size_in_bytes + own
    return Need(temporary, kept, total, compiled.cost_analysis()["flops"])


def measure(
    cfg: WanConfig, what: str, latents: tuple[int, int], tile: int | None, precision: Precision, chunk: int = 1
) -> Need:
    """The most that encoding or decoding frames of so many latents needs: of several programs, the larger numbers."""
    height, width = latents
    video = (height * cfg.spatial, width * cfg.spatial)
    if tile is None and what == "encode":
        return need(vae.encode_step, cfg, video, 3, precision, chunk=chunk)
    if tile is None:
        return need(vae.decode_step, cfg, latents, cfg.z_dim, precision, chunk=chunk)
    if what == "encode":
        sights = network.encoder_sights(abstract(cfg)["encoder"])
        whole = need(vae.encode_global, cfg, latents, cfg.encoder_dims[-1], precision, chunk=chunk)
    else:
        sights = network.decoder_sights(abstract(cfg)["decoder"])
        whole = need(vae.decode_global, cfg, latents, cfg.z_dim, precision, chunk=chunk)
    parts = list(tiles(height, width, tile, sights))
    rows, cols = (side.stop - side.start for side in parts[0].source)
    if what == "encode":
        sides = (rows * cfg.patch_size, cols * cfg.patch_size)
        one = need(vae.encode_local, cfg, sides, 3, precision, parts[0].window, chunk=chunk)
    else:
        one = need(vae.decode_local, cfg, (rows, cols), cfg.decoder_dims[0], precision, parts[0].window, chunk=chunk)
    return Need(
        max(one.temporary, whole.temporary),
        max(one.cache, whole.cache),
        max(one.total, whole.total),
        len(parts) * one.work + whole.work,
    )
