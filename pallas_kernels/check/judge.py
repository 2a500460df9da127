"""Is an outcome what its case promises?

In: a `Case` and its `Outcome`. Out: problems in words, and lines of a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pallas_kernels.check.cases import Case
from pallas_kernels.check.program import Outcome
from pallas_kernels.check.topology import platform

HEADER = ("topology", "case", "kernel", "registers", "spills (allowed)", "memory", "seconds")


def problems(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong, a sentence each; empty if all is well."""
    if case.refused:
        if outcome.error is None:
            return ["the compiler accepted it, and it must refuse"]
        return [] if re.search(case.refused, outcome.error) else [f"refused for another reason: {short(outcome.error)}"]
    if outcome.error is not None:
        return [short(outcome.error)]
    allowed = case.spills[platform(outcome.topology)]
    made = [k.name for k in outcome.kernels]
    wrong = [f"there is no kernel {name} in the program" for name in allowed if name not in made]
    wrong += [f"a kernel {name} that the case does not name" for name in made if name not in allowed]
    wrong += [f"the compiler reported nothing of {k.name}" for k in outcome.kernels if k.memory is None]
    for k in outcome.kernels:
        if k.spilled > allowed.get(k.name, 0):
            wrong.append(f"{k.name} spills {k.spills}, {allowed.get(k.name, 0):,} bytes are allowed")
    return wrong


def short(error: str, most: int = 300) -> str:
    """An error in one line."""
    line = " ".join(error.split())
    return line if len(line) <= most else f"{line[:most]} …"


def rows(case: Case, outcome: Outcome) -> list[tuple[str, ...]]:
    """A row for each kernel; the time is of the whole program and stands in the first."""
    seconds, start = f"{outcome.seconds:.1f}", (outcome.topology, outcome.case)
    if outcome.error is not None:
        said = "refused, as it must be" if not problems(case, outcome) else "failed"
        return [(*start, said, "", "", "", seconds)]
    allowed = case.spills[platform(outcome.topology)]
    lines: list[tuple[str, ...]] = []
    for k in outcome.kernels:
        limit = allowed.get(k.name, 0)
        lines.append((
            *start, k.name, "–" if k.registers is None else str(k.registers),
            f"{k.spills} ({limit} B)" if limit < 1024 else f"{k.spills} ({limit / 1024:,.0f} KiB)",
            _memory(outcome.topology, k), seconds,
        ))  # fmt: skip
        seconds = ""
    return lines


def _memory(topology: str, k) -> str:
    if k.memory is None:
        return "not reported"
    of = f"{k.memory / 1024:,.1f} of {k.capacity / 1024:,.0f} KiB"
    if platform(topology) == "gpu":
        return f"{of} shared"
    return f"{of} VMEM" + (f", {k.smem / 1024:,.1f} KiB SMEM" if k.smem else "") + f", {k.bundles:,} bundles"


def line(row: Sequence[str]) -> str:
    """Columns wide enough for what usually stands in them."""
    widths = (12, 34, 24, 9, 24, 62, 7)
    return " ".join(
        text.rjust(w) if i in (3, 6) else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
    )
