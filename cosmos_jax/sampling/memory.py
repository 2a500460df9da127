"""How much memory a compiled program takes, and how much there is.

In: a compiled program, the parameters it gets, devices. Out: bytes of one device.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.platform import temporaries

MEMINFO = Path("/proc/meminfo")


class Memory(NamedTuple):
    """Bytes that one device holds while a program runs."""

    weights: int
    inputs: int  # arguments that are no weights
    results: int  # what is not written over an input
    working: int  # temporaries

    @classmethod
    def of(cls, program: jax.stages.Compiled, params: Any) -> Memory:
        """What the compiler planned for `program`, whose arguments hold `params` (arrays or ShapeDtypeStructs)."""
        plan, weights = program.memory_analysis(), held(params)
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes
        inputs = max(plan.argument_size_in_bytes - weights, 0)
        return cls(weights, inputs, results, temporaries(plan) + plan.generated_code_size_in_bytes)

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        return ", ".join(f"{name} {gib(size)}" for name, size in zip(self._fields, self, strict=True))


def held(tree: Any) -> int:
    """Bytes of arrays (or ShapeDtypeStructs) on one device; shards of one array are equal."""

    def size(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def free_memory() -> int | None:
    """Bytes free on the fullest device that would be used; None where nobody knows.

    Devices of the mesh that has been entered, else the first one. Where a device does not count (CPU), what the
    operating system calls available is shared by the devices.
    """
    mesh = jax.sharding.get_mesh()
    devices = jax.devices()[:1] if mesh.empty else list(mesh.local_devices)
    counts = [d.memory_stats() or {} for d in devices]
    if all("bytes_limit" in c for c in counts):
        return min(c["bytes_limit"] - c.get("bytes_in_use", 0) for c in counts)
    if devices[0].platform != "cpu" or not MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 // len(devices)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
