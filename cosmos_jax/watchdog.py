"""A thread that speaks up when nothing moves.

In: a beat whenever the run gets on. Out, when none comes for too long: the Python stacks of all threads, on stderr and
in `workdir/hang-<process>.txt`; again after every further limit; or the end of the process, if so set. It needs the
interpreter, so native code that hangs without letting go of it is not seen.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

from cosmos_jax import dist

HUNG = 75  # exit code after `abort`: a failure that a restart may mend (EX_TEMPFAIL of sysexits.h)


class Watchdog:
    """Use as a context manager; `beat` says what comes next.

    limit: seconds (0: no watchdog); slow: the limit of what compiles or waits for a disk. Each process watches itself:
    when one hangs the others soon wait for it, and the stacks of all show which was first.
    """

    def __init__(self, workdir: Path, limit: float, slow: float, abort: bool = False):
        self.workdir, self.limit, self.slow, self.abort = workdir, limit, max(limit, slow), abort
        self._end = threading.Event()
        self._lock = threading.Lock()
        self.beat("the start", slow=True)

    def beat(self, doing: str, slow: bool = False) -> None:
        now = time.monotonic()
        limit = self.slow if slow else self.limit
        with self._lock:
            self._doing, self._since, self._limit, self._due = doing, now, limit, now + limit

    def __enter__(self) -> Watchdog:
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self.limit / 4)):
            with self._lock:
                now, doing, since, late = time.monotonic(), self._doing, self._since, time.monotonic() > self._due
                if late:
                    self._due = now + self._limit
            if late:
                self._report(doing, now - since)

    def _report(self, doing: str, seconds: float) -> None:
        path = self.workdir / f"hang-{dist.index()}.txt"
        end = "this process ends now" if self.abort else "still waiting"
        text = f"WARNING: nothing has moved for {seconds:.0f} s in {doing}; {end}. All stacks, also in {path}:"
        dist.warn(text)
        faulthandler.dump_traceback(2)
        try:
            with path.open("a") as f:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=f, flush=True)
                faulthandler.dump_traceback(f)
        except OSError as e:  # a full disk must not silence the report
            dist.warn(f"{path} could not be written ({e}).")
        if self.abort:
            os._exit(HUNG)
