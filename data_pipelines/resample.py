"""Resizing of pictures with torch's antialiased `interpolate`, in numpy: 8-bit integer and float32 arithmetic.

In: pictures of uint8 or float32. Out: the same of the wanted size. The reference processors of Qwen3-VL and
Cosmos 3 Edge resize 8-bit pictures with that operator (through torchvision), so a picture must go through the same
roundings; Pillow's bicubic keeps finer weights and differs by a grey level here and there (docs/reasoner.md). What
conditions a generation is resized in float32 and rounded once, if at all (conditioning.py); torch computes those
weights in float32 too, and so do we.
"""

from __future__ import annotations

import functools

import numpy as np

A = -0.5  # of the Keys kernel, where the kernel is stretched against aliasing


def bicubic(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [..., H, W, C] → uint8 [..., height, width, C]: columns first, then rows, rounded to 8 bits in between."""
    x = _along(frames, frames.ndim - 2, width)
    return _along(x, frames.ndim - 3, height)


def smooth(frame: np.ndarray, height: int, width: int, kernel: str) -> np.ndarray:
    """float32 [H,W,C] → float32 [height,width,C]: columns first, then rows. Bicubic may overshoot.

    kernel: "bilinear" or "bicubic". A side that has its size already is left alone. One frame at a time, which is four
    times faster than a clip at once (the cache).
    """
    for axis, size in ((1, width), (0, height)):
        if frame.shape[axis] != size:
            frame = _fused(frame, axis, *_weights(frame.shape[axis], size, kernel, np.float32))
    return frame


def _fused(x: np.ndarray, axis: int, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ weight · pixel, each product added with one rounding, as the fused multiply-add that torch is compiled to."""
    shape = (taps.shape[1], *[1] * (x.ndim - 1 - axis))
    total = np.take(x, taps[0], axis) * weights[0].reshape(shape)
    for index, weight in zip(taps[1:], weights[1:].astype(np.float64), strict=True):
        product = np.take(x, index, axis) * weight.reshape(shape)  # exact in float64
        product += total
        total = product.astype(np.float32)
    return total


def _along(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    if x.shape[axis] == size:
        return x
    taps, weights, bits = _fixed_point(x.shape[axis], size)
    x = np.moveaxis(x, axis, 0)
    total = np.full((size, *x.shape[1:]), 1 << (bits - 1), np.int32)  # half a grey level: rounds the shift below
    for index, weight in zip(taps, weights, strict=True):
        total += x[index] * weight.reshape(-1, *[1] * (x.ndim - 1))
    return np.moveaxis(np.clip(total >> bits, 0, 255).astype(np.uint8), 0, axis)


@functools.lru_cache(maxsize=64)
def _fixed_point(old: int, new: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The bicubic weights as integers: (index [k, new], weight [k, new] int32, fractional bits)."""
    taps, w = _weights(old, new, "bicubic", np.float64)
    bits = 0  # as many as a 16-bit weight can hold
    while bits < 22 and int(0.5 + w.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return taps, np.trunc(w * (1 << bits) + np.copysign(0.5, w)).astype(np.int32), bits


@functools.lru_cache(maxsize=64)
def _weights(old: int, new: int, kernel: str, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Which `old` pixels make each of the `new` ones: (index [k, new], weight [k, new] of dtype), summing to 1."""
    radius, shape = KERNELS[kernel]
    scale = dtype(old) / dtype(new)
    stretch = max(scale, dtype(1))  # shrinking widens the kernel
    centre = scale * (np.arange(new, dtype=dtype) + dtype(0.5))
    first = np.maximum((centre - radius * stretch + dtype(0.5)).astype(np.int64), 0)
    end = np.minimum((centre + radius * stretch + dtype(0.5)).astype(np.int64), old)
    k = np.arange(int((end - first).max()))[:, None]
    at = np.abs(((k + first).astype(dtype) - centre + dtype(0.5)) * (dtype(1) / stretch))
    w = np.where(k < end - first, shape(at), dtype(0))
    return np.minimum(first + k, old - 1), w / w.sum(0)


def _triangle(x: np.ndarray) -> np.ndarray:
    """Linear interpolation at distances x ≥ 0."""
    return np.maximum(1 - x, 0)


def _keys(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) at distances x ≥ 0."""
    near = ((A + 2) * x - (A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * A - 4 * A
    return np.where(x < 1, near, np.where(x < 2, far, 0))


KERNELS = {"bilinear": (1, _triangle), "bicubic": (2, _keys)}  # support in pixels of the coarser grid, shape
