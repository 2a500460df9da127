"""What the compilers wrote about the kernels that they made.

In: files that ptxas (through Mosaic GPU) and libtpu dumped. Out: a `Kernel` each. `flags`: how they are asked for it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

BUNDLES = "packed-bundles-post-ra"  # instruction bundles before delay slots are merged (spec kernels.md a.4)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel. Bytes, except counts. None: the compiler of that chip does not say."""

    name: str
    memory: int | None  # shared memory of a block; VMEM of a core
    capacity: int | None  # of which the chip has so much
    spilled: int  # GPU: the larger of bytes stored and loaded by a thread; TPU: slots in VMEM
    spills: str  # the same for a reader
    registers: int | None = None  # GPU: of a thread
    smem: int | None = None  # TPU: lists that were prefetched into scalar memory
    bundles: int | None = None  # TPU: instruction bundles of the whole kernel


def flags(platform: str, dump: Path) -> dict[str, str]:
    """Environment under which a process leaves its statistics in `dump`, which must exist."""
    if platform == "gpu":
        return {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    return {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_pass_label_regex={BUNDLES}"}


def ptxas(text: str) -> list[tuple[str, int, int, int]]:
    """(name, registers, bytes of spill stores, of spill loads) of each entry function in what `ptxas -v` printed."""
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0].removesuffix("_kernel").removesuffix("_mosaic_gpu")
        used = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if not used or not spills:
            raise ValueError(f"ptxas said nothing of the registers and spills of {name}: {part[:200]!r}")
        found.append((name, int(used[1]), int(spills[1]), int(spills[2])))
    return found


def gpu(dump: Path, capacity: int) -> list[Kernel]:
    """Kernels that Mosaic GPU made since `dump` was emptied. capacity: shared memory that a block may have."""
    kernels = []
    for path in sorted(dump.glob("*.ptxas")):
        module = path.with_suffix(".before_layout_inference.txt")
        memory = launched(module.read_text()) if module.exists() else None
        for name, registers, stores, loads in ptxas(path.read_text()):
            kernels.append(Kernel(name, memory, capacity, max(stores, loads), f"{stores}/{loads} B", registers))
    return kernels


def launched(module: str) -> int | None:
    """Bytes of dynamic shared memory in the launch of a Mosaic GPU module."""
    value = re.search(r"dynamic_shared_memory_size (%\w+)", module)
    constant = value and re.search(rf"{re.escape(value[1])} = arith\.constant (\d+) : i32", module)
    return int(constant[1]) if constant else None


def tpu(dump: Path, program: str, smem: dict[str, int]) -> list[Kernel]:
    """Kernels of one TPU program. program: its compiled text. smem: bytes prefetched by each kernel, by its name."""
    reports = [r for path in sorted(dump.glob("*vmem_report.html")) if (r := _report(path.read_text()))]
    kernels = []
    for call in re.findall(r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"', program):
        name = max((n for n in smem if n in call), key=len, default=call)  # calls are named jvp_<name>_.3, say
        used = [r for r in reports if call in r["hlo_breakdowns"]]
        entry = used[-1]["hlo_breakdowns"][call] if used else {"total_size": None, "blocks": []}
        allocations = [a for block in entry["blocks"] for a in block.get("allocations") or ()]
        slots = sum(a["size"] for a in allocations if a.get("tag", "").upper() == "SPILL")
        capacity = used[-1]["global_info"]["vmem_capacity"] if used else None
        spills, bundles = f"{slots / 1024:,.0f} KiB", _bundles(dump, call)
        kernels.append(Kernel(name, entry["total_size"], capacity, slots, spills, smem=smem.get(name), bundles=bundles))
    return kernels


def _report(html: str) -> dict | None:
    """The JSON inside libtpu's report of VMEM."""
    _, found, rest = html.partition("const DATA =")
    return json.JSONDecoder().raw_decode(rest.lstrip())[0] if found else None


def _bundles(dump: Path, call: str) -> int | None:
    files = sorted(
        p for p in dump.glob("*schedule-analysis_*") if re.fullmatch(rf"\d+-{re.escape(call)}-\d+-.*", p.name)
    )
    found = files and re.search(r"total scheduled bundles:\s+(\d+)", files[-1].read_text())
    return int(found[1]) if found else None
