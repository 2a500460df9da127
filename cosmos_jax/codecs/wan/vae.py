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

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.codecs.wan import layers as L
from cosmos_jax.codecs.wan import network
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.codecs.wan.tiling import Window, tiles
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


def encode_local(
    params: dict,
    cfg: WanConfig,
    video: jax.Array,
    cache: dict | None,
    precision: Precision,
    window: Window | None = None,
) -> tuple[jax.Array, dict]:
    """Video → features at the size of the latents, as far as convolutions go; of a whole frame, or of one `window`."""
    if video.dtype == jnp.uint8:
        video = video.astype(jnp.float32) / 127.5 - 1
    x = L.patchify(video.astype(precision.dtype), cfg.patch_size)
    return network.chain(network.encoder_halves(params["encoder"])[0], x, cache, precision, window)


def encode_global(
    params: dict, cfg: WanConfig, features: jax.Array, cache: dict | None, precision: Precision
) -> tuple[jax.Array, dict]:
    """The features of whole frames → latents."""
    moments, cache = network.chain(network.encoder_halves(params["encoder"])[1], features, cache, precision)
    mean = L.conv(params["quant"], moments, precision)[..., : cfg.z_dim]  # the rest: log-variance, never sampled
    return normalise(mean, cfg, precision.dtype), cache


def encode_step(
    params: dict, cfg: WanConfig, video: jax.Array, cache: dict | None, precision: Precision
) -> tuple[jax.Array, dict]:
    """All frames given, at once. `video`: 1+4k frames without a cache, 4k frames with that of the step before."""
    features, first = encode_local(params, cfg, video, cache, precision)
    latents, second = encode_global(params, cfg, features, cache, precision)
    return latents, first | second


def decode_global(
    params: dict, cfg: WanConfig, latents: jax.Array, cache: dict | None, precision: Precision
) -> tuple[jax.Array, dict]:
    """The latents of whole frames → features of the same size, after the last attention."""
    x = L.conv(params["post_quant"], denormalise(latents, cfg, precision.dtype), precision)
    return network.chain(network.decoder_halves(params["decoder"])[0], x, cache, precision)


def decode_local(
    params: dict,
    cfg: WanConfig,
    features: jax.Array,
    cache: dict | None,
    precision: Precision,
    window: Window | None = None,
) -> tuple[jax.Array, dict]:
    """Features → frames; of a whole frame, or of one `window`."""
    stages = network.decoder_halves(params["decoder"])[1]
    patches, cache = network.chain(stages, features, cache, precision, window)
    return L.unpatchify(patches, cfg.patch_size).astype(jnp.float32).clip(-1, 1), cache


def decode_step(
    params: dict, cfg: WanConfig, latents: jax.Array, cache: dict | None, precision: Precision
) -> tuple[jax.Array, dict]:
    """All latents given, at once: n of them → 1+4(n−1) frames without a cache, 4n with that of the step before."""
    features, first = decode_global(params, cfg, latents, cache, precision)
    video, second = decode_local(params, cfg, features, cache, precision)
    return video, first | second


def _in_turn(step: Callable, x: jax.Array, size: int, cache: dict | None) -> tuple[jax.Array, dict]:
    """x [B,T,…] through `step(cache, piece) -> (cache, y)`: one frame where the clip starts, then `size` at a time.

    What does not fill the last `size` frames goes through together.
    """
    out = []
    if cache is None:
        cache, y = step(None, x[:, :1])
        out, x = [y], x[:, 1:]
    b, t, *rest = x.shape
    whole = t - t % size
    if whole:
        cache, y = jax.lax.scan(step, cache, x[:, :whole].reshape(b, t // size, size, *rest).swapaxes(0, 1))
        out.append(y.swapaxes(0, 1).reshape(b, -1, *y.shape[3:]))
    if t % size:
        cache, y = step(cache, x[:, whole:])
        out.append(y)
    return jnp.concatenate(out, 1), cache


def run_piece(
    step: Callable,
    params: dict,
    cfg: WanConfig,
    x: jax.Array,
    cache: dict | None,
    precision: Precision,
    *window: Window,
    together: int = 1,
) -> tuple[jax.Array, dict]:
    """One piece of a clip through one of the steps above → what it makes, and the cache for the next piece.

    Pieces of video: 1+4(c−1) frames without a cache, 4c frames with the cache of the piece before; of anything else: c
    latent frames. `together`: latent frames that go through the network side by side. Nothing is checked here.
    """

    def one(cache, frames):
        return step(params, cfg, frames, cache, precision, *window)[::-1]

    return _in_turn(one, x, together * (cfg.temporal if step in (encode_step, encode_local) else 1), cache)


# The cache (3.3 GB for decoding 720p in bfloat16) is given up to its successor instead of being held twice.
compiled_piece = jax.jit(
    run_piece, static_argnames=("step", "cfg", "precision", "together"), donate_argnames=("cache",)
)


def encode_pieces(
    params: dict,
    cfg: WanConfig,
    video,
    precision: Precision = FLOAT32,
    chunk: int | None = None,
    tile: int | None = None,
    together: int = 1,
) -> Iterator[jax.Array]:
    """Latents, `chunk` latent frames per call of the device (None: one call). `video` may stay on the host.

    With `tile`, the first piece appears when every tile has been through half of the encoder.
    """
    check_video(cfg, video)
    check_tile(tile)
    spans = _pieces(1 + (video.shape[1] - 1) // cfg.temporal, chunk)
    if tile is None:
        source = (video[:, f] for f in _frames(cfg, spans))
        yield from _run(encode_step, params, cfg, source, precision, together=together)
    else:
        yield from _run(encode_global, params, cfg, _features(params, cfg, video, precision, spans, tile), precision)


def _features(params: dict, cfg: WanConfig, video, precision: Precision, spans: list, tile: int) -> list[np.ndarray]:
    """The first half of the encoder, tile after tile: each a clip of its own, with a cache of its own."""
    b, _, height, width, _ = video.shape
    h, w, channels = height // cfg.spatial, width // cfg.spatial, cfg.encoder_dims[-1]
    out = [np.empty((b, stop - start, h, w, channels), precision.dtype) for start, stop in spans]
    for part in tiles(h, w, tile, network.encoder_sights(params["encoder"])):
        rows, cols = (_times(side, cfg.patch_size) for side in part.source)
        pieces = (video[:, frames, rows, cols] for frames in _frames(cfg, spans))
        made = _run(encode_local, params, cfg, pieces, precision, part.window)
        for whole, y in zip(out, made, strict=True):
            whole[:, :, *part.target] = y
    return out


def decode_pieces(
    params: dict,
    cfg: WanConfig,
    latents,
    precision: Precision = FLOAT32,
    chunk: int | None = None,
    tile: int | None = None,
    together: int = 1,
) -> Iterator[jax.Array | np.ndarray]:
    """Frames, `chunk` latent frames per call of the device (None: one call). `latents` may stay on the host.

    With `tile`, tiles are outside and time inside: the frames (numpy) appear when all are done.
    """
    check_latents(cfg, latents)
    check_tile(tile)
    spans = _pieces(latents.shape[1], chunk)
    source = (latents[:, start:stop] for start, stop in spans)
    if tile is None:
        yield from _run(decode_step, params, cfg, source, precision, together=together)
    else:
        features = list(map(np.asarray, _run(decode_global, params, cfg, source, precision)))
        yield from _video(params, cfg, features, precision, spans, tile)


def _run(
    step: Callable, params: dict, cfg: WanConfig, pieces: Iterable, precision: Precision, *window: Window,
    together: int = 1,
) -> Iterator[jax.Array]:  # fmt: skip
    """One clip, piece after piece; of whole frames, or of one `window`."""
    cache = None
    for x in pieces:
        y, cache = compiled_piece(step, params, cfg, x, cache, precision, *window, together=together)
        yield y


def _video(
    params: dict, cfg: WanConfig, features: list[np.ndarray], precision: Precision, spans: list, tile: int
) -> list[np.ndarray]:
    """The second half of the decoder, tile after tile: each a clip of its own, with a cache of its own."""
    b, _, h, w, _ = features[0].shape
    s = cfg.spatial
    out = [np.empty((b, f.stop - f.start, s * h, s * w, 3), np.float32) for f in _frames(cfg, spans)]
    for part in tiles(h, w, tile, network.decoder_sights(params["decoder"])):
        rows, cols = (_times(side, cfg.patch_size) for side in part.target)
        pieces = (x[:, :, *part.source] for x in features)
        made = _run(decode_local, params, cfg, pieces, precision, part.window)
        for whole, y in zip(out, made, strict=True):
            whole[:, :, rows, cols] = y
    return out


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
    is compiled once. `precision`: float32 unless given; the published models were trained on bfloat16 latents.
    `tile`: latents per side that the convolutions work on at a time, for a device with little memory; what is between
    them and the attention then waits on the host. Equal to whole frames (None) up to round-off, and slower, because
    tiles overlap (tiling.py). Not under `jit`. ValueError for a wrong shape, dtype, range or argument.
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


def _frames(cfg: WanConfig, spans: list) -> list[slice]:
    """The frames of each span of latents."""
    k = cfg.temporal
    return [slice(max(1 + k * (start - 1), 0), 1 + k * (stop - 1)) for start, stop in spans]


def _times(s: slice, factor: int) -> slice:
    return slice(s.start * factor, s.stop * factor)


def _pieces(latents: int, chunk: int | None) -> list[tuple[int, int]]:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} latent frames at a time is not possible; give at least 1, or None for all.")
    step = chunk or latents
    return [(i, min(i + step, latents)) for i in range(0, latents, step)]


def check_tile(tile: int | None) -> None:
    """ValueError with one sentence unless `tile` is None or a positive integer."""
    if tile is not None and (not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile={tile!r} latents per side is not possible; give at least 1, or None for whole frames.")


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
