"""What every reader of weights returns: name → array, read when asked for; and the order every writer insists on.

In: where tensors lie. Out: `Tensors`. The readers (`safetensors`, `pth`, `dcp`) differ only in how they find that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class FileError(ValueError):
    """A file that is not what it says; one sentence that names it."""


class Lazy(Protocol):
    """A tensor that is still in its file."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in one file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # absolute, bytes
    stop: int
    strides: tuple[int, ...] | None = None  # bytes; None = row-major without gaps

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self) -> np.ndarray:
        """Memory-mapped, read-only."""
        if not self.stop - self.start:
            return np.empty(self.shape, self.dtype)
        raw = np.memmap(self.path, np.uint8, "r", self.start, (self.stop - self.start,))
        return np.ndarray(self.shape, self.dtype, raw, strides=self.strides)  # refuses what leaves `raw`


class Tensors(Mapping[str, np.ndarray]):
    """name → array over one or many files; `shapes`, `dtypes` and `metadata` without touching the data."""

    def __init__(self, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]):
        self.tensors, self.metadata = dict(tensors), dict(metadata)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def files(self) -> set[Path]:
        return {path for t in self.tensors.values() for path in t.files}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {k: t.shape for k, t in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {k: t.dtype for k, t in self.tensors.items()}


def in_order(path: Path, layout: Layout, arrays: Iterable[tuple[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """The arrays as flat bytes, one at a time. ValueError if one is not what `layout` has next, or never comes."""
    expected = iter(layout.items())
    for name, x in arrays:
        want = next(expected, None)
        if want is None or (name, np.dtype(want[1][0]), tuple(want[1][1])) != (want[0], x.dtype, x.shape):
            raise ValueError(f"{path}: {name!r} {x.dtype} {x.shape} comes where the layout has {want}.")
        yield np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    if (missing := next(expected, None)) is not None:
        raise ValueError(f"{path}: {missing[0]!r} never came.")
