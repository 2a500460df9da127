"""What a run tells: a JSONL file always, a progress line on the console, TensorBoard if asked.

In: metrics of a finished step, as host numbers. Out: `workdir/metrics.jsonl`, one row per logged step. The training
loop hands over step N−1 while the device runs step N, so nothing here waits for the device. With several processes the
first one writes and the others do nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cosmos_jax import dist, integrity
from cosmos_jax.goodput import Clock, Idle

FILE = "metrics.jsonl"


class Recorder:
    """Rates, rows and the progress bar of one run. Use as a context manager.

    Resuming from step `start` first removes the rows of later steps: they are about to be written again.
    """

    def __init__(
        self, workdir: Path, steps: int, start: int = 0, every: int = 10, tensorboard: bool = False,
        peak: float | None = None,
    ):  # fmt: skip
        """peak: FLOP/s of all devices together, for the MFU; None where they are of no known kind."""
        self.first = dist.first()
        self.console = Console(soft_wrap=True, highlight=False, quiet=not self.first)
        self.every, self.steps, self.peak = every, steps, peak
        self._file = Rows(workdir / FILE, start) if self.first else None
        self.clock = Clock(workdir, start, dist.born()) if self.first else Idle()
        self._board = _tensorboard(workdir, start) if tensorboard and self.first else None
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, disable=not (self.first and self.console.is_terminal))
        self._task = self._bar.add_task("train", total=steps, completed=start, line="compiling")
        self._window = _Window()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        with contextlib.suppress(OSError):  # the console may be a file on a disk that is full
            self.console.print(text, markup=False)

    def log(
        self, step: int, values: dict[str, Any], tokens: int, flops: int, waited: float, always: bool = False
    ) -> None:
        """Record a finished step (1-based: steps taken).

        values: scalars (NaN ones are left out); tokens: real ones, both streams; flops: the model's own work;
        waited: seconds the loop waited for the batch; always: also between the steps that are logged.
        """
        if not self._file:
            return
        self._window.add(tokens, flops, waited)
        last = step == self.steps
        if step % self.every and not last and not always:
            self._bar.update(self._task, completed=step)
            return
        row = {name: float(v) for name, v in values.items() if name != "finite"}
        row = {name: v for name, v in row.items() if math.isfinite(v)} | self._window.rates()
        row |= {f"seconds/{part}": x for part, x in self.clock.write(step).items()}
        if self.peak and "model_tflops" in row:
            row["mfu"] = row["model_tflops"] * 1e12 / self.peak
        if (most := memory_peak()) is not None:
            row["peak_memory_gib"] = most / 2**30
        self._file.add({"step": step, **row})
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        line = f"loss {row['loss']:.4f}" if "loss" in row else "loss not finite"
        if "tokens_per_second" in row:
            line += f" · {row['tokens_per_second']:,.0f} tokens/s · {row['model_tflops']:.3g} model TFLOP/s"
        if "mfu" in row:
            line += f" · MFU {row['mfu']:.3f}"
        self._bar.update(self._task, completed=step, line=line)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self.steps} · {line}")

    def sync(self) -> bool:
        """Are all rows so far on the disk? What a full disk refused is tried again with every row."""
        return self._file.sync() if self._file else True

    def __enter__(self) -> Recorder:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self.clock.close()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def memory_peak() -> int | None:
    """Most bytes that the first device of this process has held; None where the backend does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


class Rows:
    """The file of rows. A row that cannot be written waits in memory; a torn one is cut off before the next."""

    def __init__(self, path: Path, start: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate(path, start)
        self.path, self._waiting = path, b""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._size = os.lseek(self._file, 0, os.SEEK_END)

    def add(self, row: dict[str, float]) -> None:
        self._waiting += json.dumps(row).encode() + b"\n"
        self._write()

    def sync(self) -> bool:
        """Write what waits and see it on the disk; False when that cannot be done now."""
        if not self._write():
            return False
        try:
            os.fsync(self._file)
        except OSError as e:
            dist.warn(f"WARNING: {self.path} could not be written ({e.strerror}).")
            return False
        return True

    def close(self) -> None:
        self._write()
        os.close(self._file)

    def _write(self) -> bool:
        try:
            os.ftruncate(self._file, self._size)
            while self._waiting:
                written = os.pwrite(self._file, self._waiting, self._size)
                self._size, self._waiting = self._size + written, self._waiting[written:]
        except OSError as e:
            dist.warn(f"WARNING: {self.path} could not be written ({e.strerror}); its rows wait in memory.")
            return False
        return True


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
        integrity.replace(path, text)


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
