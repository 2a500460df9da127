"""What goes wrong in a worker: a plain module, so that worker processes can import it."""

import dataclasses
import os
import signal
import sys
import time

from data_pipelines.job import Job, Prepare
from data_pipelines.sample import Sample


@dataclasses.dataclass
class Fault:
    """Makes samples as `make` does, until it comes to sample `at`: then it raises, is killed, or hangs."""

    make: object
    what: str
    at: int

    def __call__(self, job: Job) -> Sample:
        if job.sample_id == self.at:
            if self.what == "raise":
                raise OSError("the disk is on fire")
            if self.what == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.make(job)


def fault(prepare: Prepare, what: str, at: int) -> Prepare:
    return dataclasses.replace(prepare, make=Fault(prepare.make, what, at))


def modules(job: Job) -> list[str]:
    """What a worker has imported, besides this."""
    from data_pipelines.toy_world import samples  # noqa: F401  what makes the toy's samples there

    return sorted(sys.modules)


LARGE = 50_000_000


def large(job: Job) -> bytes:
    """More than a pipe holds."""
    return bytes(LARGE)


class Stubborn(Exception):
    """Cannot be unpickled: it wants two arguments."""

    def __init__(self, a, b):
        super().__init__(a)


def untold(job: Job):
    raise Stubborn("no", 1)
