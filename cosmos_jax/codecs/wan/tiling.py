"""Where to cut the frame, so that it can be encoded or decoded tile by tile with the same result.

In: the frame's sides in latents, the largest tile, and how far each stage sees. Out: for every tile the part of the
input it depends on, what to keep of it after each stage, and where the result belongs.

Nothing is blended: a tile is computed from a window, the tile and a halo as wide as all that it can see, and comes out
as if from the whole frame. What a stage makes near an inner edge of its window is wrong, because the edge was padded
with zeros; it lies in the halo and is cut off. A window never sticks out of the frame: it is moved inwards and meets
the frame's own zero padding. So all windows have one shape, and one compiled program serves every tile.

This holds for convolutions only. Attention sees the whole frame; the stage that has it is never cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np
from jax import lax


class Sight(NamedTuple):
    """How far sideways one output pixel of a stage looks."""

    before: int  # pixels of its input
    after: int = 0  # and, first, pixels of its output: a convolution after the stage has made the frame larger
    scale: Fraction = Fraction(1)  # pixels of its output per pixel of its input, per side


@functools.partial(jax.tree_util.register_dataclass, data_fields=["corners"], meta_fields=["sizes"])
@dataclass(frozen=True)
class Window:
    """What to keep after each stage."""

    corners: np.ndarray  # [stages,2] row, column; data, so that all tiles share a program
    sizes: tuple[tuple[int, int], ...]  # height, width; static

    def keep(self, x: jax.Array, stage: int) -> jax.Array:
        """[B,T,H,W,C], which left `stage` → its part that the rest depends on."""
        row, col = self.corners[stage, 0], self.corners[stage, 1]
        return lax.dynamic_slice(x, (0, 0, row, col, 0), (*x.shape[:2], *self.sizes[stage], x.shape[4]))


class Tile(NamedTuple):
    source: tuple[slice, slice]  # rows and columns of the input to give to the first stage
    window: Window
    target: tuple[slice, slice]  # rows and columns of the output this is


class Strip(NamedTuple):
    """One tile seen along one side."""

    starts: list[int]  # of the window in the input of each stage, and of the tile in the output
    sizes: list[int]
    corners: list[int]  # of what is kept, in the output of each stage


def strips(latents: int, tile: int, sights: list[Sight]) -> list[Strip]:
    """Cut a side of `latents` into as few tiles of at most `tile` as possible, of one size (the last may overlap)."""
    scales = [Fraction(1)]  # pixels per latent in the input of each stage, and in the output
    for sight in sights:
        scales.append(scales[-1] * sight.scale)
    scales = [s / min(scales) for s in scales]
    halos = [0]
    for sight in reversed(sights):
        halos.insert(0, math.ceil((halos[0] + sight.after) / sight.scale) + sight.before)
    for k, sight in enumerate(sights):
        halos[k] += halos[k] % 2 if sight.scale < 1 else 0  # pixels are halved in pairs: never part them
    n = math.ceil(latents / tile)
    tile = math.ceil(latents / n)
    sides = [int(latents * s) for s in scales]
    sizes = [min(side, int(tile * s) + 2 * h) for side, s, h in zip(sides, scales, halos, strict=True)]
    out = []
    for first in (min(i * tile, latents - tile) for i in range(n)):
        starts = [
            min(max(int(first * s) - h, 0), side - size)
            for side, s, h, size in zip(sides, scales, halos, sizes, strict=True)
        ]
        corners = [b - int(a * s.scale) for (a, b), s in zip(pairwise(starts), sights, strict=True)]
        out.append(Strip(starts, sizes, corners))
    return out


def tiles(height: int, width: int, tile: int, sights: list[Sight]) -> Iterator[Tile]:
    """All tiles of a frame of height×width latents, for stages that see as `sights` says."""
    for row in strips(height, tile, sights):
        for col in strips(width, tile, sights):
            source, target = (
                (slice(row.starts[k], row.starts[k] + row.sizes[k]), slice(col.starts[k], col.starts[k] + col.sizes[k]))
                for k in (0, -1)
            )
            corners = np.stack([row.corners, col.corners], -1).astype(np.int32)
            yield Tile(source, Window(corners, tuple(zip(row.sizes[1:], col.sizes[1:], strict=True))), target)
