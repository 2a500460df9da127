"""Video ↔ normalised latents with the Wan 2.2 VAE, whole clips or piece by piece.

In: video [B,1+4k,H,W,3], float in −1 … 1 or uint8 in 0 … 255 (taken as x/127.5 − 1); H and W multiples of 16.
Out: float32 latents [B,1+k,H/16,W/16,48] of about zero mean and unit variance, and back. Channels come last.

Everything is causal in time: latent i sees frames 0 … 4i, frames up to 4i see latents 0 … i. The unit of computation
is one latent frame: the first frame alone, then four frames at a time (as the reference), whatever is asked for. So
activations take the same memory for every length of clip, and neither the length nor the size of the pieces a clip is
fed in changes a bit of the result: the same shapes are computed in the same order. (Whole clips at once would be equal
only up to round-off, because XLA sums in another order when a shape changes; and on a GPU, bit-equality between
programs also needs its autotuner to choose alike.) Spec: model.md §9.2, reference_parity.md §2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.codecs.wan import layers as L
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.codecs.wan.network import decoder, encoder
from cosmos_jax.precision import Precision

FLOAT32 = Precision("float32")
OVERSHOOT = 1.1  # largest |pixel| accepted: bicubic resizing overshoots ±1 a little, 0 … 255 as float is a mistake


def statistics(cfg: WanConfig, dtype) -> tuple[np.ndarray, np.ndarray]:
    """mean and 1/std of the latents, each rounded to `dtype`, and 1/std taken of the rounded std (NUM-10).

    Latents were made, and Cosmos 3 trained, with statistics held in bfloat16: exact ones are 2.5e-3 off.
    """
    mean, std = (np.asarray(x, np.float32).astype(dtype) for x in (cfg.latents_mean, cfg.latents_std))
    return mean, (1 / std.astype(np.float32)).astype(dtype)


def _round(x: jax.Array, dtype) -> jax.Array:
    """Round float32 to the precision of `dtype`. A cast and back may be optimised away by XLA; this is not."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def normalise(z: jax.Array, cfg: WanConfig, dtype) -> jax.Array:
    """(z − mean) · (1/std) over the last axis, every step rounded to `dtype` → float32."""
    mean, inverse = (jnp.asarray(s, jnp.float32) for s in statistics(cfg, dtype))
    return _round(_round(z.astype(jnp.float32) - mean, dtype) * inverse, dtype)


def denormalise(z: jax.Array, cfg: WanConfig, dtype) -> jax.Array:
    """z / (1/std) + mean over the last axis, every step rounded to `dtype` → `dtype`."""
    mean, inverse = (jnp.asarray(s, jnp.float32) for s in statistics(cfg, dtype))
    return _round(_round(_round(z.astype(jnp.float32), dtype) / inverse, dtype) + mean, dtype).astype(dtype)


def encode_step(
    params: dict, cfg: WanConfig, video: jax.Array, cache: dict | None, precision: Precision, tile: int | None = None
) -> tuple[jax.Array, dict]:
    """All frames given, at once. `video`: 1+4k frames without a cache, 4k frames with that of the step before."""
    if video.dtype == jnp.uint8:
        video = video.astype(jnp.float32) / 127.5 - 1
    x = L.patchify(video.astype(precision.dtype), cfg.patch_size)
    moments, cache = encoder(params["encoder"], x, cache, precision, tile)
    mean = L.conv(params["quant"], moments, precision)[..., : cfg.z_dim]  # the rest: log-variance, never sampled
    return normalise(mean, cfg, precision.dtype), cache


def decode_step(
    params: dict, cfg: WanConfig, latents: jax.Array, cache: dict | None, precision: Precision, tile: int | None = None
) -> tuple[jax.Array, dict]:
    """All latents given, at once: n of them → 1+4(n−1) frames without a cache, 4n with that of the step before."""
    x = L.conv(params["post_quant"], denormalise(latents, cfg, precision.dtype), precision)
    patches, cache = decoder(params["decoder"], x, cache, precision, tile)
    return L.unpatchify(patches, cfg.patch_size).astype(jnp.float32).clip(-1, 1), cache


def _one_by_one(step: Callable, x: jax.Array, size: int, cache: dict | None) -> tuple[jax.Array, dict]:
    """x [B,T,…] through `step(cache, piece) -> (cache, y)`: one frame where the clip starts, then `size` at a time."""
    out = []
    if cache is None:
        cache, y = step(None, x[:, :1])
        out, x = [y], x[:, 1:]
    if x.shape[1]:
        b, t, *rest = x.shape
        cache, y = jax.lax.scan(step, cache, x.reshape(b, t // size, size, *rest).swapaxes(0, 1))
        out.append(y.swapaxes(0, 1).reshape(b, -1, *y.shape[3:]))
    return jnp.concatenate(out, 1), cache


def encode_chunk(
    params: dict,
    cfg: WanConfig,
    video: jax.Array,
    cache: dict | None = None,
    precision: Precision = FLOAT32,
    tile: int | None = None,
) -> tuple[jax.Array, dict]:
    """One piece of a clip → its latents, float32 [B,c,h,w,z], and the cache for the next piece.

    `video`: 1+4(c−1) frames without a cache, 4c frames with the cache of the piece before. Nothing is checked here.
    """

    def step(cache, frames):
        return encode_step(params, cfg, frames, cache, precision, tile)[::-1]

    return _one_by_one(step, video, cfg.temporal, cache)


def decode_chunk(
    params: dict,
    cfg: WanConfig,
    latents: jax.Array,
    cache: dict | None = None,
    precision: Precision = FLOAT32,
    tile: int | None = None,
) -> tuple[jax.Array, dict]:
    """One piece [B,c,h,w,z] → float32 frames in −1 … 1, and the cache for the next piece.

    1+4(c−1) frames without a cache, 4c frames with the cache of the piece before. Nothing is checked here.
    """

    def step(cache, latent):
        return decode_step(params, cfg, latent, cache, precision, tile)[::-1]

    return _one_by_one(step, latents, 1, cache)


# The cache (3.3 GB for decoding 720p in bfloat16) is given up to its successor instead of being held twice.
_HOW: dict = dict(static_argnames=("cfg", "precision", "tile"), donate_argnames=("cache",))
_encode_piece = jax.jit(encode_chunk, **_HOW)
_decode_piece = jax.jit(decode_chunk, **_HOW)


def encode_pieces(
    params: dict,
    cfg: WanConfig,
    video,
    precision: Precision = FLOAT32,
    chunk: int | None = None,
    tile: int | None = None,
) -> Iterator[jax.Array]:
    """Latents, `chunk` latent frames per call of the device (None: one call). `video` may stay on the host."""
    check_video(cfg, video)
    check_tile(tile)
    k, cache = cfg.temporal, None
    for start, stop in _pieces(1 + (video.shape[1] - 1) // k, chunk):
        piece = video[:, max(1 + k * (start - 1), 0) : 1 + k * (stop - 1)]
        latents, cache = _encode_piece(params, cfg, piece, cache, precision, tile)
        yield latents


def decode_pieces(
    params: dict,
    cfg: WanConfig,
    latents,
    precision: Precision = FLOAT32,
    chunk: int | None = None,
    tile: int | None = None,
) -> Iterator[jax.Array]:
    """Frames, `chunk` latent frames per call of the device (None: one call). `latents` may stay on the host."""
    check_latents(cfg, latents)
    check_tile(tile)
    cache = None
    for start, stop in _pieces(latents.shape[1], chunk):
        video, cache = _decode_piece(params, cfg, latents[:, start:stop], cache, precision, tile)
        yield video


def encode(
    params: dict,
    cfg: WanConfig,
    video,
    precision: Precision = FLOAT32,
    chunk: int | None = None,
    tile: int | None = None,
) -> jax.Array:
    """Video [B,1+4k,H,W,3], float in −1 … 1 or uint8 → normalised latents, float32 [B,1+k,H/16,W/16,z].

    Deterministic: the posterior's mean, never a sample. `chunk`: latent frames per call of the device (None: one call
    for the clip); it bounds how much of the video is on the device and changes no bit. Each distinct length of a piece
    is compiled once. `tile`: every stage works on windows of so many of its own pixels per side, plus what it sees around
    them (tiling.py); None: on whole frames. It saves memory, costs the time of the overlaps, and is exact up to round-off.
    `precision`: float32 unless given; the published models were trained on bfloat16 latents. ValueError for a wrong
    shape, dtype, range or argument.
    """
    return jnp.concatenate(list(encode_pieces(params, cfg, video, precision, chunk, tile)), 1)


def decode(
    params: dict,
    cfg: WanConfig,
    latents,
    precision: Precision = FLOAT32,
    chunk: int | None = None,
    tile: int | None = None,
) -> jax.Array:
    """Normalised latents [B,1+k,h,w,z] → video, float32 [B,1+4k,16h,16w,3] clipped to −1 … 1.

    `precision`, `chunk`, `tile` as in `encode`. ValueError for a wrong shape, a dtype that is not floating, or a value
    that is not finite.
    """
    return jnp.concatenate(list(decode_pieces(params, cfg, latents, precision, chunk, tile)), 1)


def _pieces(latents: int, chunk: int | None) -> list[tuple[int, int]]:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} latent frames at a time is not possible; give at least 1, or None for all.")
    step = chunk or latents
    return [(i, min(i + step, latents)) for i in range(0, latents, step)]


def check_tile(tile: int | None) -> None:
    """ValueError with one sentence unless `tile` is None or a positive even number."""
    if tile is not None and (not isinstance(tile, int) or tile < 2 or tile % 2):
        raise ValueError(f"tile={tile!r} pixels per window is not possible; give an even number, such as 128, or None.")


def check_video(cfg: WanConfig, video) -> None:
    """ValueError with one sentence unless `encode` can take this video."""
    if video.ndim != 5 or video.shape[-1] != 3:
        raise ValueError(f"video has shape {video.shape}, but the VAE takes RGB, [batch,frames,height,width,3].")
    if min(video.shape) < 1:
        raise ValueError(f"video has shape {video.shape}, which is empty; there is nothing to encode.")
    _, frames, height, width, _ = video.shape
    k, s = cfg.temporal, cfg.spatial
    if (frames - 1) % k:
        keep = frames - (frames - 1) % k
        raise ValueError(
            f"video has {frames} frames, but the causal VAE takes 1+{k}n; cut it to {keep} or repeat the last frame "
            f"up to {keep + k}."
        )
    if height % s or width % s:
        raise ValueError(
            f"video is {height}×{width} pixels, but both sides must be multiples of {s}; resize or pad it."
        )
    if video.dtype == np.uint8:
        return
    if not jnp.issubdtype(video.dtype, jnp.floating):
        raise ValueError(f"video is {video.dtype}; give uint8 in 0 … 255 or floating point in −1 … 1.")
    if not isinstance(video, jax.core.Tracer):
        low, high = float(video.min()), float(video.max())
        if not (low >= -OVERSHOOT and high <= OVERSHOOT):
            raise ValueError(f"video has values from {low:g} to {high:g}; floating-point video must lie in −1 … 1.")


def check_latents(cfg: WanConfig, latents) -> None:
    """ValueError with one sentence unless `decode` can take these latents."""
    if latents.ndim != 5 or latents.shape[-1] != cfg.z_dim:
        raise ValueError(
            f"latents have shape {latents.shape}, but the VAE takes [batch,frames,height,width,{cfg.z_dim}], channels "
            "last; move the axis, or use the VAE that made them."
        )
    if min(latents.shape) < 1:
        raise ValueError(f"latents have shape {latents.shape}, which is empty; there is nothing to decode.")
    if not jnp.issubdtype(latents.dtype, jnp.floating):
        raise ValueError(f"latents are {latents.dtype}; the VAE takes floating point.")
    if not isinstance(latents, jax.core.Tracer) and not bool(jnp.isfinite(latents).all()):
        raise ValueError("latents have values that are not finite; the sampler or the file that made them is at fault.")
