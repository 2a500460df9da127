"""Declarative name maps: which tensor of a PyTorch checkpoint is which parameter here, read in both directions.

A map is a list of `Entry`. Converting only reshapes, permutes, splits and stacks, never computes, so a round trip is
byte-identical. An entry says, for one tensor of the source (or one of `parts` equal pieces along its first axis):

    piece.reshape(view).transpose(axes) == params[path]          or layer `layer` of it, where layers are stacked

A view loses the shape of the source, so an entry with a view states that shape.

Every piece has one entry, and may have one more that is `tied`: then two parameters are one tensor there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

STRIP = (16, 4096)  # rows and columns of a matrix that are transposed at a time


@dataclass(frozen=True)
class Entry:
    source: str  # name in the PyTorch checkpoint
    path: tuple[str, ...]  # where it lives in the nested dict of parameters
    view: tuple[int, ...] | None = None  # reshape the piece first; None: as it is
    shape: tuple[int, ...] | None = None  # of the whole source tensor, where `view` changes it
    axes: tuple[int, ...] | None = None  # then permute; None: as it is
    layer: int | None = None  # position along the leading, stacked axis of params[path]; None: not stacked
    part: int = 0  # which piece of the source …
    parts: int = 1  # … of how many equal ones along its axis 0
    tied: bool = False  # a second reader of a piece that another entry owns; export demands that the two agree

    def __post_init__(self):
        if (self.view is None) != (self.shape is None):
            raise ValueError(f"entry {self.source!r}: `view` and `shape` go together.")


def to_ours(entry: Entry, x: np.ndarray) -> np.ndarray:
    """A source tensor → what `entry` contributes to params[path] (without the stacked axis). No copy if avoidable."""
    if entry.parts > 1:
        step = x.shape[0] // entry.parts
        x = x[entry.part * step : (entry.part + 1) * step]
    x = x if entry.view is None else x.reshape(entry.view)
    return x if entry.axes is None else x.transpose(entry.axes)


def to_theirs(entry: Entry, x: np.ndarray) -> np.ndarray:
    """The inverse: one layer of params[path] → the piece of the source tensor, contiguous."""
    if entry.axes is not None:
        x = x.transpose(np.argsort(entry.axes))
    x = compact(x)
    return x if entry.shape is None else x.reshape(entry.shape[0] // entry.parts, *entry.shape[1:])


def our_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `to_ours` for a source of this shape; ValueError if it does not fit the entry."""
    if entry.shape is not None and tuple(shape) != entry.shape:
        raise ValueError(f"{entry.source!r} should have the shape {entry.shape}.")
    return to_ours(entry, _nothing(shape)).shape


def their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the whole source tensor for one layer of params[path] of this shape."""
    if entry.shape is not None:
        return entry.shape
    axes = range(len(shape)) if entry.axes is None else np.argsort(entry.axes)
    first, *rest = (shape[i] for i in axes)
    return (first * entry.parts, *rest)


def rename(name: str, rules: Iterable[tuple[str, Any]]) -> str:
    """`re.sub` of every (pattern, replacement) in turn: how one layout's names become another's."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def compact(x: np.ndarray) -> np.ndarray:
    """x in C order: itself, or a copy. A matrix is transposed in strips that fit the cache, which numpy does not do."""
    order = np.argsort([-s for s in x.strides], kind="stable").tolist()  # the axes as they lie in memory
    stored = x.transpose(order)
    turned = order.index(0) if order else 0  # so many axes come last here and first there
    rotated = order == [*range(x.ndim - turned, x.ndim), *range(x.ndim - turned)]
    if not (turned and rotated and stored.flags.c_contiguous):
        return np.asarray(x, order="C")
    flat = stored.reshape(
        math.prod(stored.shape[:turned]), math.prod(stored.shape[turned:])
    )  # x is this matrix transposed
    out = np.empty(flat.shape[::-1], x.dtype)
    for i in range(0, len(flat), STRIP[0]):
        for j in range(0, flat.shape[1], STRIP[1]):
            rows, columns = slice(i, i + STRIP[0]), slice(j, j + STRIP[1])
            out[columns, rows] = flat[rows, columns].T
    return out.reshape(x.shape)


def _nothing(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.empty((), np.uint8), shape)
