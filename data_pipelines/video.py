"""Pixels for the reasoner's vision encoder (Qwen3-VL, spec model.md §3.1).

In: uint8 frames. Out: flattened patches in 2×2 merge-block order with everything the ViT needs to place them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipelines.schema import SequenceSpec

MERGE = 2  # patches per side of one und token


class VitInput(NamedTuple):
    patches: np.ndarray  # [P, 3·temporal·ps·ps] float32
    frame_ids: np.ndarray  # [P] int32: patches attend within one temporal group
    rowcol: np.ndarray  # [P, 2] int32
    interp_index: np.ndarray  # [P, 4] int32
    interp_weight: np.ndarray  # [P, 4] float32
    grid: tuple[int, int, int]  # temporal groups, merged rows, merged cols


def preprocess(frames: np.ndarray, spec: SequenceSpec) -> VitInput:
    """frames uint8 [F,H,W,3] → ViT input. H and W must be multiples of 2·vit_patch (ValueError otherwise).

    (x/255 − 0.5)/0.5; `vit_temporal` frames per patch, the last frame repeated to fill; features (channel, time, row,
    col); patches row by row of 2×2 blocks.
    """
    f, h, w, _ = frames.shape
    ps, ts, side = spec.vit_patch, spec.vit_temporal, spec.vit_patch * MERGE
    if h % side or w % side:
        raise ValueError(f"frames of {h}×{w} pixels: the vision encoder needs multiples of {side}; resize them first.")
    if f % ts:
        frames = np.concatenate([frames, np.repeat(frames[-1:], -f % ts, 0)])
    t, gh, gw = len(frames) // ts, h // ps, w // ps
    x = (frames.astype(np.float32) / 255.0 - 0.5) / 0.5
    x = x.reshape(t, ts, gh // MERGE, MERGE, ps, gw // MERGE, MERGE, ps, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, block row, block col, row in block, col in block, c, time, y, x
    patches = np.ascontiguousarray(x).reshape(t * gh * gw, spec.vit_patch_dim)
    rowcol = np.tile(merge_order(np.moveaxis(np.indices((gh, gw)), 0, -1)), (t, 1)).astype(np.int32)
    index, weight = interpolation(gh, gw, spec.vit_grid)
    frame_ids = np.repeat(np.arange(t, dtype=np.int32), gh * gw)
    return VitInput(
        patches, frame_ids, rowcol, np.tile(index, (t, 1)), np.tile(weight, (t, 1)), (t, gh // MERGE, gw // MERGE)
    )


def merge_order(x: np.ndarray) -> np.ndarray:
    """[rows, cols, …] in raster order → [rows·cols, …] in 2×2 block order."""
    h, w = x.shape[:2]
    x = x.reshape(h // MERGE, MERGE, w // MERGE, MERGE, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(h * w, *x.shape[4:])


def interpolation(rows: int, cols: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear corners of a rows×cols patch grid in the learned grid×grid table (corners aligned).

    Returns index [rows·cols, 4] int32 and weight [rows·cols, 4] float32, in merge-block order.
    """
    y, x = (np.linspace(0, grid - 1, n, dtype=np.float32) for n in (rows, cols))
    y0, x0 = y.astype(np.int32), x.astype(np.int32)
    y1, x1 = np.minimum(y0 + 1, grid - 1), np.minimum(x0 + 1, grid - 1)
    dy, dx = (y - y0)[:, None], (x - x0)[None]
    index = np.stack([y[:, None] * grid + x[None] for y in (y0, y1) for x in (x0, x1)], -1)
    weight = np.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], -1)
    return merge_order(index).astype(np.int32), merge_order(weight).astype(np.float32)
