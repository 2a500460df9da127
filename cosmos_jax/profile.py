"""A profile of a few steps: what the devices and the host did, for XProf or Perfetto.

In: which steps. Out: a directory that `xprof --logdir` opens.
"""

from __future__ import annotations

from pathlib import Path

import jax

from cosmos_jax import dist


class Profile:
    """Traces the steps from the first to the last of `steps`, on the first process. Use as a context manager."""

    def __init__(self, steps: tuple[int, ...], directory: Path):
        """steps: (first, last), or () for none."""
        self.first, self.last = steps or (0, -1)
        self.directory, self._on = directory, False

    def before(self, step: int) -> None:
        """Call it before a step is dispatched. A run that continues in the middle traces what is left."""
        if dist.first() and not self._on and self.first <= step <= self.last:
            jax.profiler.start_trace(self.directory)
            self._on = True

    def ends(self, step: int) -> bool:
        return self._on and step == self.last

    def stop(self) -> str:
        """Write the profile; the last step must be done. Returns a line that says where it is."""
        self._on = False
        jax.profiler.stop_trace()
        return f"Profile of steps {self.first} to {self.last}: {self.directory}"

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_) -> None:
        if self._on:
            self.stop()
