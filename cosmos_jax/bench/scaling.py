"""Do seconds follow the operation count? Our step from 256p-shaped to 720p-shaped sequences.

In: names of sizes, a model of scaled widths. Out: a row for each size: TFLOP, seconds, TFLOP per second, and how far
that rate is from the mean rate of all sizes. Sizes take turns, so that a busy machine is busy for all of them; the
processor's own seconds are given beside the wall's, because they do not count what other processes take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from cosmos_jax import flops
from cosmos_jax.bench import ours, work
from cosmos_jax.config import ModelConfig
from cosmos_jax.precision import Precision

NAMES = ("256p", "480p", "720p")


def run(
    names: Sequence[str] = NAMES, cfg: ModelConfig = work.SCALING, texts: tuple[int, int] = work.TEXTS,
    repeat: int = 2, say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """{"machine": …, "rows": [one for each size]}."""
    precision = Precision()
    load = ours.random(cfg, precision)
    params = load("captions"), load("generator")
    jobs = {n: ours.Ours(cfg, work.job(cfg, work.SIZES[n], texts), precision) for n in names}
    for n in names:
        say(f"{n}: {work.attention(cfg, work.SIZES[n], precision, texts)}")
    times: dict[str, list[ours.Time]] = {n: [] for n in names}
    peaks = []
    for one in jobs.values():
        one.prefill(params[0])
    for i in range(repeat + 1):
        for n, one in jobs.items():
            spent, _ = one.step(params[1])
            peaks.append(ours.peak())
            if i:  # the first step warms up
                times[n].append(spent)
                say(f"{n} step {i}: {spent.wall:.2f} s, {spent.cpu:.2f} processor seconds")
    rows = [_row(n, cfg, texts, ours.median(times[n])) for n in names]
    for unit in ("wall", "cpu"):
        mean = float(np.exp(np.mean([np.log(r[f"{unit}_tflops"]) for r in rows])))
        for r in rows:
            r[f"{unit}_deviation"] = r[f"{unit}_tflops"] / mean - 1
    machine = {"jax_threads": ours.threads(), "device": jax.devices()[0].device_kind, "jax_peak": max(peaks)}
    return {"machine": machine | {"repeat": repeat}, "rows": rows}


def _row(name: str, cfg: ModelConfig, texts: tuple[int, int], spent: ours.Time) -> dict:
    tokens = work.SIZES[name].tokens(cfg)
    parts = flops.denoising(cfg, texts, tokens)[1]
    total = sum(parts.values())
    return {
        "size": name, "tokens": tokens, "tflop": total / 1e12, "attention_share": parts["gen_attention"] / total,
        "wall_s": spent.wall, "cpu_s": spent.cpu, "wall_tflops": total / spent.wall / 1e12,
        "cpu_tflops": total / spent.cpu / 1e12,
    }  # fmt: skip
