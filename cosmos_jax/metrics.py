"""What a run tells: a JSONL file always, a progress line on the console, TensorBoard if asked.

In: metrics of a finished step, as host numbers. Out: `workdir/metrics.jsonl`, one row per logged step. The training
loop hands over step N−1 while the device runs step N, so nothing here waits for the device.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

FILE = "metrics.jsonl"


class Recorder:
    """Rates, rows and the progress bar of one run. Use as a context manager.

    Resuming from step `start` first removes the rows of later steps: they are about to be written again.
    """

    def __init__(self, workdir: Path, steps: int, start: int = 0, every: int = 10, tensorboard: bool = False):
        workdir.mkdir(parents=True, exist_ok=True)
        truncate(workdir / FILE, start)
        self.console = Console(soft_wrap=True, highlight=False)
        self.every, self.steps = every, steps
        self._file = (workdir / FILE).open("a", buffering=1)
        self._board = _tensorboard(workdir, start) if tensorboard else None
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("train", total=steps, completed=start, line="compiling")
        self._window = _Window()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self.console.print(text, markup=False)

    def log(self, step: int, values: dict[str, Any], tokens: int, flops: int, waited: float) -> None:
        """Record a finished step (1-based: steps taken).

        values: scalars (NaN ones are left out); tokens: real ones, both streams; flops: the model's own work;
        waited: seconds the loop waited for the batch.
        """
        self._window.add(tokens, flops, waited)
        last = step == self.steps
        if step % self.every and not last:
            self._bar.update(self._task, completed=step)
            return
        row = {name: float(v) for name, v in values.items() if name != "finite"}
        row = {name: v for name, v in row.items() if math.isfinite(v)} | self._window.rates()
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        line = f"loss {row['loss']:.4f}" if "loss" in row else "loss not finite"
        if "tokens_per_second" in row:
            line += f" · {row['tokens_per_second']:,.0f} tokens/s · {row['model_tflops']:.3g} model TFLOP/s"
        self._bar.update(self._task, completed=step, line=line)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self.steps} · {line}")

    def __enter__(self) -> Recorder:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self._file.close()
        if self._board:
            self._board.close()


class _Window:
    """Sums since the last logged row. The clock starts when the first step ends, so compilation is not counted."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._sums = (0, 0, 0.0)

    def add(self, tokens: int, flops: int, waited: float) -> None:
        if self._since is None:
            self._since = time.perf_counter()
        else:
            t, f, w = self._sums
            self._sums = (t + tokens, f + flops, w + waited)

    def rates(self) -> dict[str, float]:
        now, (tokens, flops, waited) = time.perf_counter(), self._sums
        seconds, self._since, self._sums = now - (self._since or now), now, (0, 0, 0.0)
        if not tokens or seconds <= 0:
            return {}
        return {
            "tokens_per_second": tokens / seconds,
            "model_tflops": flops / seconds / 1e12,
            "data_wait": waited / seconds,  # share of the time spent waiting for the loader
        }


def read(workdir: str | Path) -> list[dict[str, float]]:
    """All rows of a run, oldest first; a last line cut short by a kill is skipped."""
    path = Path(workdir) / FILE
    return _rows(path) if path.exists() else []


def truncate(path: Path, start: int) -> None:
    """Drop the rows of steps after `start`, and a torn last line."""
    if not path.exists():
        return
    kept = [row for row in _rows(path) if row["step"] <= start]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if text != path.read_text():
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)


def _rows(path: Path) -> list[dict[str, float]]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _tensorboard(workdir: Path, start: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
