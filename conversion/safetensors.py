"""safetensors files, read lazily and written as a stream. Nothing is executed and every header is distrusted.

In: a file, or a folder with an index of several. Out: name → array, memory-mapped: a tensor costs memory only while it
is used. Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from conversion.tensors import FileError, Layout, Lazy, Tensor, Tensors, in_order

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, the limit of the reference implementation
INDEX = ".safetensors.index.json"


def open_file(path: str | Path) -> Tensors:
    """One .safetensors file. FileError if it is truncated, or its header is not valid in every respect."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as f:
        header, start = _header(f, path, size)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise FileError(f"{path}: __metadata__ is not a table of strings; the file is damaged or not safetensors.")
    tensors = {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}
    _no_gaps(path, tensors, start, size)
    return Tensors(tensors, metadata)


def open_folder(path: str | Path) -> Tensors:
    """All tensors of a folder: of its index file if it has one, else of its only .safetensors file.

    FileError when the index and the files disagree, a file is missing, or it is not clear which files belong together.
    """
    path = Path(path)
    indexes, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
    if len(indexes) > 1:
        raise FileError(f"{path} holds {len(indexes)} index files ({', '.join(p.name for p in indexes)}); keep one.")
    if not indexes:
        if len(files) != 1:
            what = f"{len(files)} .safetensors files and no index" if files else "no .safetensors file"
            raise FileError(f"{path} holds {what}; give the folder of one model, with its *{INDEX}.")
        return open_file(files[0])
    listed = _index(indexes[0])
    tensors: dict[str, Lazy] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(listed.values())):
        if not (path / name).is_file():
            raise FileError(f"{indexes[0]} names {name}, which is not there; download it again.")
        part = open_file(path / name)
        wrong = sorted(set(part) ^ {k for k, v in listed.items() if v == name})
        if wrong:
            raise FileError(f"{path / name} and {indexes[0].name} disagree on {wrong[0]!r}; download both again.")
        tensors |= part.tensors
        metadata |= part.metadata
    return Tensors({k: tensors[k] for k in listed}, metadata)


def _index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text())["weight_map"]
        good = all(isinstance(v, str) and Path(v).name == v for v in listed.values())
    except (ValueError, KeyError, AttributeError, TypeError):
        good = False
    if not good:
        raise FileError(f"{path} has no weight_map of tensor names to file names in its own folder.")
    return listed


def _header(f: BinaryIO, path: Path, size: int) -> tuple[dict[str, Any], int]:
    head = f.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or 8 + length > size:
        raise FileError(f"{path} is truncated ({size} bytes, the header alone needs {8 + length}); download it again.")
    if length > LARGEST_HEADER:
        raise FileError(
            f"{path} claims a header of {length} bytes, above the limit of {LARGEST_HEADER}; do not trust it."
        )
    try:
        header = json.loads(f.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise FileError(f"{path}: the header is not JSON with unique names ({e}); it is damaged.") from None
    if not isinstance(header, dict):
        raise FileError(f"{path}: the header is not a table; the file is damaged or not safetensors.")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> Tensor:
    try:
        dtype, shape, (a, b) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = all(type(n) is int and n >= 0 for n in (*shape, a, b))
    except (TypeError, KeyError, ValueError):
        numbers = False
    if not numbers:
        raise FileError(f"{path}: the header's entry for {name!r} is malformed; the file is damaged.")
    if dtype not in DTYPES:
        raise FileError(f"{path}: {name!r} has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}.")
    if b < a or start + b > size:
        raise FileError(f"{path}: {name!r} lies at bytes {a}…{b}, outside the file's {size - start}; it is truncated.")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if b - a != need:
        raise FileError(f"{path}: {name!r} of shape {list(shape)} and {dtype} needs {need} bytes but has {b - a}.")
    return Tensor(path, DTYPES[dtype], shape, start + a, start + b)


def _no_gaps(path: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    end = start
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start != end:
            fault = "overlaps the one before it" if t.start < end else f"leaves {t.start - end} bytes unaccounted for"
            raise FileError(f"{path}: {name!r} {fault}; the header is not to be trusted.")
        end = t.stop
    if end != size:
        raise FileError(f"{path}: {size - end} bytes after the last tensor belong to none; the file is damaged.")


def nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def write_file(
    path: str | Path,
    layout: Layout,
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors one at a time, so that only one is in memory; the file appears under its name when complete.

    layout: name → (dtype, shape) in the order in which `arrays` will come. ValueError if they disagree.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in layout.items():
        size = nbytes(dtype, shape)
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for raw in in_order(path, layout, arrays):
            f.write(raw.data)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)
