"""What the loop saves and restores: the state, the loader's state of every process, and metrics that agree with them.

In: the last step that is done. Out: a checkpoint, now or as the last act of a run that fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cosmos_jax import dist
from cosmos_jax import state as states
from cosmos_jax.checkpoint import CheckpointError, Checkpoints
from cosmos_jax.config import Config
from cosmos_jax.metrics import Recorder


@dataclasses.dataclass
class Done:
    """The newest step that is whole: model and loader stand at the same batch."""

    step: int
    state: dict
    data: Any  # the loader's state in this process, after the batch of `step`


def start(config: Config, checkpoints: Checkpoints, loader: Any, params: dict | None) -> Done:
    """Continue from the newest sound checkpoint, or begin (around `params` if given)."""
    step = checkpoints.latest()
    if not step:
        return Done(0, states.init(config, params), loader.get_state())
    state, data = checkpoints.restore(states.abstract(config), step, config)
    loader.set_state(_own(data))
    return Done(step, state, loader.get_state())


class Saver:
    """Saves the steps of one run. Several processes must all make the same calls."""

    def __init__(self, config: Config, checkpoints: Checkpoints, recorder: Recorder, loader: Any):
        self.config, self.checkpoints, self.recorder, self.loader = config, checkpoints, recorder, loader

    def save(self, done: Done) -> None:
        """Begin to save a step whose row has been recorded.

        Rows go to the disk first: a checkpoint is never ahead of them, and restoring it drops those ahead of it.
        """
        gathered = dist.gather([self.recorder.sync(), done.data])
        if not all(written for written, _ in gathered):
            dist.warn(f"WARNING: step {done.step} is not saved, as its metrics could not be; training goes on.")
            return
        data, assets = _together(self.loader, [d for _, d in gathered]), getattr(self.loader, "assets", {})
        self.checkpoints.save(done.step, done.state, data, self.config, assets)

    def finish(self, done: Done) -> None:
        """Wait until a step is complete. CheckpointError when it could not be saved."""
        self.checkpoints.wait()
        if self.checkpoints.last != done.step:
            raise CheckpointError(f"Step {done.step} could not be saved, see above; {self.checkpoints.standing()}.")

    def rescue(self, done: Done, settle: Callable[[], None], error: Exception) -> None:
        """Save the last whole step before `error` ends the run, if that can be done; never raises.

        Several processes cannot: the others do not know, and wait for this one inside a step.
        """
        why = f"{type(error).__name__} after step {done.step}"
        if dist.count() > 1:
            dist.warn(f"{why}: not saved, as the other processes cannot be asked; {self.checkpoints.standing()}.")
        elif done.step:
            try:
                settle()
                self.save(done)
                self.finish(done)
                dist.warn(f"{why}: saved. Run the same command to continue.")
            except Exception as e:  # whatever it is, the first error is the one to raise
                reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
                dist.warn(f"{why}: it could not be saved ({reason}); {self.checkpoints.standing()}.")


def _together(loader: Any, data: list[Any]) -> Any:
    """One state for all processes if they have the same or the loader can merge theirs; else that of each."""
    if all(d == data[0] for d in data):
        return data[0]
    return loader.merge(data) if hasattr(loader, "merge") else {"processes": data}


def _own(data: Any) -> Any:
    """This process's loader state."""
    if not (isinstance(data, dict) and set(data) == {"processes"}):
        return data
    if len(data["processes"]) != dist.count():
        raise CheckpointError(
            f"The checkpoint holds the loader states of {len(data['processes'])} processes, each with its own data, "
            f"but {dist.count()} are running; start as many."
        )
    return data["processes"][dist.index()]
