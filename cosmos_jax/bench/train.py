"""`bench train`: one training step of a few layers on a packed batch, and its share of the matmul peak (MFU).

In: names of workloads. Out: a row for each: seconds of the step that `train` runs (loss, gradients, optimiser,
averages), model TFLOP by `flops.train_step`, and the share of the peak measured in the same run. Weights, media and
noise are random; the loss must come out finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cosmos_jax import flops, state, step
from cosmos_jax.bench import clock, ours, work
from cosmos_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from data_pipelines.packing import Planned, fill, plan, tight_bucket
from data_pipelines.sample import Sample

TRAINED = ("gen", "io/time", "io/vision")  # as configs/nano.py


class Workload(NamedTuple):
    """samples: (text tokens, latents t, h, w) of one packed row."""

    cfg: ModelConfig
    samples: tuple[tuple[int, tuple[int, int, int]], ...]


def _nano(layers: int) -> ModelConfig:
    return ModelConfig(name=f"nano-{layers}", layers=layers, vocab=4096, action_dim=0, sound_dim=0, remat="attn")


SMALL = dataclasses.replace(work.SCALING, remat="attn")
WORKLOADS = {
    **{f"nano-{n}": Workload(_nano(2), ((300, (s.t, s.h, s.w)),)) for n, s in work.SIZES.items()},
    "nano-packed": Workload(_nano(2), ((200, (2, 64, 64)),) * 16),
    "scaled-packed": Workload(SMALL, ((40, (2, 16, 32)),) * 4),
}


def run(names: Sequence[str], repeat: int = 5, say: Callable[[str], None] = print) -> dict:
    """{"machine": …, "rows": [one for each workload]}."""
    machine = clock.machine()
    rows = []
    for name in names:
        rows.append(_row(name, WORKLOADS[name], repeat))
        say(f"{name}: {rows[-1]['step_s'] * 1e3:.1f} ms")
        machine["jax_peak"] = max(machine["jax_peak"], clock.peak())
    for r in rows:
        r["share"] = r["tflops"] * 1e12 / machine["jax_peak"]
    return {"machine": machine | {"repeat": repeat}, "rows": rows}


def batch(w: Workload) -> dict[str, np.ndarray]:
    """One row with all samples, made by the packer."""
    rng, planned = np.random.default_rng(0), []
    for i, (text, shape) in enumerate(w.samples):
        latents = rng.standard_normal((w.cfg.latent_channels, *shape), np.float32)
        task = "text2video" if shape[0] > 1 else "text2image"
        sample = Sample(task=task, prompt=str(text), vision_latents=latents, shift=10.0, sample_id=i)
        planned.append(plan(sample, work.Length(), w.cfg.sequence))
    return fill([planned], _bucket(planned), w.cfg.sequence)


def _bucket(planned: list[Planned]) -> Any:
    """Exactly as large as one row of all of them."""
    one = tight_bucket(planned, rows=1)
    sums = {k: sum(p.size[k] for p in planned) for k in planned[0].size}
    return dataclasses.replace(one, **sums, segments=len(planned))


def _row(name: str, w: Workload, repeat: int) -> dict:
    config = Config(model=w.cfg, data=DataConfig(), optim=OptimConfig(trainable=TRAINED))
    host = batch(w)
    counts = flops.count(host)
    device, run = jax.device_put(host), step.make_train_step(config)
    at, times = state.init(config), []
    for i in range(repeat + 1):
        spent, (at, metrics) = ours.timed(run, at, device)
        if not math.isfinite(float(metrics["loss"])) or not bool(metrics["finite"]):
            raise RuntimeError(f"{name}: the loss is {float(metrics['loss'])}; speed means nothing.")
        if i:  # the first compiles
            times.append(spent)
    seconds = ours.median(times).wall
    total = flops.train_step(w.cfg, counts, train_und=False)
    done = flops.train_step(w.cfg, counts, train_und=False, remat=True)
    return {
        "shape": name, "layers": w.cfg.layers, "samples": len(w.samples), "tokens": counts.und + counts.gen,
        "tflop": total / 1e12, "step_s": seconds, "tflops": total / seconds / 1e12, "recomputed": done / total,
        "loss": float(metrics["loss"]),
    }  # fmt: skip
