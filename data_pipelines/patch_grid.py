"""Where the patches of pictures lie: all that the vision encoder needs and that follows from their grids alone.

In: grids (frames, rows, columns) in patches. Out: for each patch, in 2×2 merge-block order, its frame, row and column,
and the mixture of the learned position table that it gets. Spec model.md §3.1 (Qwen3-VL), §3.3 (SigLIP2 of Edge).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.schema import SequenceSpec

MERGE = 2  # patches per side of one und token
F32 = np.float32


class Places(NamedTuple):
    """The `vit_*` fields of P patches but for the pixels. K and W as in schema.py."""

    frame_ids: np.ndarray  # [P] int32: patches attend within one frame (one group of frames that share patches)
    rowcol: np.ndarray  # [P, 2] int32
    interp_index: np.ndarray  # [P, K] int32
    interp_weight: np.ndarray  # [P, W] float32


def places(grids: Sequence[tuple[int, int, int]], spec: SequenceSpec) -> Places:
    """Patches of several pictures or clips, one after the other; frames are numbered through them all."""
    parts, frames = [], 0
    for t, rows, cols in grids:
        rowcol = merge_order(np.moveaxis(np.indices((rows, cols)), 0, -1)).astype(np.int32)
        index, weight = interpolation(rows, cols, spec)
        ids = np.repeat(np.arange(frames, frames + t, dtype=np.int32), rows * cols)
        parts.append(Places(ids, *(np.tile(x, (t, 1)) for x in (rowcol, index, weight))))
        frames += t
    return Places(*map(np.concatenate, zip(*parts, strict=True)))


def merge_order(x: np.ndarray) -> np.ndarray:
    """[rows, cols, …] in raster order → [rows·cols, …] in 2×2 block order."""
    h, w = x.shape[:2]
    x = x.reshape(h // MERGE, MERGE, w // MERGE, MERGE, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(h * w, *x.shape[4:])


def interpolation(rows: int, cols: int, spec: SequenceSpec) -> tuple[np.ndarray, np.ndarray]:
    """How a rows×cols grid resamples the learned table: (index [rows·cols, K], weight [rows·cols, W]), merge order.

    Qwen3-VL: four corners and their weights. SigLIP2: a weight for every row of the table (K = 0), because shrinking
    with antialiasing mixes up to all of them.
    """
    if spec.vit_kind == "siglip2":
        y, x = antialiased(rows, spec.vit_grid), antialiased(cols, spec.vit_grid)
        weight = (y[:, None, :, None] * x[None, :, None, :]).reshape(rows, cols, -1)
        return np.zeros((rows * cols, 0), np.int32), merge_order(weight)
    index, weight = corners(rows, cols, spec.vit_grid)
    return merge_order(index), merge_order(weight)


def corners(rows: int, cols: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear with the corners of both grids aligned: index and weight [rows, cols, 4]."""

    def axis(n):
        at = np.arange(n, dtype=F32) * F32(grid - 1) / F32(max(n - 1, 1))
        low = np.floor(at)
        ends = np.stack([low, np.minimum(low + 1, grid - 1)]).astype(np.int32)
        return ends, np.stack([1 - np.abs(at - low - k) for k in (F32(0), F32(1))])  # transformers' order: bit-equal

    (y, wy), (x, wx) = axis(rows), axis(cols)
    pairs = [(i, j) for i in (0, 1) for j in (0, 1)]
    index = np.stack([y[i][:, None] * grid + x[j] for i, j in pairs], -1)
    return index, np.stack([wy[i][:, None] * wx[j] for i, j in pairs], -1)


def antialiased(n: int, grid: int) -> np.ndarray:
    """One axis of a bilinear resize with antialiasing, pixel centres at halves: [n, grid] weights, each row sums to 1.

    Shrinking widens the triangle to `grid / n` samples; what falls outside of the table is left out of the sum.
    """
    scale = F32(grid) / F32(n)
    centre = (np.arange(n, dtype=F32) + F32(0.5)) * scale
    distance = np.abs(np.arange(grid, dtype=F32) + F32(0.5) - centre[:, None]) / max(scale, F32(1))
    weight = np.maximum(F32(1) - distance, F32(0))
    return weight / weight.sum(1, keepdims=True)
