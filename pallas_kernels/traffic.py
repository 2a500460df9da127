"""Bytes that a compiled program moves to and from device memory, read off its own text.

In: what `jit(f).lower(...).compile()` returns. Out: bytes, counted as the operands and results of every instruction
that runs by itself (a fusion and a Pallas kernel are one each), in the layout and padding they have on that chip.
Caches are not modelled: this is what a memory-bound program is held against, beside the least that it could move
(docs/kernels.md).
"""

from __future__ import annotations

import math
import re
from typing import Any

FREE = {
    "parameter", "constant", "iota", "bitcast", "tuple", "get-tuple-element", "partition-id", "replica-id", "after-all",
    "copy-done", "slice-done", "async-done", "add-dependency", "opt-barrier",
}  # fmt: skip  # these move nothing; of an asynchronous pair the start is counted
OPAQUE = {"while", "conditional", "call"}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?)([a-z][\w\-]*)\((.*)$")


def moved(compiled: Any) -> int:
    """Bytes of one run of a compiled program. ValueError for one with loops or branches: their bodies are not read."""
    return sum(count for _, count in by_instruction(compiled))


def by_instruction(compiled: Any) -> list[tuple[str, int]]:
    """(name, bytes) of every instruction of the program that moves any."""
    shapes, found = {}, []
    for line in _entry(compiled.as_text()):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, result, op, rest = match.groups()
        shapes[name] = 0 if op == "tuple" else _bytes(result)
        if op in OPAQUE:
            raise ValueError(f"traffic: {name} is a {op}; count a program without control flow.")
        if op in FREE:
            continue
        operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
        if op in ("copy-start", "slice-start", "async-start"):  # its result repeats the operand beside the copy
            moved = shapes[name]
        else:
            moved = shapes[name] + sum(shapes[o] for o in operands)
        if moved:
            found.append((name, moved))
    return found


def _entry(text: str) -> list[str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("ENTRY "))
    return lines[start + 1 : next(i for i in range(start, len(lines)) if lines[i].startswith("}"))]


def _closing(text: str) -> int:
    """Where the parenthesis that is open at the start closes."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i
    return len(text)


def _bytes(text: str) -> int:
    """Of all arrays that a type names and that are in main memory."""
    return sum(_array(*match.groups()) for match in _SHAPE.finditer(text))


def _array(dtype: str, dims: str, layout: str | None) -> int:
    """With the padding of its tiles, T(8,128): of the two minor dimensions; 0 for what is kept on the chip, S(1)."""
    bits = 8 if dtype == "pred" else int(re.sub(r"\D.*", "", re.sub(r"^[a-z]+", "", dtype)) or 0)
    sizes = [int(d) for d in dims.split(",") if d]
    order, _, rest = (layout or "").partition(":")
    if re.search(r"S\([1-9]", rest):
        return 0
    if order:
        sizes = [sizes[int(i)] for i in reversed(order.split(",")) if i]
    if tile := re.match(r"T\(([\d,]+)\)", rest):
        units = [int(t) for t in tile.group(1).split(",")]
        sizes = [1] * (len(units) - len(sizes)) + sizes
        for i, t in enumerate(reversed(units), 1):
            sizes[-i] = -(-sizes[-i] // t) * t
    return math.prod(sizes) * bits // 8
