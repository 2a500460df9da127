"""The collectives of a compiled program, read from its text.

In: `Compiled.as_text()` (HLO of libtpu, of XLA for GPU or CPU) and the shape of the mesh. Out: a `Collective` for each,
with how often it runs: the body of a loop counts as often as the loop turns. XLA's own cost analysis counts it once.

What a compiler does to them is undone here: an asynchronous one that libtpu has spread over several fusions is one
(they share their channel); an all-reduce inside a fusion named `all-reduce-scatter` is a reduce-scatter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = "slices"
BITS = {"token": 0, "pred": 8, "f8e4m3fn": 8, "f8e5m2": 8}  # else the digits of the type's name
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One instruction. bytes: the whole array, as it is where it is whole, on one device, each time it runs."""

    kind: str
    bytes: int
    axes: tuple[str, ...]  # of the mesh; () where its groups are not made of axes
    group: int  # devices that take part with each other
    times: int
    where: str  # op_name: the line of the model
    sure: bool = True  # False: inside a loop whose number of turns is unknown, counted once

    @property
    def wire(self) -> float:
        """Bytes that one device sends (and receives) each time, at the least."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str


def collectives(text: str, mesh: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """Every collective that one run of the program does, the most bytes first.

    mesh: axis → size, in the mesh's order. What libtpu hands to the network between slices has the axis `SLICES`.
    """
    computations, entry = _read(text)
    found: dict[tuple, Collective] = {}
    for instruction, times, path, sure, owner in _walk(computations, entry, 1, "", True):
        one = _network(instruction, slices) or _collective(instruction, owner, mesh)
        if one is None or one.group == 1:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        alone = owner == entry or path.endswith(f"/{owner}") or not channel
        key = (one.kind, one.bytes, f"{owner}/{instruction.name}" if alone else channel[1], path)
        found.setdefault(key, replace(one, times=times, sure=sure))
    return sorted(found.values(), key=lambda c: -c.times * c.wire)


def _read(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (found := _LINE.match(line)):
            computations[current].append(_Instruction(*found.group(2, 3, 4, 5)))
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation.")
    return computations, entry


def _walk(computations, name: str, times: int, path: str, sure: bool) -> Iterator[tuple]:
    """(instruction, how often it runs, the loops around it, is that known, its computation)."""
    for i in computations.get(name, ()):
        yield i, times, path, sure, name
        if i.op == "while":
            body, condition = (re.search(rf"{k}=%?([\w.\-]+)", i.rest)[1] for k in ("body", "condition"))
            turns = _turns(i.rest, computations, condition)
            inside = times * (turns or 1), f"{path}/{i.name}/{body}", sure and turns is not None
            yield from _walk(computations, body, *inside)
        elif i.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            called = re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLS.findall(i.rest)
            for c in called:  # no collective of the project is in a branch; if one were, it would count in each
                yield from _walk(computations, c, times, path, sure)
        elif i.op in ("fusion", "call", "async-start") or i.op.endswith("-start"):
            for c in _CALLS.findall(i.rest):
                yield from _walk(computations, c, times, path, sure)


def _turns(rest: str, computations, condition: str) -> int | None:
    """How often a loop turns: what XLA says, else the bound of a counter that starts at 0."""
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', rest):
        return int(known[1])
    lines = computations.get(condition, ())
    less = [i for i in lines if i.op == "compare" and "direction=LT" in i.rest]
    for i in lines:  # GPU and CPU wrap the comparison
        if i.op == "fusion":
            less += [j for c in _CALLS.findall(i.rest) for j in computations.get(c, ()) if "direction=LT" in j.rest]
    bounds = [i.rest.split(")")[0] for i in lines if i.op == "constant" and i.shape.startswith("s32[]")]
    return int(bounds[0]) if len(less) == 1 and len(bounds) == 1 else None


def _collective(i: _Instruction, owner: str, mesh: Mapping[str, int]) -> Collective | None:
    kind = i.op.removesuffix("-start")
    if kind not in KINDS:
        return None
    axes, group = _group(i.rest, mesh)
    started, size = i.op != kind, _bytes(i.shape)
    if kind in ("all-gather", "reduce-scatter") and started:
        size = size * group // (group + 1)  # a pair: part and whole
    if kind == "collective-permute" and started:
        size = max(_sizes(i.shape))  # (in, out, contexts)
    if kind == "reduce-scatter" and not started:
        size *= group  # the result is a part
    if kind == "all-reduce" and owner.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    where = re.search(r'op_name="([^"]*)"', i.rest)
    return Collective(kind, size, axes, group, 1, where[1] if where else "")


def _network(i: _Instruction, slices: int) -> Collective | None:
    """Between slices libtpu receives from its own runtime, `megascale`, what the collective says it is."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
    if i.op != "recv" or not kind:
        return None
    name = kind[1].lower().replace("_", "-")
    return Collective(name if name in KINDS else "collective-permute", max(_sizes(i.shape)), (SLICES,), slices, 1, "")


def _sizes(shape: str) -> list[int]:
    found = []
    for dtype, dims in _SHAPE.findall(shape):
        bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+$", dtype)[0])
        found.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return found


def _bytes(shape: str) -> int:
    return sum(_sizes(shape))


def _group(rest: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """(axes, devices) of a collective's groups, in any of the ways in which HLO writes them."""
    everyone = math.prod(mesh.values())
    if named := re.search(r"(?:replica_groups|source_target_pairs)=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        members = _named(named[1], named[2])
        return _axes(members, mesh), len(members)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = [int(d) for d in iota[3].split(",")]
        order = [int(d) for d in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        return _axes([_iota(k, dims, order) for k in range(int(iota[2]))], mesh), int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        members = [int(d) for d in listed[1].split(",")]
        return _axes(members, mesh), len(members)
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest):
        members = [int(d) for p in re.findall(r"\{(\d+),(\d+)\}", pairs[1])[:1] for d in p]
        axes = _axes(members, mesh)
        return axes, math.prod(mesh[a] for a in axes) if axes else len(members)
    return tuple(a for a, n in mesh.items() if n > 1), everyone


def _named(axes: str, taken: str) -> list[int]:
    """Devices of the first group of mesh['a'=4,'b'=2] {'b'}: those that differ in b (or in a part of it, 'b':(1)2)."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
    steps, step = {}, 1
    for name in reversed(sizes):
        steps[name], step = step, step * sizes[name]
    members = [0]
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", taken):
        n = int(part or sizes[name])
        stride = steps[name] * (sizes[name] // (int(before or 1) * n))
        members = [m + k * stride for m in members for k in range(n)]
    return members


def _iota(k: int, dims: list[int], order: list[int]) -> int:
    """Element k of iota(prod(dims)).reshape(dims).transpose(order), flattened."""
    index = dict.fromkeys(order, 0)
    for d in reversed(order):
        k, index[d] = divmod(k, dims[d])
    flat = 0
    for d, n in enumerate(dims):
        flat = flat * n + index[d]
    return flat


def _axes(members: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which devices (numbers in the mesh's order) differ; () if they are not all of such a block."""
    places = []
    for m in members:
        place: dict[str, int] = {}
        for axis in reversed(list(mesh)):
            m, place[axis] = divmod(m, mesh[axis])
        places.append(place)
    return tuple(a for a in mesh if len({p[a] for p in places}) > 1)
