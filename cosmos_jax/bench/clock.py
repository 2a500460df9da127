"""Seconds of small programs, and what the machine can do at most, matmuls and copies, measured in the same run.

In: functions. Out: medians. Programs that are compared take turns, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.bench import ours
from cosmos_jax.config import ConfigError
from pallas_kernels import platform

LEAST = 0.05  # seconds of one measurement: short programs are called several times in a row


class Timed(NamedTuple):
    """A call, and how to wait for what it returned (which is thereby used)."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


def medians(programs: Mapping[str, Timed], repeat: int) -> dict[str, float]:
    """Seconds of one call of each: the median of `repeat` turns. Each is called twice before: compiled, then sized."""
    calls = {}
    for name, p in programs.items():
        p.wait(p.call())
        calls[name] = max(1, round(LEAST / max(_seconds(p, 1), 1e-9)))
    turns = [{name: _seconds(p, calls[name]) for name, p in programs.items()} for _ in range(repeat)]
    return {name: float(np.median([t[name] for t in turns])) for name in programs}


def _seconds(p: Timed, calls: int) -> float:
    """Of one of so many calls in a row; all are queued before the last is waited for."""
    began = time.perf_counter()
    for _ in range(calls):
        out = p.call()
    p.wait(out)
    return (time.perf_counter() - began) / calls


def dtype() -> str:
    """What is timed here: bfloat16 on GPU and TPU, float32 on a CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def machine() -> dict:
    """What is known of the device. ConfigError where kernels would be simulated."""
    if platform.interpreting():
        raise ConfigError("kernels are simulated here, and simulated kernels are never timed.")
    return {"device": jax.devices()[0].device_kind, "dtype": dtype(), "jax": jax.__version__, "jax_peak": peak()}


def peak() -> float:
    """FLOP/s of this device's best matmul, now. Measured again between the rows of a table; the best counts."""
    return ours.peak(dtype(), 2048 if jax.default_backend() == "cpu" else 8192)


def copying(size: int) -> Timed:
    """A copy that reads and writes `size` bytes together."""
    x, copy = jnp.zeros(size // 8, jnp.float32), jax.jit(lambda x: x + 1)
    return Timed(lambda: copy(x))


def error(a, b) -> float:
    """Largest difference over the largest value of b."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())
