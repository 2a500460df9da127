"""Where the time of a run went, across restarts.

In: the phases that the loop goes through. Out: `workdir/time.jsonl`, which only ever grows, and `account`, its sum:
every second between the first start and the last line belongs to exactly one of `PARTS`.

    {"start": seconds since 1970, "step": 40, "before": 12.1}   a process begins after step 40; 12.1 s since it was made
    {"time": seconds since 1970, "from": 40, "to": 50, "seconds": {"data": 0.2, "step": 31.0, …}}
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

from cosmos_jax import dist

FILE = "time.jsonl"
PARTS = {
    "step": "steps that count: the goodput",
    "data": "waiting for the loader",
    "save": "waiting for checkpoints",
    "sample": "drawing samples",
    "compile": "the first step of each process, compilation included",
    "start": "starting processes, restoring",
    "lost": "steps taken again after a restart",
    "down": "no process, or one that died before it wrote",
}


class Clock:
    """Adds up seconds by phase. Exactly one phase is on at any time."""

    def __init__(self, workdir: Path, step: int, born: float | None = None):
        """born: `time.time()` when the process began (default: now)."""
        self._origin = time.time() - time.perf_counter()
        self._now, self._phase = self._time(), "start"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._from = step
        self._file = (workdir / FILE).open("ab", buffering=0)
        self._write({"start": self._now, "step": step, "before": max(self._now - born, 0.0) if born else 0.0})

    def phase(self, name: str) -> None:
        """What follows is `name`, one of PARTS."""
        if name not in PARTS:
            raise ValueError(f"{name!r} is not one of {', '.join(PARTS)}.")
        now = self._time()
        self._seconds[self._phase] += now - self._now
        self._now, self._phase = now, name

    def write(self, step: int) -> dict[str, float]:
        """A line: the seconds since the last one, which led to `step`. Returns them."""
        self.phase(self._phase)
        seconds = dict(self._seconds)
        self._write({"time": self._now, "from": self._from, "to": step, "seconds": seconds})
        self._from = step
        self._seconds.clear()
        return seconds

    def close(self) -> None:
        self._file.close()

    def _time(self) -> float:
        """Seconds since 1970 that never go back, whatever is done to the machine's clock meanwhile."""
        return self._origin + time.perf_counter()

    def _write(self, row: dict) -> None:
        """A line that a full disk refuses is lost, and said so: its seconds count as `down`."""
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
        except OSError as e:
            dist.warn(f"WARNING: {FILE} could not be written ({e.strerror}); the goodput will lack some seconds.")


class Idle:
    """The clock of a process that is not the first."""

    def phase(self, name: str) -> None: ...

    def write(self, step: int) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def account(workdir: str | Path) -> dict[str, float]:
    """Seconds of each of PARTS, and "wall", their sum. {} for a run without lines.

    A line that went further than the next process began is lost from there on, in proportion to its steps.
    """
    path = Path(workdir) / FILE
    rows = [row for line in path.read_text().splitlines() if (row := _read(line))] if path.exists() else []
    if not rows:
        return {}
    spent = dict.fromkeys(PARTS, 0.0)
    end = rows[0]["start"] - rows[0]["before"]
    kept = float("inf")  # no later process began before this step
    begins: list[float] = []
    for row in reversed(rows):
        begins.append(kept)
        kept = min(kept, row["step"]) if "start" in row else kept
    first = end
    for row, next_start in zip(rows, reversed(begins), strict=True):
        if "start" in row:
            began = row["start"] - row["before"]
            spent["down"] += max(began - end, 0.0)
            spent["start"] += row["start"] - max(began, end)
            end = row["start"]
            continue
        steps = row["to"] - row["from"]
        share = min(max(next_start - row["from"], 0) / steps, 1.0) if steps else 1.0
        for part, seconds in row["seconds"].items():
            lost = seconds * (1.0 - share) if part in ("step", "data") else 0.0
            spent[part] += seconds - lost
            spent["lost"] += lost
        spent["down"] += max(row["time"] - end - sum(row["seconds"].values()), 0.0)
        end = row["time"]
    return spent | {"wall": end - first}


def describe(spent: dict[str, float]) -> str:
    """One line: the goodput, and where the rest went."""
    share = {part: spent[part] / spent["wall"] for part in PARTS}
    rest = ", ".join(f"{part} {x:.1%}" for part, x in share.items() if part != "step" and x >= 0.0005)
    return f"goodput {share['step']:.1%} of {spent['wall']:,.0f} s since the first start" + (
        f" ({rest})" if rest else ""
    )


def _read(line: str) -> dict | None:
    """None for a line that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
