"""Pixels for the reasoner's vision encoder (spec model.md §3.1, §3.3).

In: frames that fit the patch grid (vision.py makes any picture fit). Out: flattened patches in 2×2 merge-block order,
with everything the ViT needs to place them (patch_grid.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.patch_grid import MERGE, Places, places
from data_pipelines.schema import SequenceSpec

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
    """The pictures of a sample: their patches, one after the other, and where each lies."""

    patches: np.ndarray  # [P, F] float32
    places: Places

    @property
    def frames(self) -> int:
        """Frames (temporal patches) of all pictures together."""
        return int(self.places.frame_ids[-1]) + 1


def vit_input(pictures: Sequence[Pixels], spec: SequenceSpec) -> VitInput:
    return VitInput(np.concatenate([p.patches for p in pictures]), places([p.grid for p in pictures], spec))


def preprocess(frames: np.ndarray, times: tuple[float, ...], spec: SequenceSpec) -> Pixels:
    """frames uint8 [F,H,W,3] → (x/255 − 0.5)/0.5 in patches. H and W must be multiples of 2·vit_patch (ValueError)."""
    side = spec.vit_patch * MERGE
    h, w = frames.shape[1:3]
    if h % side or w % side:
        raise ValueError(f"frames of {h}×{w} pixels: the vision encoder needs multiples of {side}; resize them first.")
    x = (frames.astype(np.float32) / 255.0 - 0.5) / 0.5
    return patchify(x, spec.vit_patch, spec.vit_temporal, spec.vit_kind)._replace(times=times)


def patchify(frames: np.ndarray, ps: int, ts: int, kind: str) -> Pixels:
    """[F,H,W,3] → patches of ts frames × ps × ps pixels; the last frame is repeated to fill the last of them.

    kind: the order of the numbers inside; (channel, frame, row, col) for qwen3vl, (row, col, channel) for siglip2.
    """
    if len(frames) % ts:
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % ts, 0)])
    f, h, w, c = frames.shape
    t, rows, cols = f // ts, h // ps, w // ps
    x = frames.reshape(t, ts, rows // MERGE, MERGE, ps, cols // MERGE, MERGE, ps, c)
    x = x.transpose(0, 2, 5, 3, 6, *FEATURES[kind])  # t, block row, block col, row in block, col in block
    return Pixels(np.ascontiguousarray(x).reshape(t * rows * cols, c * ts * ps * ps), (t, rows, cols))
