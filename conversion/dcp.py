"""Checkpoint folders of torch.distributed.checkpoint, as the Cosmos framework trains with them, without PyTorch.

In: a folder with `.metadata`, a pickle that says which tensors there are and in which chunks, and files named
`__<rank>_<n>.distcp`, each a row of archives of torch.save, one per chunk. Out: name → array, as from
`conversion.safetensors`; a tensor in one chunk is memory-mapped, one that was sharded is put together when it is read.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.tensors import FileError, Layout, Lazy, Tensors, in_order
from conversion.torch_pickle import DTYPES, LARGEST, LAYOUT, META, PLACE, SIZE, Call, Global, dumps, integers, loads
from conversion.torch_zip import NAMES, open_archive, tensor, write

METADATA = ".metadata"
FILE = "__0_0.distcp"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the archive that holds it."""

    path: Path
    start: int
    stop: int
    offsets: Shape
    dtype: np.dtype
    shape: Shape

    def read(self, name: str) -> np.ndarray:
        """Memory-mapped. FileError if the archive holds anything else than this box."""
        archive = open_archive(self.path, self.start, self.stop)
        found = archive.tensor(archive.tree, name)
        if found is None or (found.dtype, found.shape) != (self.dtype, self.shape):
            what = f"{found.dtype} {list(found.shape)}" if found else "no tensor"
            raise FileError(
                f"{archive.where} holds {what} where {METADATA} has {self.dtype} {list(self.shape)} of {name!r}."
            )
        return found.read()


@dataclass(frozen=True)
class Sharded:
    """A tensor in one or several chunks."""

    name: str
    dtype: np.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]  # without the empty ones

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(chunk.path for chunk in self.chunks)

    def read(self) -> np.ndarray:
        if len(self.chunks) == 1:
            return self.chunks[0].read(self.name)
        whole = np.empty(self.shape, self.dtype)
        for chunk in self.chunks:
            box = tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.shape, strict=True))
            whole[box] = chunk.read(self.name)
        return whole


def open_folder(path: str | Path) -> Tensors:
    """All tensors of a checkpoint, under the names it gives them (`net.…`, `net_ema.…`).

    path: the folder with `.metadata`, or one whose `model/` is that (`iter_000000100`). Values that are no tensors are
    listed in `metadata` and not read. FileError if a file is missing or too short, or if the chunks of a tensor do not
    cover it exactly once; an archive is opened, and checked against `.metadata`, when its tensor is read.
    """
    path = Path(path)
    folder = next((p for p in (path, path / "model") if (p / METADATA).is_file()), None)
    if folder is None:
        raise FileError(
            f"{path} has no {METADATA}, nor has its model/: not a checkpoint of torch.distributed, or its writing was "
            "interrupted."
        )
    where = str(folder / METADATA)
    if (size := (folder / METADATA).stat().st_size) > LARGEST:
        raise FileError(f"{where} has {size} bytes, above the limit of {LARGEST}; is it damaged?")
    tree = loads((folder / METADATA).read_bytes(), where)
    try:
        return _tensors(folder, tree)
    except FileError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as e:
        why = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise FileError(f"{where} does not describe a checkpoint that is read here: {why}.") from None


class _Places:
    """Which bytes of which file hold a part of a tensor."""

    def __init__(self, folder: Path, storage_data: dict):
        self.folder, self.sizes, self.places = folder, dict[str, int](), dict[tuple[str, Shape | None], dict]()
        for index, place in storage_data.items():
            at = _state(index, META + "MetadataIndex")
            key = at["fqn"], None if at.get("offset") is None else integers(at["offset"])
            if key in self.places:
                raise ValueError(f"two places for {key[0]!r} at {key[1]}")
            self.places[key] = _state(place, PLACE)

    def find(self, name: str, offsets: Shape | None = None) -> tuple[Path, int, int]:
        """File, start and stop. offsets: where the part begins in its tensor; None for what is not a tensor."""
        if (place := self.places.get((name, offsets))) is None:
            raise ValueError(f"it does not say where the part of {name!r} at {offsets} lies")
        file, (start, length) = place["relative_path"], integers((place["offset"], place["length"]))
        if Path(file).name != file:
            raise ValueError(f"{file!r} is not a file of its own folder")
        if place.get("transform_descriptors"):
            raise ValueError(f"{name!r} was transformed when saved, perhaps compressed; save it plainly")
        if file not in self.sizes:
            if not (self.folder / file).is_file():
                raise FileError(f"{self.folder / METADATA} names {file}, which is not there; copy the folder again.")
            self.sizes[file] = (self.folder / file).stat().st_size
        if start + length > self.sizes[file]:
            raise FileError(
                f"{self.folder / file} is truncated: {name!r} ends at byte {start + length} of {self.sizes[file]}."
            )
        return self.folder / file, start, start + length


def _tensors(folder: Path, tree: Any) -> Tensors:
    whole = _state(tree, META + "Metadata")
    places = _Places(folder, whole["storage_data"])
    tensors: dict[str, Lazy] = {}
    metadata = {}
    for name, entry in whole["state_dict_metadata"].items():
        if isinstance(entry, Call) and entry.name == META + "BytesStorageMetadata":
            _, start, stop = places.find(name)
            metadata[name] = f"{stop - start} bytes, not read"
        else:
            tensors[name] = _sharded(name, _state(entry, META + "TensorStorageMetadata"), places)
    return Tensors(tensors, metadata)


def _sharded(name: str, entry: dict, places: _Places) -> Sharded:
    dtype, layout, *_ = _state(entry["properties"], META + "TensorProperties", tuple)
    if layout.name != LAYOUT or layout.args != ("torch.strided",):
        raise ValueError(f"{name!r} is not a dense tensor")
    kind, shape, boxes, chunks = DTYPES[dtype.name], integers(entry["size"]), [], []
    for chunk in entry["chunks"]:
        box = _state(chunk, META + "ChunkStorageMetadata")
        offsets, sizes = integers(box["offsets"]), integers(box["sizes"])
        boxes.append((offsets, sizes))
        if math.prod(sizes):
            path, start, stop = places.find(name, offsets)
            chunks.append(Chunk(path, start, stop, offsets, kind, sizes))
    if not cover(shape, boxes):
        raise ValueError(f"the chunks of {name!r} do not cover its {list(shape)} exactly once")
    return Sharded(name, kind, shape, tuple(chunks))


def cover(shape: Shape, boxes: Iterable[tuple[Shape, Shape]]) -> bool:
    """Whether boxes (offsets, sizes) fill an array exactly once, in time linear in their number.

    The corners of a box fix, modulo 2, which points it covers. If, of all corners, those of the array alone remain when
    equal ones cancel, every point inside is covered an odd number of times; with the volumes' sum right, once.
    """
    odd: set[Shape] = set()
    volume = 0
    for offsets, sizes in boxes:
        odd ^= _corners(offsets, sizes)
        volume += math.prod(sizes)
    return volume == math.prod(shape) and odd == _corners((0,) * len(shape), shape)


def _corners(offsets: Shape, sizes: Shape) -> set[Shape]:
    if not all(sizes):
        return set()
    return set(itertools.product(*((a, a + n) for a, n in zip(offsets, sizes, strict=True))))


def _state(x: Any, name: str, kind: type = dict) -> Any:
    if not (isinstance(x, Call) and x.name == name and type(x.state) is kind):
        raise TypeError(f"no {name.rsplit('.', 1)[-1]} where one belongs")
    return x.state


def write_folder(path: str | Path, layout: Layout, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors one at a time, each as one chunk; `.metadata` comes last, so that half a checkpoint is none.

    layout: name → (dtype, shape) in the order in which `arrays` will come. FileError if the folder already holds a
    checkpoint, ValueError if layout and arrays disagree or for a dtype that PyTorch lacks.
    """
    path = Path(path)
    if (path / METADATA).exists():
        raise FileError(f"{path} already holds a checkpoint; give a new folder.")
    trees = [tensor("0", dtype, shape) for dtype, shape in layout.values()]
    path.mkdir(parents=True, exist_ok=True)
    ends = [0]
    with (path / FILE).open("wb") as f:
        for tree, raw in zip(trees, in_order(path, layout, arrays), strict=True):
            write(f, tree, [raw])
            ends.append(f.tell())
        f.flush()
        os.fsync(f.fileno())
    partial = path / (METADATA + ".partial")
    with partial.open("wb") as f:
        f.write(dumps(_metadata(layout, ends)))
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path / METADATA)


def _metadata(layout: Layout, ends: list[int]) -> Call:
    """What torch.distributed.checkpoint would have pickled for these tensors in one file."""
    entries, places = {}, {}
    contiguous = Call(META + "_MEM_FORMAT_ENCODING", (0,))
    for i, (name, (dtype, shape)) in enumerate(layout.items()):
        zeros = Call(SIZE, ((0,) * len(shape),))
        size = Call(SIZE, (tuple(shape),))
        kind = (Global(NAMES[np.dtype(dtype)]), Call(LAYOUT, ("torch.strided",)), False, contiguous, False)
        entries[name] = Call(META + "TensorStorageMetadata", (), {
            "properties": Call(META + "TensorProperties", (), kind),
            "size": size,
            "chunks": [Call(META + "ChunkStorageMetadata", (), {"offsets": zeros, "sizes": size})],
        })  # fmt: skip
        index = Call(META + "MetadataIndex", (), {"fqn": name, "index": 0, "offset": zeros})
        place = {"relative_path": FILE, "offset": ends[i], "length": ends[i + 1] - ends[i]}
        places[index] = Call(PLACE, (), place)
    return Call(META + "Metadata", (), {
        "state_dict_metadata": entries,
        "planner_data": {name: (name,) for name in layout},
        "storage_data": places,
        "storage_meta": None,
        "version": "1.0.0",
    })  # fmt: skip
