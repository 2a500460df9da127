"""SIGTERM: the cluster wants its machine back. Save at a step that all processes agree on, and be gone in time.

In: the signal, to any process. Out: `reached(step)` is True at the same step in all of them. One process notes the time
when the signal comes, even while it compiles; several use jax's preemption service, which passes the notice on through
the coordinator and picks the step after the one that the furthest process is in (no device takes part in it), and the
time counts from there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from cosmos_jax import dist

LATE = 128 + signal.SIGTERM  # exit code when the time was not enough


class Preemption:
    """Use as a context manager around the loop. Outside the main thread SIGTERM is not noticed.

    When `grace` seconds have passed and the block has not been left, `late()` gives the sentence to print and the
    process ends with LATE: what hangs then would be killed anyway.
    """

    def __init__(self, grace: float, late: Callable[[], str]):
        self.grace, self.late = grace, late
        self._noticed = threading.Event()
        self._clock: threading.Timer | None = None
        self._several = dist.count() > 1
        self._served = self._several and jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]

    def reached(self, step: int) -> bool:
        """Is this the step to save and stop at? Every process must ask at every step."""
        if self._served and multihost_utils.reached_preemption_sync_point(step):
            self._notice()
        return self._noticed.is_set()

    def __enter__(self) -> Preemption:
        self._installed = not self._several and threading.current_thread() is threading.main_thread()
        if self._installed:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # Python runs handlers between two instructions of the main thread, which may compile for minutes: the
            # byte that the C handler writes at once wakes a thread instead.
            self._before = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(self._write)
            threading.Thread(target=self._listen, name="preemption", daemon=True).start()
        elif self._several and not self._served:
            dist.warn("SIGTERM will not be noticed: jax_enable_preemption_service is off.")
        return self

    def __exit__(self, *_) -> None:
        if self._clock:
            self._clock.cancel()
        if self._installed:
            handler, wakeup = self._before
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGTERM, handler)
            os.close(self._write)  # ends the thread

    def _listen(self) -> None:
        while received := os.read(self._read, 1):
            if received[0] == signal.SIGTERM:
                self._notice()
        os.close(self._read)

    def _notice(self) -> None:
        if not self._noticed.is_set():
            self._clock = threading.Timer(self.grace, self._leave)
            self._clock.daemon = True
            self._clock.start()
            self._noticed.set()

    def _leave(self) -> None:
        dist.warn(f"WARNING: SIGTERM, and {self.grace:g} s (train.grace) were not enough: {self.late()}")
        os._exit(LATE)
