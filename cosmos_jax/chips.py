"""What the roofline assumes of a chip, and where each number stands.

In: the family of a topology. Out: a `Chip`: rates of one *device* as jax sees it (half a chip of tpu7x). No jax.

`usable` is measured, not read: of a TPU it is what libtpu 0.0.52 says is available when a program is too large
("exceeds available HBM (95.73G)"); of a GPU it is what XLA may take with XLA_PYTHON_CLIENT_MEM_FRACTION=.92 (jax's
default is .75).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
TPU = "docs.cloud.google.com/tpu/docs"
GPU_SHARE = 0.92  # of a GPU's memory that XLA is told to take


@dataclass(frozen=True)
class Chip:
    """Bytes, bytes/s and FLOP/s of one device. Links count one direction."""

    title: str
    memory: int  # as it is sold
    usable: int  # what one program may have
    flops: float  # dense bfloat16
    bandwidth: float  # of the memory
    link: float  # TPU: one ICI link, of which a chip has two in each dimension; GPU: all of its NVLink
    wraps: int  # TPU: a dimension that is a multiple of this is a ring, not a line; GPU: 0
    network: float  # between slices or machines
    source: str
    halves: bool = False  # jax sees two devices in one chip


def _tpu(title, gib, usable, tflops, gbps, link, wraps, network_gbit, page, halves=False) -> Chip:
    n = 2 if halves else 1
    return Chip(
        title, gib * GIB // n, int(usable * GIB), tflops * 1e12 / n, gbps * 1e9 / n, link * 1e9 / n, wraps,
        network_gbit / 8 * 1e9 / n, f"{TPU}/{page}", halves,
    )  # fmt: skip


def _gpu(title, mib, tflops, gbps, nvlink, network_gbit, source) -> Chip:
    memory = mib * 2**20
    usable = int(memory * GPU_SHARE)
    return Chip(
        title, memory, usable, tflops * 1e12, gbps * 1e9, nvlink * 1e9, 0, network_gbit / 8 * 1e9, source
    )  # fmt: skip


CHIPS = {
    "v4": _tpu("TPU v4", 32, 30.75, 275, 1228, 50, 4, 50, "v4"),
    "v5e": _tpu("TPU v5e", 16, 15.75, 197, 819, 50, 16, 25, "v5e"),
    "v5p": _tpu("TPU v5p", 95, 95.73, 459, 2765, 100, 4, 50, "v5p"),
    "v6e": _tpu("TPU v6e", 32, 31.24, 918, 1638, 100, 16, 100, "v6e"),
    "tpu7x": _tpu("TPU7x, half a chip", 192, 94.74, 2307, 7380, 100, 4, 100, "tpu7x", halves=True),
    "h100": _gpu("NVIDIA H100 SXM", 81_559, 989, 3350, 450, 400, "NVIDIA H100 and DGX H100 data sheets"),
    "h200": _gpu("NVIDIA H200", 143_771, 989, 4800, 450, 400, "NVIDIA H200 and DGX H200 data sheets"),
    "b200": _gpu("NVIDIA B200", 183_359, 2250, 8000, 900, 400, "NVIDIA DGX B200 data sheet"),
}


KINDS = {  # how jax names a device → its chip
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x", "NVIDIA H100": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
}  # fmt: skip


def peak(devices) -> float | None:
    """FLOP/s of all devices (of a mesh) together, dense bfloat16; None where their kind is not known, as a CPU's."""
    kind = devices.flat[0].device_kind
    name = KINDS.get(kind) or next((chip for k, chip in KINDS.items() if "NVIDIA" in k and kind.startswith(k)), None)
    return devices.size * CHIPS[name].flops if name else None
