"""Several processes that train as one: how they find each other, and tell each other small things.

In: the environment of the launcher. Out: `jax.devices()` of all of them, in each. Importing this touches no device.

    --distributed    Slurm, Open MPI, GKE and TPU pods tell jax all it needs; anywhere else, for each process,
                     JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cosmos_jax.config import ConfigError

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LAUNCHERS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}  # variable that counts processes → its owner


def _born() -> float:
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.time()
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


_BORN = _born()


def start(distributed: bool) -> None:
    """Join the other processes; call it before anything asks for a device. Once is enough, a second call does nothing.

    Raises ConfigError: a launcher started several processes and `distributed` is not set (each would train alone, in
    the same directory), or they cannot be found.
    """
    if not distributed:
        for name, launcher in LAUNCHERS.items():
            if int(os.environ.get(name, "1")) > 1:
                raise ConfigError(
                    f"{launcher} started {os.environ[name]} processes, which would train one by one; add --distributed."
                )
        if given := [n for n in BY_HAND if n in os.environ]:
            raise ConfigError(f"{given[0]} is set, but --distributed is not given; add it, or unset the variable.")
        return
    if jax.distributed.is_initialized():
        return
    given = [n for n in BY_HAND if n in os.environ]
    if given and len(given) < len(BY_HAND):
        lacking = ", ".join(n for n in BY_HAND if n not in given)
        raise ConfigError(f"--distributed: {', '.join(given)} is set, but not {lacking}; set all three or none.")
    try:
        if given:
            address, count, index = (os.environ[n] for n in BY_HAND)
            jax.distributed.initialize(address, int(count), int(index))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"--distributed: the processes did not find each other ({str(e).strip()}).") from e


def index() -> int:
    """This process, 0 … `count` − 1."""
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def born() -> float:
    """When this process began: seconds since 1970. Linux; elsewhere, when this file was imported."""
    return _BORN


def first() -> bool:
    """Is this the process that writes what there is one of: metrics, reports, lines for a person?"""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """The value (JSON) of every process, in order of `index`, in all of them. All must call it at the same point."""
    if count() == 1:
        return [json.loads(json.dumps(value))]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def lead(work: Callable[[], Any]) -> Any:
    """Let process 0 do something that the others must wait for; returns its result (JSON) in all of them.

    What it raises is raised in the others as a ValueError. All must call it at the same point.
    """
    told, error = {}, None
    if first():
        try:
            told = {"value": work()}
        except Exception as e:  # told first: nobody may wait for a process that is gone
            told, error = {"error": f"process 0: {e}"}, e
    told = gather(told)[0]
    if error is not None:
        raise error
    if "error" in told:
        raise ValueError(told["error"])
    return told["value"]


def warn(text: str) -> None:
    """A line on stderr that no process keeps to itself."""
    name = f"process {index()}: " if count() > 1 else ""
    with contextlib.suppress(OSError):  # stderr may be a file on the very disk that is full
        print(f"cosmos_jax: {name}{text}", file=sys.stderr, flush=True)
