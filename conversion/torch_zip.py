"""The archive of torch.save: a zip whose records are stored, not compressed, so that tensors can be memory-mapped.

In: a file, or a stretch of one (a checkpoint of torch.distributed holds many archives in a row). Out: the tree of its
`data.pkl`, and the place of each tensor in it. Records: `<stem>/data.pkl`, `<stem>/byteorder`, `<stem>/data/<key>`.
The checksum of `data.pkl` is verified, those of the tensors are not: that would read everything.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from conversion.tensors import FileError, Tensor
from conversion.torch_pickle import (
    DTYPES,
    LARGEST,
    ORDERED,
    PARAMETER,
    STORAGES,
    TENSOR,
    TENSOR_WITH_DTYPE,
    UNTYPED,
    Call,
    Global,
    Storage,
    dumps,
    integers,
    loads,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()}
KINDS = {dtype: kind for kind, dtype in STORAGES.items()}
ALIGNMENT = 64
LOCAL = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class Window:
    """A stretch of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, stop: int):
        self.file, self.start, self.stop = file, start, stop
        self.seek(0)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seek(self, to: int, whence: int = 0) -> int:
        at = to + (self.start, self.file.tell(), self.stop)[whence]
        if at < self.start:
            raise OSError("a seek to before the start")
        return self.file.seek(at) - self.start

    def read(self, size: int = -1) -> bytes:
        left = max(self.stop - self.file.tell(), 0)
        return self.file.read(left if size < 0 else min(size, left))

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@dataclass(frozen=True)
class Archive:
    """An archive that is read: its tree, and the bytes at which each storage starts and stops in the file."""

    path: Path
    where: str  # for messages
    tree: Any
    storages: dict[str, tuple[int, int]]

    def tensor(self, x: Any, name: str) -> Tensor | None:
        """Where the tensor lies that x stands for; None if x stands for none. FileError if it cannot be there."""
        if not isinstance(x, Call) or x.name not in (TENSOR, TENSOR_WITH_DTYPE, PARAMETER):
            return None
        try:
            return self._place(x.args[0] if x.name == PARAMETER else x)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
            why = f"there is no {e}" if isinstance(e, KeyError) else e
            raise FileError(f"{self.where}: the tensor {name!r} is not one that is read here: {why}.") from None

    def _place(self, x: Call) -> Tensor:
        if x.name not in (TENSOR, TENSOR_WITH_DTYPE):
            raise TypeError(f"a {x.name} where a tensor belongs")
        storage, offset, size, stride, _, _, *rest = x.args
        named = rest.pop(0).name if x.name == TENSOR_WITH_DTYPE else STORAGES.get(storage.kind, "torch.uint8")
        if rest and any(rest[0].values()):
            raise ValueError("it is negated or conjugated lazily; save .resolve_neg().resolve_conj()")
        dtype, size, stride = DTYPES[named], integers(size), integers(stride)
        (offset,) = integers((offset,))
        start, stop = self.storages[storage.key]
        unit = DTYPES[STORAGES[storage.kind]].itemsize if storage.kind != UNTYPED else 1
        if stop - start != storage.size * unit:
            raise ValueError(f"its storage should be {storage.size * unit} bytes and is {stop - start}")
        count, held = math.prod(size), storage.size * unit // dtype.itemsize
        if not count:
            return Tensor(self.path, dtype, size, start, start)
        stride = tuple(0 if n == 1 else s for n, s in zip(size, stride, strict=True))
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if last >= held or count > held:
            raise ValueError(f"its {count} elements end at number {last} of a storage of {held}")
        row_major = tuple(0 if n == 1 else math.prod(size[i + 1 :]) for i, n in enumerate(size))
        start += offset * dtype.itemsize
        stop = start + (last - offset + 1) * dtype.itemsize
        strides = None if stride == row_major else tuple(s * dtype.itemsize for s in stride)
        return Tensor(self.path, dtype, size, start, stop, strides)


def open_archive(path: Path, start: int = 0, stop: int | None = None) -> Archive:
    """The archive at these bytes of a file. FileError if it is none, or anything in it is out of the ordinary."""
    where = str(path) if stop is None else f"{path} (bytes {start} to {stop})"
    stop = path.stat().st_size if stop is None else stop
    with path.open("rb") as f:
        window = Window(f, start, stop)
        if window.read(4) != b"PK\x03\x04":
            raise FileError(
                f"{where} is no zip archive of torch.save: not a PyTorch file, or one in the format before 1.6, which "
                "PyTorch can load and save again."
            )
        try:
            with zipfile.ZipFile(cast(BinaryIO, window)) as z:
                return _archive(path, where, z, window)
        except FileError:
            raise
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
            OSError,
            ValueError,
            EOFError,
            struct.error,
        ) as e:
            raise FileError(f"{where} is truncated or damaged ({e}); download it again.") from None


def _archive(path: Path, where: str, z: zipfile.ZipFile, window: Window) -> Archive:
    records = {info.filename: info for info in z.infolist()}
    stems = [name[: -len("data.pkl")] for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(stems) != 1 or len(records) != len(z.infolist()):
        raise FileError(
            f"{where} is a zip archive, but not one of torch.save: it needs one data.pkl and no name twice."
        )
    for info in records.values():
        if info.compress_type or info.compress_size != info.file_size or info.flag_bits & 1:
            raise FileError(f"{where}: the record {info.filename!r} is compressed or encrypted; torch.save stores it.")
    order = f"{stems[0]}byteorder"
    if order in records:
        with z.open(order) as f:
            if f.read(8) != b"little":
                raise FileError(f"{where} was saved by a big-endian machine; save it again on a little-endian one.")
    pickled = records[f"{stems[0]}data.pkl"]
    if pickled.file_size > LARGEST:
        raise FileError(
            f"{where}: its pickle has {pickled.file_size} bytes, above the limit of {LARGEST}; is it damaged?"
        )
    prefix = f"{stems[0]}data/"
    storages = {
        name.removeprefix(prefix): _bytes(info, window) for name, info in records.items() if name.startswith(prefix)
    }
    return Archive(path, where, loads(z.read(pickled), where), storages)


def _bytes(info: zipfile.ZipInfo, window: Window) -> tuple[int, int]:
    """Where a record's data lie in the file; the header in front of them has a length of its own."""
    window.seek(info.header_offset)
    signature, name, extra = LOCAL.unpack(window.read(LOCAL.size))
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or window.read(name) != info.orig_filename.encode(encoding):
        raise ValueError(f"the record {info.filename!r} is not where the directory says")
    start = window.start + info.header_offset + LOCAL.size + name + extra
    if start + info.file_size > window.stop:
        raise ValueError(f"the record {info.filename!r} ends outside")
    return start, start + info.file_size


def tensor(key: str, dtype: np.dtype, shape: tuple[int, ...]) -> Call:
    """What stands in a pickle for a row-major tensor whose bytes are the record `key`. ValueError: PyTorch lacks it."""
    if (name := NAMES.get(np.dtype(dtype))) is None:
        raise ValueError(f"PyTorch has no dtype for {dtype}; known are {', '.join(map(str, NAMES))}.")
    count, stride = math.prod(shape), tuple(max(math.prod(shape[i + 1 :]), 1) for i in range(len(shape)))
    kind = KINDS.get(name, UNTYPED)
    storage = Storage(kind, key, count * np.dtype(dtype).itemsize if kind == UNTYPED else count)
    args = (storage, 0, tuple(shape), stride, False, Call(ORDERED, ()))
    return Call(TENSOR_WITH_DTYPE, (*args, Global(name))) if kind == UNTYPED else Call(TENSOR, args)


def write(file: BinaryIO, tree: Any, arrays: Iterable[np.ndarray]) -> None:
    """Append an archive to an open file. arrays: flat bytes of the storages "0", "1", … in this order, one by one."""
    window = Window(file, file.tell(), file.tell())
    with zipfile.ZipFile(cast(BinaryIO, window), "w") as z:
        _record(z, window, "data.pkl", dumps(tree))
        _record(z, window, "byteorder", b"little")
        for i, raw in enumerate(arrays):
            _record(z, window, f"data/{i}", raw.data)
        _record(z, window, "version", b"3\n")


def _record(z: zipfile.ZipFile, window: Window, name: str, data: bytes | memoryview) -> None:
    """Stored, and aligned as torch.save does it: by a field in the header that means nothing."""
    name = f"archive/{name}"
    info = zipfile.ZipInfo(name)
    info.file_size = len(data)
    header = LOCAL.size + len(name) + 20 + 4  # 20: sizes of 64 bits, always there
    pad = -(window.tell() + header) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad
    with z.open(info, "w", force_zip64=True) as f:
        f.write(data)
