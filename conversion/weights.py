"""Parameters that are not in memory: read a layer at a time, whoever holds them.

In: a name map over lazily read PyTorch tensors, or the arrays of an Orbax checkpoint. Out: `Weights`, which every
writer takes: an Orbax checkpoint, PyTorch files (`tensors`), devices (`place`). Nothing is computed; a dtype widens
only where the layers of one stacked parameter differ, and `narrowed` remembers it for the way back.
"""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion.check import ConversionError, same
from conversion.names import Entry, compact, their_shape, to_ours, to_theirs
from cosmos_jax.checkpoint import CHUNK, Planned

Path = tuple[str, ...]
T = TypeVar("T")
WORKERS = 2  # tensors that are made in memory while another is written
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]  # name → dtype, shape


class Weights(abc.ABC):
    """What there is and how to read it.

    arrays: path → shape and dtype. stacked: parameters that the source holds a layer at a time. narrowed: "path[layer]"
    → dtype, of layers that were narrower in the source.
    """

    arrays: dict[Path, jax.ShapeDtypeStruct]
    stacked: frozenset[Path] = frozenset()
    narrowed: dict[str, str]

    @abc.abstractmethod
    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        """The parameter, or one layer of a stacked one; perhaps a strided view of a memory-mapped file."""

    def piece(self, path: Path, at: tuple[slice, ...], dtype) -> np.ndarray:
        """The part `at` of a parameter, in another dtype, without holding more than a layer beside it."""
        if path not in self.stacked:
            return self.read(path)[at].astype(dtype)
        layers = range(*at[0].indices(self.arrays[path].shape[0]))
        return np.stack([self.read(path, i)[at[1:]].astype(dtype) for i in layers])

    def dtype(self, path: Path, layer: int | None) -> np.dtype:
        """What the source had."""
        return jnp.dtype(self.narrowed.get(_name(path, layer), self.arrays[path].dtype))

    def plan(self) -> dict[Path, Planned]:
        """How `slices` will come: a large stacked parameter a layer at a time, any other whole."""
        large = {k for k in self.stacked if self.arrays[k].size * self.arrays[k].dtype.itemsize > CHUNK}
        return {k: Planned(x.shape, x.dtype, k in large) for k, x in self.arrays.items()}

    def slices(self) -> Iterator[tuple[Path, int | None, np.ndarray]]:
        """Every parameter once."""

        def piece(path: Path, layer: int | None):
            return path, layer, compact(self.read(path, layer))

        plan = self.plan().items()
        keys = ((path, i) for path, x in plan for i in (range(x.shape[0]) if x.layered else (None,)))
        return ahead(functools.partial(piece, *key) for key in keys)


class Foreign(Weights):
    """A PyTorch checkpoint seen through a name map. Check the map first (conversion/check.py)."""

    def __init__(self, entries: Iterable[Entry], tensors: Any, target: Mapping):
        """tensors: Mapping name → array with `.dtypes`. target: nested dict of the model's parameters or shapes."""
        self.source, self.at = tensors, {(e.path, e.layer): e for e in entries}
        self.stacked = frozenset(path for path, layer in self.at if layer is not None)
        dtypes: dict[Path, dict[int | None, np.dtype]] = {}
        for (path, layer), e in self.at.items():
            dtypes.setdefault(path, {})[layer] = tensors.dtypes[e.source]
        shapes = flatten_dict(dict(target))
        self.arrays, self.narrowed = {}, {}
        for path, found in dtypes.items():
            wide = _widest(path, set(found.values()))
            self.arrays[path] = jax.ShapeDtypeStruct(shapes[path].shape, wide)
            self.narrowed |= {_name(path, i): d.name for i, d in found.items() if d != wide}

    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        if layer is None and path in self.stacked:
            return np.stack([self.read(path, i) for i in range(self.arrays[path].shape[0])])
        e = self.at[path, layer]
        return to_ours(e, self.source[e.source]).astype(self.arrays[path].dtype, copy=False)


class Stored(Weights):
    """Arrays of an Orbax checkpoint (`checkpoint.open_arrays`)."""

    def __init__(self, stores: Mapping[Path, Any], narrowed: Mapping[str, str] | None = None):
        self.stores, self.narrowed = dict(stores), dict(narrowed or {})
        self.arrays = {k: jax.ShapeDtypeStruct(x.shape, x.dtype.numpy_dtype) for k, x in self.stores.items()}

    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        x = self.stores[path]
        return (x if layer is None else x[layer]).read().result()

    def piece(self, path: Path, at: tuple[slice, ...], dtype) -> np.ndarray:
        return self.stores[path][at].read().result().astype(dtype)


class Held(Weights):
    """A nested dict of arrays in memory."""

    def __init__(self, params: Mapping):
        self.flat, self.narrowed = flatten_dict(dict(params)), {}
        self.arrays = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in self.flat.items()}

    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        return np.asarray(self.flat[path] if layer is None else self.flat[path][layer])


class Merged(Weights):
    """Several that hold different parameters of one model."""

    def __init__(self, *parts: Weights):
        self.owner = {path: part for part in parts for path in part.arrays}
        self.arrays = {path: part.arrays[path] for path, part in self.owner.items()}
        self.stacked = frozenset().union(*(part.stacked for part in parts))
        self.narrowed = {k: v for part in parts for k, v in part.narrowed.items()}

    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        return self.owner[path].read(path, layer)


class Selected(Weights):
    """Some parameters of another."""

    def __init__(self, whole: Weights, paths: Collection[Path]):
        self.whole = whole
        self.arrays = {k: x for k, x in whole.arrays.items() if k in paths}
        self.stacked = whole.stacked & frozenset(paths)
        self.narrowed = {k: v for k, v in whole.narrowed.items() if _path(k) in paths}

    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        return self.whole.read(path, layer)


def tensors(entries: Iterable[Entry], weights: Weights) -> tuple[Layout, Iterator[tuple[str, np.ndarray]]]:
    """The PyTorch side, as file writers want it: name → dtype and shape; the tensors one at a time in that order.

    ConversionError, when its turn comes, for two parameters that are one tensor there (`Entry.tied`) and now differ.
    """
    found: dict[str, list[Entry]] = {}
    ties: dict[str, Entry] = {}
    for e in entries:
        if e.tied:
            ties[e.source] = e
        else:
            found.setdefault(e.source, []).append(e)
    layout = {}
    for name, (e, *_) in found.items():
        shape = weights.arrays[e.path].shape
        layout[name] = (weights.dtype(e.path, e.layer), their_shape(e, shape if e.layer is None else shape[1:]))

    def one(name: str, parts: list[Entry]):
        pieces = [to_theirs(e, weights.read(e.path, e.layer)) for e in sorted(parts, key=lambda e: e.part)]
        x = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if name in ties:
            same(ties[name], x, to_theirs(ties[name], weights.read(ties[name].path)))
        return name, x.astype(layout[name][0], copy=False)

    return layout, ahead(functools.partial(one, *item) for item in found.items())


def ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of the jobs in order; threads work on the next ones while one is used."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        coming: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        for job in jobs:
            coming.append(pool.submit(job))
            if len(coming) > WORKERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def place(weights: Weights, abstract: Mapping) -> dict:
    """Parameters straight from the files, in the dtypes and places of `abstract` (ShapeDtypeStructs with shardings).

    Only what `abstract` names is read; the part of each device is assembled alone, a layer at a time. ConversionError:
    a missing parameter or another shape.
    """

    def one(path: Path, want: jax.ShapeDtypeStruct) -> jax.Array:
        have = weights.arrays.get(path)
        if have is None or have.shape != want.shape:
            what = f"has the shape {list(have.shape)}" if have else "is absent"
            raise ConversionError(f"{_name(path)} {what} in the checkpoint, but {list(want.shape)} is asked for.")
        return jax.make_array_from_callback(
            want.shape, want.sharding, lambda at: weights.piece(path, at, want.dtype), dtype=want.dtype
        )

    return unflatten_dict({k: one(k, x) for k, x in flatten_dict(dict(abstract)).items()})


def _widest(path: Path, dtypes: set[np.dtype]) -> np.dtype:
    try:
        wide = functools.reduce(jnp.promote_types, dtypes)
    except ValueError:  # jax promotes float8 only when told to
        wide = None
    if wide is None or (len(dtypes) > 1 and any(not _holds(wide, d) for d in dtypes)):
        names = ", ".join(sorted(d.name for d in dtypes))
        raise ConversionError(f"the layers of {_name(path)} have the dtypes {names}, which no dtype holds exactly.")
    return wide


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Every value of `narrow` is one of `wide` (floating point)."""
    if not (jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating)):
        return wide == narrow
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp


def _path(name: str) -> Path:
    return tuple(name.partition("[")[0].split("/"))


def _name(path: Path, layer: int | None = None) -> str:
    return "/".join(path) + ("" if layer is None else f"[{layer}]")
