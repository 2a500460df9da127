"""The pickles inside PyTorch's files, read and written as plain data: nothing is imported, called or constructed.

In: bytes. Out: dicts, lists, tuples, numbers, strings, and three records of what PyTorch would have built: `Global` (a
name of Python, here only the name), `Call` (such a name, its arguments, its state) and `Storage` (the bytes of tensors,
elsewhere). A pickle is a program for a stack machine; this one knows the opcodes that build data, and for the few that
would call something it notes what would be called. A name or an opcode that a file of tensors does not need is refused.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from conversion.tensors import FileError

DTYPES: dict[str, np.dtype] = {
    "torch.bool": np.dtype(bool), "torch.uint8": np.dtype(np.uint8), "torch.int8": np.dtype(np.int8),
    "torch.int16": np.dtype("<i2"), "torch.uint16": np.dtype("<u2"), "torch.int32": np.dtype("<i4"),
    "torch.uint32": np.dtype("<u4"), "torch.int64": np.dtype("<i8"), "torch.uint64": np.dtype("<u8"),
    "torch.float16": np.dtype("<f2"), "torch.bfloat16": np.dtype(ml_dtypes.bfloat16), "torch.float32": np.dtype("<f4"),
    "torch.float64": np.dtype("<f8"), "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
STORAGES = {  # the others lie in an UntypedStorage and name their dtype themselves
    "torch.BoolStorage": "torch.bool", "torch.ByteStorage": "torch.uint8", "torch.CharStorage": "torch.int8",
    "torch.ShortStorage": "torch.int16", "torch.IntStorage": "torch.int32", "torch.LongStorage": "torch.int64",
    "torch.HalfStorage": "torch.float16", "torch.BFloat16Storage": "torch.bfloat16",
    "torch.FloatStorage": "torch.float32", "torch.DoubleStorage": "torch.float64",
}  # fmt: skip
UNTYPED = "torch.storage.UntypedStorage"
ORDERED, SIZE, LAYOUT = "collections.OrderedDict", "torch.Size", "torch.serialization._get_layout"
TENSOR, TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
PARAMETER = "torch._utils._rebuild_parameter"
META = "torch.distributed.checkpoint.metadata."
PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
KNOWN = {
    *DTYPES, *STORAGES, UNTYPED, ORDERED, SIZE, LAYOUT, TENSOR, TENSOR_WITH_DTYPE, PARAMETER, PLACE,
    *(META + name for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
                               "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    "pathlib.PosixPath", "pathlib._local.PosixPath",  # where a checkpoint was saved; Python 3.13 has the second
}  # fmt: skip
LARGEST = 100_000_000  # bytes of one pickle, as for the header of a safetensors file

CONSTANTS = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": lambda: (), "EMPTY_LIST": lambda: [], "EMPTY_DICT": lambda: {},
}  # fmt: skip
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}


@dataclass(frozen=True)
class Global:
    """A name of Python."""

    name: str


@dataclass(eq=False)  # a key of a dict by its identity
class Call:
    """What PyTorch would build: a name, its arguments, the state it is given afterwards."""

    name: str
    args: tuple
    state: Any = None


@dataclass(frozen=True)
class Storage:
    """The bytes of one or several tensors: `size` elements (bytes if untyped) in the record `key` of the archive."""

    kind: str
    key: str
    size: int


def loads(data: bytes, where: str) -> Any:
    """The tree that a pickle describes; `where` names it in messages. FileError for anything out of the ordinary."""
    try:
        return _read(data, where)
    except FileError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise FileError(f"{where} is damaged: its pickle is malformed ({e}); nothing was executed.") from None


def _read(data: bytes, where: str) -> Any:
    stack: list = []
    marks: list[list] = []
    memo: dict[int, Any] = {}
    for op, arg, _ in pickletools.genops(data):
        match op.name:
            case name if name in LITERALS:
                stack.append(arg)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS" as name:
                items, stack = stack, marks.pop()
                if name == "TUPLE":
                    stack.append(tuple(items))
                elif name == "APPENDS":
                    _a(list, stack[-1]).extend(items)
                else:
                    _fill(stack[-1], items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                item = stack.pop()
                _a(list, stack[-1]).append(item)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
            case "GLOBAL":
                stack.append(_known(arg.replace(" ", ".", 1), where))
            case "STACK_GLOBAL":
                name, module = _a(str, stack.pop()), _a(str, stack.pop())
                stack.append(_known(f"{module}.{name}", where))
            case "REDUCE" | "NEWOBJ":
                args, called = _a(tuple, stack.pop()), _a(Global, stack.pop())
                stack.append({} if called.name == ORDERED and not args else Call(called.name, args))
            case "BUILD":
                state = stack.pop()
                if not isinstance(
                    stack[-1], dict
                ):  # an OrderedDict may carry attributes (versions of modules): dropped
                    _a(Call, stack[-1]).state = state
            case "BINPERSID":
                kind, storage, key, location, size = _a(tuple, stack.pop())
                if kind != "storage" or _a(int, size) < 0:
                    raise ValueError("a reference to something that is no storage")
                stack.append(Storage(_a(Global, storage).name, _a(str, key), size))
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                if marks or len(stack) != 1:
                    raise ValueError("it ends in the middle of a value")
            case name:
                raise FileError(
                    f"{where} uses the pickle opcode {name}, which PyTorch does not write; do not trust it."
                )
    return stack[0]


def _a(kind: type, x: Any) -> Any:
    if type(x) is not kind:
        raise TypeError(f"a {type(x).__name__} where a {kind.__name__} belongs")
    return x


def _fill(table: Any, items: list) -> None:
    _a(dict, table)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, Call):
            raise TypeError(f"a {type(key).__name__} as a key")
        if key in table:
            raise ValueError("a key occurs twice")
        table[key] = value


def _known(name: str, where: str) -> Global:
    if name not in KNOWN:
        raise FileError(
            f"{where} refers to {name!r}, which a file of plain tensors does not need; nothing was executed. If you "
            "trust the file, load it with PyTorch and save its state dict alone."
        )
    return Global(name)


def integers(x: Any) -> tuple[int, ...]:
    """A torch.Size or a tuple of at most 8 integers ≥ 0; TypeError otherwise."""
    if isinstance(x, Call) and x.name == SIZE and len(x.args) == 1:
        x = x.args[0]
    if type(x) is not tuple or len(x) > 8 or not all(type(n) is int and n >= 0 for n in x):
        raise TypeError("not a tuple of at most 8 integers ≥ 0")
    return x


def dumps(tree: Any) -> bytes:
    """The inverse of `loads`: protocol 2, as `torch.load(weights_only=True)` and torch.distributed.checkpoint read."""
    return b"".join([b"\x80\x02", *_write(tree, {}), b"."])


def _write(x: Any, memo: dict[str, int]) -> Iterator[bytes]:
    """Opcodes that leave x on the stack. memo: name of a global → where it is remembered."""
    match x:
        case None:
            yield b"N"
        case bool():
            yield b"\x88" if x else b"\x89"
        case int():
            n = pickle.encode_long(x)
            yield b"\x8a" + bytes([len(n)]) + n
        case str():
            text = x.encode()
            yield b"X" + struct.pack("<I", len(text)) + text
        case ():
            yield b")"
        case tuple():
            yield b"("
            yield from _all(x, memo)
            yield b"t"
        case list():
            yield b"]("
            yield from _all(x, memo)
            yield b"e"
        case dict():
            yield b"}("
            yield from _all((y for item in x.items() for y in item), memo)
            yield b"u"
        case Global(name) if name in memo:
            yield b"j" + struct.pack("<I", memo[name])
        case Global(name):
            memo[name] = len(memo)
            yield b"c" + "\n".join([*name.rsplit(".", 1), ""]).encode() + b"r" + struct.pack("<I", memo[name])
        case Call(name, args, state):  # what has a state is made empty first, as by copyreg's protocol 2
            yield from _all((Global(name), args), memo)
            yield b"R" if state is None else b"\x81"
            if state is not None:
                yield from _write(state, memo)
                yield b"b"
        case Storage(kind, key, size):
            yield from _write(("storage", Global(kind), key, "cpu", size), memo)
            yield b"Q"
        case _:
            raise TypeError(f"a {type(x).__name__} has no place in a file of tensors.")


def _all(xs: Iterable[Any], memo: dict[str, int]) -> Iterator[bytes]:
    for x in xs:
        yield from _write(x, memo)
