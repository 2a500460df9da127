"""A stage of the VAE one window of the frame at a time: less memory, the same numbers.

In: a stage, how many pixels of its input it looks sideways (its reach), the pixels per side to make at a time. Out: a
stage with the same meaning. Nothing is blended. Every window is a tile of the frame with a halo of the reach around it, so
the tile itself comes out as if the whole frame had been given; the halo is thrown away. A window never sticks out of the
frame: at a border it is moved inwards, and the zero padding it meets there is the real one. So all windows have one
shape and one compiled loop serves them.

This is exact because each stage starts again from a whole frame. The halos do not add up from stage to stage, and the
attention of the middle, which sees the whole frame, is not tiled at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# (x, its part of the cache, precision) → the same, moved on
Stage = Callable[..., tuple[jax.Array, dict | jax.Array]]


class Cuts(NamedTuple):
    """How one side of the frame is cut, in pixels."""

    tile: int  # what a window contributes
    window: int  # what it is computed from
    tiles: list[int]  # where each tile starts
    windows: list[int]  # where its window starts


def cut(size: int, tile: int, reach: int) -> Cuts:
    """One side of `size` pixels. Lengths are even, as halving needs, unless one window holds the whole side."""
    halo = reach + reach % 2
    n = -(-size // tile)
    tile = -(-size // (2 * n)) * 2  # as few tiles as asked for, of nearly equal size
    window = tile + 2 * halo
    if n == 1 or window >= size:
        return Cuts(size, size, [0], [0])
    tiles = [min(i * tile, size - tile) for i in range(n)]
    return Cuts(tile, window, tiles, [min(max(a - halo, 0), size - window) for a in tiles])


def tiled(stage: Stage, reach: int, tile: int) -> Stage:
    """`stage` in windows of `tile` pixels of its input per side and the halo.

    Its cache gets a leading axis, the windows: each keeps its own, halo included, and replaces it in place. A frame that
    fits in one window goes through the stage as it is.
    """

    def run(x: jax.Array, cache, precision):
        rows, cols = (cut(size, tile, reach) for size in x.shape[2:4])
        tiles, windows = (
            np.stack(np.meshgrid(r, c, indexing="ij"), -1).reshape(-1, 2)
            for r, c in ((rows.tiles, cols.tiles), (rows.windows, cols.windows))
        )
        if len(tiles) == 1:
            return stage(x, cache, precision)

        def window(i, past):
            corner = jnp.asarray(windows)[i]
            part = _cut_out(x, corner, (rows.window, cols.window))
            return stage(part, past, precision)

        y, new = jax.eval_shape(lambda: window(0, cache and jax.tree.map(lambda c: c[0], cache)))

        def scale(pixels):  # of the stage's input → of its output, twice or half as fine
            return pixels * y.shape[2] // rows.window

        def body(i, carry):
            out, caches = carry
            y, new = window(i, cache and jax.tree.map(lambda c: c[i], caches))
            corner = jnp.asarray(tiles)[i]
            inner = _cut_out(y, scale(corner - jnp.asarray(windows)[i]), (scale(rows.tile), scale(cols.tile)))
            out = lax.dynamic_update_slice(out, inner, _at(scale(corner)))
            return out, jax.tree.map(lambda c, n: lax.dynamic_update_index_in_dim(c, n, i, 0), caches, new)

        out = jnp.zeros((*y.shape[:2], scale(x.shape[2]), scale(x.shape[3]), y.shape[4]), y.dtype)
        empty = cache or jax.tree.map(lambda c: jnp.zeros((len(tiles), *c.shape), c.dtype), new)
        return lax.fori_loop(0, len(tiles), body, (out, empty))

    return run


def _at(corner: jax.Array) -> tuple:
    return (0, 0, corner[0], corner[1], 0)


def _cut_out(x: jax.Array, corner: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B,T,H,W,C] → [B,T,*size,C]."""
    return lax.dynamic_slice(x, _at(corner), (*x.shape[:2], *size, x.shape[4]))
