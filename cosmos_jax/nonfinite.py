"""What happens when a loss or gradient is not a finite number, or suddenly large.

In: the metrics of each step. `finite` was computed inside the step from sums over all devices (step.py, which also left
the state untouched), so every process sees the same value and decides the same. Out: the run stops, or goes on without
that batch; either way `workdir/bad_batch.json` names the samples of every process. A loss far above its running median
is a warning and nothing more.
"""

from __future__ import annotations

import collections
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cosmos_jax import dist, integrity
from cosmos_jax.config import TrainConfig

BAD_BATCH = "bad_batch.json"
ENOUGH = 8  # losses before a median means anything


class NonFiniteLoss(RuntimeError):
    """A batch gave a loss or gradient that is not a finite number; the message names the batch."""


def identity(batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Which samples a batch holds (this process's rows), and their rows in the task table."""
    real = batch["segment_sample_id"] >= 0
    return {"sample_ids": batch["segment_sample_id"][real].tolist(), "tasks": batch["segment_task"][real].tolist()}


class Guard:
    """Judges one finished step after the other."""

    def __init__(self, config: TrainConfig, workdir: Path, say: Callable[[str], None]):
        self.config, self.workdir, self.say = config, workdir, say
        self._skipped = 0  # in a row
        self._losses: collections.deque[float] = collections.deque(maxlen=config.spike_window)

    def spike(self, step: int, loss: float) -> dict[str, float]:
        """{"spike": loss / median} when that is more than train.spike; for the row in metrics.jsonl."""
        if not self.config.spike or not math.isfinite(loss):
            return {}
        median = statistics.median(self._losses) if len(self._losses) >= min(ENOUGH, self.config.spike_window) else 0.0
        self._losses.append(loss)
        if not median or loss <= self.config.spike * median:
            return {}
        self.say(f"WARNING: loss {loss:.4f} of step {step} is {loss / median:.1f} times the median of the last ones.")
        return {"spike": loss / median}

    def finite(self, step: int, values: dict, batch: dict[str, list[int]]) -> None:
        """Do nothing, skip, or stop. All processes must call it; batch: `identity` of this process's rows.

        Raises NonFiniteLoss: train.on_nonfinite is "stop", or train.skip_limit batches in a row were skipped.
        """
        if values["finite"]:
            self._skipped = 0
            return
        self._skipped += 1
        stop = self.config.on_nonfinite == "stop" or self._skipped > self.config.skip_limit
        processes = [{"process": i} | rows for i, rows in enumerate(dist.gather(batch))]
        if dist.first():
            self._write(step, values, processes, "stop" if stop else "skip")
        ids = [i for rows in processes for i in rows["sample_ids"]]
        named = f"{', '.join(map(str, ids[:8]))}{' …' if len(ids) > 8 else ''}"
        gave = f"Step {step} gave loss {values['loss']} and gradient norm {values['grad_norm']}"
        where = f"samples {named} (all of them in {self.workdir / BAD_BATCH})"
        if not stop:
            self.say(f"WARNING: {gave}: skipped ({self._skipped} in a row), the state is as before; look at {where}.")
            return
        limit = f" after {self.config.skip_limit} skipped ones" if self.config.on_nonfinite == "skip" else ""
        raise NonFiniteLoss(
            f"{gave}{limit}: look at {where}; the parameters were not touched and the last checkpoint is intact."
        )

    def _write(self, step: int, values: dict, processes: list[dict], action: str) -> None:
        path = self.workdir / BAD_BATCH
        batches = json.loads(path.read_text())["batches"] if path.exists() else []
        numbers = {name: repr(float(values[name])) for name in ("loss", "grad_norm")}
        new = {"step": step, "action": action, **numbers, "processes": processes}
        batches = [b for b in batches if b["step"] != step] + [new]
        integrity.replace(path, json.dumps({"batches": batches}, indent=1) + "\n")
