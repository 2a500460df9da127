"""Pixels for the reasoner's vision encoder (spec model.md §3.1, §3.3).

In: frames that fit the patch grid (vision.py makes any picture fit). Out: flattened patches in 2×2 merge-block order,
with everything the ViT needs to place them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.schema import SequenceSpec

MERGE = 2  # patches per side of one und token

# Order of a patch's numbers. Axes: 1 frame, 4 row, 7 column of the pixel, 8 channel.
FEATURES = {"qwen3vl": (8, 1, 4, 7), "siglip2": (4, 7, 8, 1)}


class Pixels(NamedTuple):
    """One image or one clip, cut into patches."""

    patches: np.ndarray  # [t·rows·cols, F] float32, frame after frame, 2×2 blocks inside
    grid: tuple[int, int, int]  # t temporal patches, rows, cols
    times: tuple[float, ...] = ()  # seconds, one per temporal patch; () = an image

    @property
    def spans(self) -> int:
        """Runs of visual tokens it takes in a text: one per temporal patch."""
        return self.grid[0]

    @property
    def merged(self) -> tuple[int, int]:
        """Rows and columns of und tokens in one span."""
        return self.grid[1] // MERGE, self.grid[2] // MERGE


class VitInput(NamedTuple):
    patches: np.ndarray  # [P, F] float32
    frame_ids: np.ndarray  # [P] int32: patches attend within one temporal group
    rowcol: np.ndarray  # [P, 2] int32
    interp_index: np.ndarray  # [P, 4] int32
    interp_weight: np.ndarray  # [P, 4] float32
    frames: int  # temporal groups


def preprocess(frames: np.ndarray, times: tuple[float, ...], spec: SequenceSpec) -> Pixels:
    """frames uint8 [F,H,W,3] → (x/255 − 0.5)/0.5 in patches. H and W must be multiples of 2·vit_patch (ValueError)."""
    side = spec.vit_patch * MERGE
    h, w = frames.shape[1:3]
    if h % side or w % side:
        raise ValueError(f"frames of {h}×{w} pixels: the vision encoder needs multiples of {side}; resize them first.")
    x = (frames.astype(np.float32) / 255.0 - 0.5) / 0.5
    return patchify(x, spec.vit_patch, spec.vit_temporal, "qwen3vl")._replace(times=times)


def patchify(frames: np.ndarray, ps: int, ts: int, kind: str) -> Pixels:
    """[F,H,W,3] → patches of ts frames × ps × ps pixels; the last frame is repeated to fill the last of them.

    kind: the order of the numbers inside; (channel, frame, row, col) for qwen3vl, (row, col, channel, frame) for
    siglip2.
    """
    if len(frames) % ts:
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % ts, 0)])
    f, h, w, c = frames.shape
    t, rows, cols = f // ts, h // ps, w // ps
    x = frames.reshape(t, ts, rows // MERGE, MERGE, ps, cols // MERGE, MERGE, ps, c)
    x = x.transpose(0, 2, 5, 3, 6, *FEATURES[kind])  # t, block row, block col, row in block, col in block
    return Pixels(np.ascontiguousarray(x).reshape(t * rows * cols, c * ts * ps * ps), (t, rows, cols))


def vit_input(pictures: Sequence[Pixels], spec: SequenceSpec) -> VitInput:
    """The patches of all pictures of a sample, one after the other, and where each lies."""
    parts, frames = [], 0
    for patches, (t, rows, cols), _ in pictures:
        rowcol = merge_order(np.moveaxis(np.indices((rows, cols)), 0, -1)).astype(np.int32)
        index, weight = interpolation(rows, cols, spec.vit_grid)
        ids = np.repeat(np.arange(frames, frames + t, dtype=np.int32), rows * cols)
        parts.append((patches, ids, *(np.tile(x, (t, 1)) for x in (rowcol, index, weight))))
        frames += t
    return VitInput(*map(np.concatenate, zip(*parts, strict=True)), frames)


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
