"""Samples prepared elsewhere: worker processes that end with their master, and whose failures are its own.

In: a function Job → Planned. Out: its results, in whatever order they are asked for, computed here or by processes.
A worker that raises, raises here; one that ends is a `WorkerError` here, at once. Nothing is skipped.

Each process has a pipe of its own, whose far end nobody else holds: when it dies, even in the middle of a sample, the
pipe ends. (concurrent.futures shares one pipe among its processes, and waits forever for the rest of such a sample.)
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from data_pipelines.job import Job

Work = Callable[[Job], Any]


class WorkerError(RuntimeError):
    """A worker process ended although nobody asked it to; the message says what to look at."""


class Inline:
    """No processes: the caller computes."""

    count = 0

    def __init__(self, work: Work):
        self._work = work

    def ask(self, job: Job) -> None:
        """Nothing is computed ahead."""

    def get(self, job: Job) -> Any:
        return self._work(job)

    def close(self) -> None:
        """Nothing to end."""


class Pool:
    """`count` processes. They import numpy and what `work` needs, and never a device: no jax, no grain."""

    def __init__(self, work: Work, count: int):
        self.count = count
        self._asked: dict[Job, Future] = {}
        self._jobs: queue.Queue[tuple[Job, Future]] = queue.Queue()
        self._dead: WorkerError | None = None
        self.processes: list[BaseProcess] = []
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of jax's threads
        atexit.register(self.close)
        for i in range(count):
            near, far = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(far, work), name=f"data worker {i}", daemon=True)
            process.start()
            far.close()
            self.processes.append(process)
            threading.Thread(target=self._tend, args=(process, near), daemon=True).start()

    def ask(self, job: Job) -> None:
        """Start on a job; its result is kept until `get` fetches it."""
        if job not in self._asked:
            self._asked[job] = Future()
            self._jobs.put((job, self._asked[job]))

    def get(self, job: Job) -> Any:
        """The result; waits for it. Raises what the worker raised, WorkerError when any worker has ended."""
        if self._dead is not None:
            raise self._dead
        self.ask(job)
        return self._asked.pop(job).result()

    def close(self) -> None:
        """End the processes; what they are doing is lost, whoever waits for it gets an error."""
        atexit.unregister(self.close)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _tend(self, process: BaseProcess, pipe: Connection) -> None:
        """Hand jobs to one process, one at a time. After its end every job taken here is an error."""
        while True:
            job, future = self._jobs.get()
            try:
                pipe.send(job)
                good, result = pipe.recv()
            except (EOFError, OSError):
                process.join(5)
                self._dead = WorkerError(
                    f"The {process.name} (process {process.pid}) ended with exit code {process.exitcode} before it had "
                    f"prepared sample {job.sample_id}; −9 means that it was killed, often because memory ran out (see "
                    "data.workers, data.look_ahead, data.prefetch). No sample was skipped: run the same command to "
                    "continue."
                )
                future.set_exception(self._dead)
            except BaseException as e:  # a result that cannot be unpickled here
                future.set_exception(e)
            else:
                (future.set_result if good else future.set_exception)(result)


def start(work: Work, count: int) -> Inline | Pool:
    """`count` processes; 0 = in the caller. ValueError for fewer."""
    if count < 0:
        raise ValueError(f"data.workers={count} must be 0 (prepare in the training process) or more.")
    return Pool(work, count) if count else Inline(work)


def _serve(pipe: Connection, work: Work) -> None:
    """A worker. Signals are for the master, who decides when to end; without a master there is no work."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    while True:
        job = pipe.recv()
        try:
            answer = pickle.dumps((True, work(job)), pickle.HIGHEST_PROTOCOL)
        except Exception as e:
            answer = _error(e)
        pipe.send_bytes(answer)


def _error(e: Exception) -> bytes:
    """What the master raises: the exception, or its words where it cannot travel; with the trace of the worker."""
    where = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(e))
    except Exception:
        e = RuntimeError(f"{type(e).__name__}: {e}")
    e.add_note(f"In the data worker:\n{where}")
    return pickle.dumps((False, e))


def _end_with(master: Any) -> None:
    master.join()
    os._exit(1)
