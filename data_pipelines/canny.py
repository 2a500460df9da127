"""Edges (Canny 1986) in OpenCV's arithmetic: 3×3 Sobel, |dx| + |dy|, the strongest of three colours.

In: uint8 [H,W,3]. Out: uint8 [H,W], 255 on edges. Equal to `cv2.Canny(picture, low, high)` of OpenCV 4.12 and 5.0 in
every pixel of photographs and noise (tests/data/test_transfer.py keeps what it gave); it makes the `edge` control.
"""

from __future__ import annotations

import numpy as np

TAN_22 = round(np.tan(np.pi / 8) * 2**15)  # fixed point, 15 bits; tan 67.5° = tan 22.5° + 2


def canny(picture: np.ndarray, low: int, high: int) -> np.ndarray:
    """Ridges of the gradient above `low` that touch one above `high`."""
    dx, dy = _sobel(picture)
    size = np.abs(dx) + np.abs(dy)
    best = size.argmax(-1)[..., None]  # the first of equals
    dx, dy, size = (np.take_along_axis(x, best, -1)[..., 0] for x in (dx, dy, size))
    ridge = (size > low) & _peaks(dx, dy, size)
    return _grow(ridge & (size > high), ridge).astype(np.uint8) * 255


def _sobel(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives to the right and downwards, int32, with the edge repeated."""
    x = np.pad(picture.astype(np.int32), ((1, 1), (1, 1), (0, 0)), "edge")
    down, right = x[:-2] + 2 * x[1:-1] + x[2:], x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return down[:, 2:] - down[:, :-2], right[2:] - right[:-2]


def _peaks(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where the gradient is larger than its two neighbours along its direction: of eight, in sectors of 45°."""
    h, w = size.shape
    padded = np.pad(size, 1)

    def at(row: int, col: int) -> np.ndarray:
        return padded[1 + row : 1 + row + h, 1 + col : 1 + col + w]

    flat = np.abs(dx).astype(np.int64) * TAN_22
    steep = flat + (np.abs(dx).astype(np.int64) << 16)
    slope = np.abs(dy).astype(np.int64) << 15
    falling = (dx ^ dy) < 0
    above, below = np.where(falling, at(-1, 1), at(-1, -1)), np.where(falling, at(1, -1), at(1, 1))
    diagonal = (size > above) & (size > below)
    upright = np.where(slope > steep, (size > at(-1, 0)) & (size >= at(1, 0)), diagonal)
    return np.where(slope < flat, (size > at(0, -1)) & (size >= at(0, 1)), upright)


def _grow(seeds: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The seeds and every allowed pixel that touches them, directly or through others (8 neighbours)."""
    found = np.pad(seeds, 1)
    allowed = np.pad(allowed, 1).ravel()
    step = found.shape[1]
    around = np.array([-step - 1, -step, -step + 1, -1, 1, step - 1, step, step + 1])
    flat = found.ravel()
    front = np.flatnonzero(flat)
    while len(front):
        near = (front[:, None] + around).ravel()
        front = np.unique(near[allowed[near] & ~flat[near]])
        flat[front] = True
    return found[1:-1, 1:-1]
