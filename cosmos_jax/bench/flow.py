"""`bench flow`: the operations of flow matching, XLA against a kernel, in bytes per second of what they must move.

In: sizes of video. Out: a row for each operation: its least bytes, the rate at which each implementation moves them,
and its share of the rate of a copy of as many bytes, timed in turn with them. The two results are compared before the
clock starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.bench import clock, work
from cosmos_jax.config import ModelConfig
from pallas_kernels import flow
from pallas_kernels.flow import programs

TOLERANCE = 1e-5  # float32 on every device
SIZES = {f"nano-{n}": size.tokens(ModelConfig()) for n, size in work.SIZES.items()}


def run(names: Sequence[str], repeat: int = 5, say: Callable[[str], None] = print) -> dict:
    """{"machine": …, "rows": [one for each size and operation]}."""
    machine = clock.machine() | {"dtype": "float32"}
    kernel = _kernel()
    if kernel is None:
        say(f"without a kernel: none for {machine['device']}")
    rows = []
    for name in names:
        for operation in programs.programs():
            rows.append(_row(name, operation, kernel, repeat))
            say(f"{name} {operation}: {rows[-1]['xla_s'] * 1e3:.3f} ms")
    return {"machine": machine | {"repeat": repeat}, "rows": rows}


def _kernel() -> str | None:
    """The implementation beside XLA that runs here."""
    for impl in flow.IMPLS:
        try:
            if impl != "xla":
                return flow.choose(impl)
        except ValueError:  # says why it cannot run here, which is not asked
            continue
    return None


def _row(name: str, operation: str, kernel: str | None, repeat: int) -> dict:
    built = {impl: programs.programs(SIZES[name], impl=impl)[operation] for impl in ("xla", kernel) if impl}
    arguments = _draw(built["xla"][1])
    ready = {impl: jax.jit(function) for impl, (function, _) in built.items()}
    results = {impl: jax.tree.leaves(f(*arguments)) for impl, f in ready.items()}
    worst = max(clock.error(a, b) for r in results.values() for a, b in zip(r, results["xla"], strict=True))
    if worst > TOLERANCE:
        raise RuntimeError(f"{name} {operation}: {kernel} differs from xla by {worst:.1e}; its speed means nothing.")
    timed = {impl: clock.Timed(functools.partial(f, *arguments)) for impl, f in ready.items()}
    least = programs.least(*built["xla"])
    seconds = clock.medians(timed | {"copy": clock.copying(least)}, repeat)
    row = {
        "shape": name,
        "operation": operation,
        "tokens": SIZES[name],
        "bytes": least,
        "error": worst,
        "kernel": kernel,
    }
    for what, impl in (("copy", "copy"), ("xla", "xla"), ("kernel", kernel)):
        spent = seconds.get(impl)
        row |= {f"{what}_s": spent, f"{what}_rate": spent and least / spent}
        row[f"{what}_share"] = spent and seconds["copy"] / spent
    return row | {"ratio": kernel and seconds["xla"] / seconds[kernel]}


def _draw(shapes: tuple) -> tuple:
    """Random numbers, and truths that are mostly true, on the device."""
    rng = np.random.default_rng(0)

    def one(x):
        made = rng.random(x.shape, np.float32)
        return jnp.asarray(made < 0.9 if x.dtype == bool else made)

    return jax.tree.map(one, shapes)
