"""Pixels for the reasoner's vision encoder (spec model.md §3.1, §3.3).

In: uint8 frames. Out: flattened patches in 2×2 merge-block order with everything the ViT needs to place them
(patch_grid.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipelines.patch_grid import MERGE, places
from data_pipelines.schema import SequenceSpec

# Order of a patch's numbers. Axes: 1 frame, 4 row, 7 column of the pixel, 8 channel.
FEATURES = {"qwen3vl": (8, 1, 4, 7), "siglip2": (4, 7, 8, 1)}


class VitInput(NamedTuple):
    patches: np.ndarray  # [P, 3·temporal·ps·ps] float32
    frame_ids: np.ndarray  # this and the next three: `patch_grid.Places`
    rowcol: np.ndarray
    interp_index: np.ndarray
    interp_weight: np.ndarray
    grid: tuple[int, int, int]  # temporal groups, merged rows, merged cols


def preprocess(frames: np.ndarray, spec: SequenceSpec) -> VitInput:
    """frames uint8 [F,H,W,3] → ViT input. H and W must be multiples of 2·vit_patch (ValueError otherwise).

    (x/255 − 0.5)/0.5; `vit_temporal` frames per patch, the last frame repeated to fill; features (channel, time, row,
    col) for Qwen3-VL, (row, col, channel) for SigLIP2; patches row by row of 2×2 blocks.
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
    x = x.transpose(0, 2, 5, 3, 6, *FEATURES[spec.vit_kind])  # t, block row, block col, row in block, col in block
    patches = np.ascontiguousarray(x).reshape(t * gh * gw, spec.vit_patch_dim)
    return VitInput(patches, *places([(t, gh, gw)], spec), (t, gh // MERGE, gw // MERGE))
