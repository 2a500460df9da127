"""Bicubic resizing of 8-bit pictures: the integer arithmetic of torch's antialiased `interpolate`, in numpy.

In: uint8 [..., H, W, C]. Out: uint8 of the wanted size. The reference processors of Qwen3-VL and Cosmos 3 Edge resize
with that operator (through torchvision), so a picture must go through the same roundings; Pillow's bicubic keeps finer
weights and differs by a grey level here and there (docs/reasoner.md).
"""

from __future__ import annotations

import functools

import numpy as np

A = -0.5  # of the Keys kernel, where the kernel is stretched against aliasing
RADIUS = 2  # the kernel's support, in pixels of the coarser grid


def bicubic(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [..., H, W, C] → uint8 [..., height, width, C]: columns first, then rows, rounded to 8 bits in between."""
    x = _along(frames, frames.ndim - 2, width)
    return _along(x, frames.ndim - 3, height)


def _along(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    if x.shape[axis] == size:
        return x
    taps, weights, bits = _taps(x.shape[axis], size)
    x = np.moveaxis(x, axis, 0)
    total = np.full((size, *x.shape[1:]), 1 << (bits - 1), np.int32)  # half a grey level: rounds the shift below
    for index, weight in zip(taps, weights, strict=True):
        total += x[index] * weight.reshape(-1, *[1] * (x.ndim - 1))
    return np.moveaxis(np.clip(total >> bits, 0, 255).astype(np.uint8), 0, axis)


@functools.lru_cache(maxsize=64)
def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Which `old` pixels make each of the `new` ones: (index [k, new], weight [k, new] int32, fractional bits)."""
    scale = old / new
    stretch = max(scale, 1.0)  # shrinking widens the kernel
    centre = scale * (np.arange(new) + 0.5)
    first = np.maximum((centre - RADIUS * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + RADIUS * stretch + 0.5).astype(np.int64), old)
    k = np.arange(int((end - first).max()))[:, None]
    w = np.where(k < end - first, _keys(np.abs((k + first - centre + 0.5) / stretch)), 0.0)
    w /= w.sum(0)
    bits = 0  # as many as a 16-bit weight can hold
    while bits < 22 and int(0.5 + w.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    fixed = np.trunc(w * (1 << bits) + np.copysign(0.5, w)).astype(np.int32)
    return np.minimum(first + k, old - 1), fixed, bits


def _keys(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) at distances x ≥ 0."""
    near = ((A + 2) * x - (A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * A - 4 * A
    return np.where(x < 1, near, np.where(x < RADIUS, far, 0.0))
