"""One step of a solver in one pass: guidance, the clean latents it implies, the next state, conditions put back.

With v the guided velocity and m = x − sigma·v the clean latent that it predicts, every solver of the project (UniPC,
Euler, the samplers of distilled models) is

    x_c = corrector · (x, corrected, m, older, oldest)        x' = predictor · (x_c, m, older) + noise · ε

with weights made on the host (cosmos_jax/sampling/schedules.py; spec model.md §7.2).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.flow import rows

SIGMA, CORRECTOR, PREDICTOR, NOISE, SCALES = 0, 1, 6, 9, 10  # where the numbers of a step begin


class Updated(NamedTuple):
    x: Any  # where the model is evaluated next
    corrected: Any  # what that was predicted from
    clean: Any  # the clean latent m


def guide(cond, uncond=None, free=None, text=1.0, control=1.0):
    """uncond + text·(c − uncond) with c = free + control·(cond − free); a branch that is None plays no part."""
    if free is not None:
        cond = free + control * (cond - free)
    return cond if uncond is None else uncond + text * (cond - uncond)


def update(
    x, corrected, older, oldest, velocity, row, *, fresh=None, noisy=None, pinned=None, impl: str = "auto"
) -> Updated:
    """The state after one step. All buffers [..., N, P] float32.

    velocity: a buffer, or the branches {"cond", "uncond", "free"} to `guide` (`uncond` and `free` may be missing) with
    the scales row["text"] and row["control"]. row: {"sigma", "corrector" [5], "predictor" [3]} float32, and "noise" if
    the step adds any: then fresh is unit noise like x. noisy (bool), pinned: where noisy is given and False, x becomes
    `pinned`.
    """
    branches = velocity if isinstance(velocity, dict) else {"cond": velocity}
    buffers = {"x": x, "corrected": corrected, "older": older, "oldest": oldest} | branches
    numbers = [row["sigma"], *(row["corrector"][i] for i in range(5)), *(row["predictor"][i] for i in range(3))]
    numbers += [row.get("noise", 0.0), row.get("text", 1.0), row.get("control", 1.0)]
    if "noise" in row:
        buffers["fresh"] = fresh
    if noisy is not None:
        buffers |= {"noisy": noisy, "pinned": pinned}
    return Updated(*rows.run(
        functools.partial(_step, tuple(buffers)), tuple(buffers.values()), numbers=numbers, results=("each",) * 3,
        name="flow_update", impl=rows.choose(impl), interpret=platform.interpreting(),
    ))  # fmt: skip


def _step(names, *args):
    b, n = dict(zip(names, args[:-1], strict=True)), args[-1]
    scales = (n[SCALES], n[SCALES + 1]) if "uncond" in b or "free" in b else ()
    v = guide(b["cond"], b.get("uncond"), b.get("free"), *scales)
    m = b["x"] - n[SIGMA] * v
    corrected = _weigh(n, CORRECTOR, (b["x"], b["corrected"], m, b["older"], b["oldest"]))
    x = _weigh(n, PREDICTOR, (corrected, m, b["older"]))
    if "fresh" in b:
        x = x + n[NOISE] * b["fresh"]
    if "noisy" in b:
        x = jnp.where(b["noisy"], x, b["pinned"])
    return x, corrected, m


def _weigh(weights, first: int, terms: tuple):
    """Σ weights[first + i] · terms[i]."""
    total = weights[first] * terms[0]
    for i in range(1, len(terms)):
        total = total + weights[first + i] * terms[i]
    return total
