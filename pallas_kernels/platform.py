"""What a program is traced for: the device of the mesh that was entered, else of this machine.

Kernels are chosen from this while tracing, never from `jax.devices()`, so that compiling ahead of time for a chip that
is not here chooses as the chip itself would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

_interpreting: Any = False


class Device(NamedTuple):
    platform: str  # cpu | tpu | gpu
    kind: str  # as jax names it: "TPU v5p", "NVIDIA H200"


def device() -> Device:
    """The device that programs are traced for now."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform:
        return Device(_PLATFORM.get(described.platform, described.platform), described.device_kind)
    return Device(_PLATFORM.get(jax.default_backend(), jax.default_backend()), jax.devices()[0].device_kind)


def temporaries(plan: Any) -> int:
    """Bytes of intermediate results on one device. plan: `Compiled.memory_analysis()` of a program traced here.

    libtpu accepts and refuses a program by its peak, and may call more than a whole chip `temp_size` in one that it
    accepts (docs/plan.md). The peak counts arguments, results and the host's memory too; a program that came from
    jax's cache on disk may not know it.
    """
    if device().platform != "tpu" or not plan.peak_memory_in_bytes:
        return plan.temp_size_in_bytes
    host = plan.host_argument_size_in_bytes + plan.host_temp_size_in_bytes
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.peak_memory_in_bytes - host - plan.argument_size_in_bytes - results


_PLATFORM = {"cuda": "gpu", "rocm": "gpu"}
HOPPER = ("H100", "H200", "GH200", "H800", "H20")


@contextlib.contextmanager
def interpreted(how: Any = True) -> Iterator[None]:
    """Inside, kernels of any platform are simulated, on whatever machine: for tests. Programs traced inside stay so.

    how: what `pallas_call(interpret=…)` takes: True, or parameters of a simulator (which looks for races, say).
    """
    global _interpreting
    before, _interpreting = _interpreting, how
    try:
        yield
    finally:
        _interpreting = before


def interpreting() -> Any:
    """False, or how kernels are simulated."""
    return _interpreting


def refusal(flavour: str, device: Device) -> str | None:
    """Why kernels of this flavour, mosaic_tpu or mosaic_gpu, cannot run on `device`; None if they can."""
    if flavour == "mosaic_gpu" and jax.__version_info__ < (0, 11):
        return f"it needs jax ≥ 0.11 (Python ≥ 3.12), here is {jax.__version__}"
    if interpreting():
        return None
    if flavour == "mosaic_tpu" and device.platform != "tpu":
        return f"it needs a TPU, this is {device.kind}"
    if flavour == "mosaic_gpu" and not any(h in device.kind for h in HOPPER):
        return f"it needs a Hopper GPU (sm_90), this is {device.kind}"
    return None
