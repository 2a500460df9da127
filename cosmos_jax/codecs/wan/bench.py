"""What the video VAE needs on the device, whole frames against tiles: `python -m cosmos_jax.codecs.wan.bench`.

In: a size of video, tiles, a dtype. Out: a table. Programs are compiled for this machine and asked for their memory;
nothing is run and no weights are needed. On another device the same command gives that device's numbers.
"""

from __future__ import annotations

import argparse

import jax

from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.codecs.wan.memory import measure
from cosmos_jax.precision import Precision

GIB = 2**30


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
