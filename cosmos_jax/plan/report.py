"""A plan as lines of text.

In: the dict that `make` returns (and that --out stores). Out: lines; every rate that was assumed is among them.
"""

from __future__ import annotations

from collections.abc import Iterator

from cosmos_jax.chips import CHIPS, GIB, GPU_SHARE
from pallas_kernels.check.topology import parse

MEMORY = {
    "parameters": "", "optimiser": "its moments", "average": "of the weights (EMA)", "batch": "",
    "other": "all other arguments, and what their layout pads", "results": "not written over an input",
    "temporaries": "activations, gathered weights, gradients", "code": "",
}  # fmt: skip


def lines(plan: dict) -> Iterator[str]:
    """Top to bottom: what, memory, collectives, roofline, verdict."""
    yield from _head(plan)
    if "memory" in plan:
        yield from _memory(plan)
    if "collectives" in plan:
        yield from _collectives(plan)
    if "roofline" in plan:
        yield from _roofline(plan)
    yield ""
    yield plan["verdict"]
    for fix in plan.get("settings", ()):
        yield f"  {fix}"


def _head(plan: dict) -> Iterator[str]:
    t = parse(plan["topology"])
    joined = (
        f", {t.copies} × {'slices' if t.platform == 'tpu' else 'machines'} over the network" if t.copies > 1 else ""
    )
    mesh = " × ".join(f"{a} {n}" for a, n in plan["mesh"].items() if n > 1) or "one device"
    yield f"{plan['what']} {plan['model']} on {plan['topology']}: {t.chips} chips{joined}"
    yield f"  how        {plan['how']}"
    yield f"  mesh       {mesh} on {plan['devices']} × {plan['kind']}"
    kept = "parameters and optimiser float32" if plan["what"] == "train" else "weights too"
    yield f"  precision  compute {plan['compute']}, {kept}"
    yield f"  attention  {plan['attention'][0]} ({plan['attention'][1]})"
    if "bucket" in plan:
        yield f"  remat      {plan['remat']}, {plan['accumulate']} micro-batch(es)"
        yield f"  packs      {plan['bucket']}"
        yield f"  packing    {plan['packing']}"
    else:
        yield f"  samples    {plan['samples']}"


def _memory(plan: dict) -> Iterator[str]:
    yield ""
    how = "estimated" if plan["analytic"] else "as compiled"
    how = "the sum as the compiler counted it" if plan.get("exhausted") else how
    yield f"memory of one device ({how})"
    for name, size in plan["memory"].items():
        if size > 0 or name == "temporaries":
            yield f"  {name:12} {gib(size)}  {MEMORY.get(name, '')}".rstrip()
    if not plan["analytic"]:
        error = plan["estimated"] / plan["needs"] - 1
        yield f"  by the estimate, which says {gib(plan['estimated']).strip()} ({error:+.0%}), the temporaries are"
    for name, size in plan["estimate"].items():
        if size > 0:
            yield f"    {name:30} {gib(size)}"
    if plan.get("prefill"):
        yield f"  {'prefill':12} {gib(plan['prefill'])}  the captions' program, before this one"
    if plan.get("host"):
        yield f"  {'on the host':12} {gib(plan['host'])}  moments and average, between steps"
    chip = CHIPS[parse(plan["topology"]).family]
    share = "as libtpu says" if chip.wraps else f"{GPU_SHARE:.0%} of {gib(chip.memory).strip()}"
    peak = f"  at its peak {gib(plan['peak']).strip()} are used" if plan.get("peak") and not chip.wraps else ""
    yield f"  {'needs':12} {gib(plan['needs'])}{peak}"
    yield f"  {'has':12} {gib(plan['has'])}  {share}"
    yield f"  {'head-room':12} {gib(plan['has'] - plan['needs'])}"


def _collectives(plan: dict) -> Iterator[str]:
    yield ""
    yield "collectives of one step, for one device"
    if not plan["collectives"]:
        yield "  none"
    for c in plan["collectives"]:
        known = "" if c["sure"] else "  (in a loop of unknown length, counted once)"
        yield (
            f"  {c['kind']:18} {'×'.join(c['axes']) or 'others':10} {c['count']:6}×  {gib(c['wire'])} sent  "
            f"{c['seconds']:8.4f} s over {c['over']}{known}"
        )


def _roofline(plan: dict) -> Iterator[str]:
    r, chip = plan["roofline"], CHIPS[parse(plan["topology"]).family]
    yield ""
    yield f"roofline of one step on one device, at the rates of {chip.source}"
    yield (
        f"  compute      {r['compute']:8.3f} s  {r['executed'] / 1e12:,.1f} TFLOP at {chip.flops / 1e12:,.0f} TFLOP/s"
        f" ({r['model'] / 1e12:,.1f} that the model needs)"
    )
    yield f"  memory       {r['memory']:8.3f} s  {r['bytes'] / 1e9:,.0f} GB at {chip.bandwidth / 1e9:,.0f} GB/s"
    each = "each ICI link" if chip.wraps else "NVLink"
    yield (
        f"  interconnect {r['interconnect']:8.3f} s  at {chip.link / 1e9:.0f} GB/s of {each}, one way; "
        f"{chip.network / 1e9:.2f} GB/s of network"
    )
    yield f"  at least     {r['least']:8.3f} s  if all overlap: {r['limit']} decides; MFU at most {r['mfu_most']:.2f}"
    yield f"  their sum    {r['alone']:8.3f} s  if nothing overlaps; MFU {r['mfu_alone']:.2f}"
    yield "  Expected from data sheets, not measured: no kernel reaches its peak, so a real step takes longer."
    if "per_video" in r:
        yield f"  {r['steps']} steps: at least {r['per_video']:.1f} s for {plan['samples']}"


def gib(size: float) -> str:
    return f"{size / GIB:8.2f} GiB" if abs(size) > GIB / 100 else f"{size / 2**20:8.2f} MiB"
