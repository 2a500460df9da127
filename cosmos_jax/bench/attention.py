"""`bench attention`: each backend of ours, cuDNN and PyTorch, forward and backward, in turn on the same operands.

In: names of packs. Out: a row for each pack, library and pass. Outputs and gradients are compared with `xla` before the
clock starts: RuntimeError beyond `TOLERANCE`, because the speed of a wrong answer means nothing. A pack of several
samples is also held against one sample of as many operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pallas_kernels.attention as kernels
from cosmos_jax.bench import clock, contenders, packs
from cosmos_jax.bench.packs import BACKWARD, PACKS, Pack

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # largest error over the largest value
PASSES = {"forward": 1.0, "backward": BACKWARD}


def run(names: Sequence[str], repeat: int = 5, say: Callable[[str], None] = print) -> dict:
    """{"machine": …, "rows": [one for each pack, library and pass]}."""
    machine = clock.machine()
    here, absent = contenders.names(machine["dtype"])
    for name, why in absent.items():
        say(f"without {name}: {why}")
    rows = []
    for name in names:
        pack = PACKS[name]
        say(f"{name}: {pack.says()}, {pack.operations() / 1e12:.3f} TFLOP forward")
        found = _measure(name, pack, here, machine["dtype"], repeat, say)
        if len(pack.samples) > 1:
            ours = [n for n in here if n in kernels.BACKENDS]
            alone = _measure(f"{name}, one sample", pack.single(), ours, machine["dtype"], repeat, say)
            rate = {(r["library"], r["pass"]): r["tflops"] for r in alone}
            for r in found:
                single = rate.get((r["library"], r["pass"]))
                r["of_single"] = single and r["tflops"] / single
        rows += found
        machine["jax_peak"] = max(machine["jax_peak"], clock.peak())
    for r in rows:
        r["share"] = r["tflops"] * 1e12 / machine["jax_peak"]
    return {"machine": machine | {"repeat": repeat}, "rows": rows}


def _measure(name: str, pack: Pack, here: list[str], dtype: str, repeat: int, say) -> list[dict]:
    x = packs.operands(pack, dtype)
    runners, right, errors = [], None, {}
    for library in here:
        one = contenders.make(library, pack, x)
        results = one.results()
        right = right or results  # xla comes first
        errors[library] = {what: clock.error(results[what], right[what]) for what in right}
        if max(errors[library].values()) > TOLERANCE[dtype]:
            raise RuntimeError(f"{name}: {library} differs from xla, {errors[library]}; its speed means nothing.")
        runners.append(one)
    rows = []
    for what, times in PASSES.items():
        seconds = clock.medians({c.name: getattr(c, what) for c in runners}, repeat)
        for library, spent in seconds.items():
            tflop = times * pack.operations() / 1e12
            rows.append({
                "shape": name, "says": pack.says(), "library": library, "pass": what, "tflop": tflop, "s": spent,
                "tflops": tflop / spent, "ratio": seconds["xla"] / spent, "of_single": None,
                "error": max(errors[library].values()), "errors": errors[library],
            })  # fmt: skip
            say(f"{name} {library} {what}: {spent * 1e3:.2f} ms")
    return rows
