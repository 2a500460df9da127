"""Our denoising step against diffusers', both in this process, step by step in turn.

In: names of sizes, a model to draw at random. Out: a row of numbers for each size. The outputs are compared, so that
nothing fast and wrong is reported: RuntimeError beyond `VELOCITY` or `LATENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from cosmos_jax import flops
from cosmos_jax.bench import ours, work
from cosmos_jax.config import ModelConfig
from cosmos_jax.precision import Precision

VELOCITY, LATENTS = 1e-5, 1e-5  # relL2: of either branch before guidance at step 0; after each step on one's own
Say = Callable[[str], None]


def run(
    names: Sequence[str], cfg: ModelConfig = work.VERSUS, texts: tuple[int, int] = work.TEXTS, repeat: int = 3,
    say: Say = print,
) -> dict:  # fmt: skip
    """{"machine": …, "rows": [one for each size]}. The first step of each side warms up and is not timed."""
    from cosmos_jax.parity import speed  # torch, only when it is asked for

    them = speed.Diffusers(cfg)
    params = jax.tree.map(jax.numpy.asarray, them.params())
    say(f"{cfg.name}: a random checkpoint of {them.bytes / 1e6:.0f} MB, float32 on both sides")
    rows = [_size(name, cfg, texts, repeat, them, params, say) for name in names]
    machine = {"jax_threads": ours.threads(), "torch_threads": them.threads, "device": jax.devices()[0].device_kind}
    peaks = {"jax_peak": max(ours.peak() for _ in range(3)), "torch_peak": max(speed.peak() for _ in range(3))}
    return {"machine": machine | peaks, "rows": rows}


def _size(name, cfg, texts, repeat, them, params, say) -> dict:
    size = work.SIZES[name]
    job = work.job(cfg, size, texts)
    us = ours.Ours(cfg, job, Precision())
    say(f"{name}: {work.attention(cfg, size, Precision(), texts)}")
    ids = [b["und_ids"][b["und_segment_ids"] == 0] for b in (job.batch, job.uncond)]
    sigmas, noise = job.schedule.sigmas[:-1].astype(np.float64), job.noise["vision"][0][us.real]
    them.start(ids, (size.t, size.h, size.w), noise, sigmas)
    prefills = [us.prefill(params) for _ in range(2)]
    velocities = us.velocities(params)
    (_, mine), (_, want, latents) = us.step(params), them.step(job.guidance.text)
    velocity = [relative(a, b) for a, b in zip(velocities, want, strict=True)]
    worst, times, seconds = relative(mine, latents), [], []
    for i in range(repeat):
        spent, mine = us.step(params)
        other, _, latents = them.step(job.guidance.text)
        worst = max(worst, relative(mine, latents))
        times.append(spent)
        seconds.append(other)
        say(f"{name} step {i + 1}: {spent.wall:.2f} s, diffusers {other:.2f} s")
    if max(velocity) > VELOCITY or worst > LATENTS:
        raise RuntimeError(f"{name}: relL2 of velocities is {velocity}, of latents {worst:.1e}; speed means nothing.")
    read, step = (sum(parts.values()) for parts in flops.denoising(cfg, texts, size.tokens(cfg)))
    prefill, mine_s, theirs = min(prefills).wall, ours.median(times).wall, float(np.median(seconds))
    share, best = prefill / job.schedule.steps, min(t.wall for t in times)
    amortised, fastest = mine_s + share, min(seconds) / (best + share)
    return {
        "size": name, "says": size.says, "tokens": size.tokens(cfg), "texts": list(texts),
        "steps": job.schedule.steps, "repeat": repeat, "compile_s": us.compiling.wall, "prefill_s": prefill,
        "step_s": mine_s, "amortised_s": amortised, "diffusers_s": theirs, "ratio": theirs / amortised,
        "fastest_s": best, "diffusers_fastest_s": min(seconds), "fastest_ratio": fastest,
        "tflop": step / 1e12, "diffusers_tflop": (read + step) / 1e12, "tflops": step / mine_s / 1e12,
        "diffusers_tflops": (read + step) / theirs / 1e12, "velocity_rel": velocity, "latents_rel": worst,
    }  # fmt: skip


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
