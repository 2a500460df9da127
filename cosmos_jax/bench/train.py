"""`bench train`: one training step of a few layers on a packed batch, and its share of the matmul peak (MFU).

In: names of workloads, or a `Config`. Out: a row for each: seconds of the step that `train` runs (loss, gradients,
optimiser, averages), model TFLOP by `flops.train_step`, and the share of the peak measured in the same run: of as many
devices as the mesh has. Weights, media and noise are random; the loss must come out finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cosmos_jax import flops, mesh, optim, shard, state, step
from cosmos_jax.bench import clock, ours, work
from cosmos_jax.config import Config, ModelConfig, OptimConfig
from cosmos_jax.metrics import memory_peak
from cosmos_jax.model import cosmos
from cosmos_jax.plan import packing
from data_pipelines.packing import Planned, fill, plan, tight_bucket
from data_pipelines.sample import Sample
from data_pipelines.schema import Bucket

TRAINED = ("gen", "io/time", "io/vision")  # as configs/nano.py


Samples = tuple[tuple[int, tuple[int, int, int]], ...]  # (text tokens, latents t, h, w) of one packed row


class Workload(NamedTuple):
    """bucket: of the batch; None: one row, exactly as large as the samples."""

    config: Config
    samples: Samples
    bucket: Bucket | None = None


def frozen_text(cfg: ModelConfig) -> Config:
    """Trains what configs/nano.py trains."""
    return Config(model=cfg, optim=OptimConfig(trainable=TRAINED))


def _nano(layers: int) -> Config:
    return frozen_text(
        ModelConfig(name=f"nano-{layers}", layers=layers, vocab=4096, action_dim=0, sound_dim=0, remat="attn")
    )


def _clip(size: str, text: int) -> tuple[int, tuple[int, int, int]]:
    s = work.SIZES[size]
    return text, (s.t, s.h, s.w)


WORKLOADS = {
    **{f"nano-{n}": Workload(_nano(2), (_clip(n, 300),)) for n in work.SIZES},
    "nano-packed": Workload(_nano(2), ((200, (2, 64, 64)),) * 16),
    "nano-32k": Workload(_nano(4), (_clip("480p", 500), *(_clip("256p", 300),) * 4)),  # 30,240 + 1,700 tokens
    "scaled-packed": Workload(frozen_text(dataclasses.replace(work.SCALING, remat="attn")), ((40, (2, 16, 32)),) * 4),
}


def of(config: Config) -> Workload:
    """The step of a config: every row of its bucket holds the samples that `plan` counts for it."""
    p = config.model.patch
    shapes = {packing.tokens(size, p): shape for size, shape in packing.LATENTS.items()}
    samples = packing.pack(config).samples
    return Workload(config, tuple((text, shapes.get(n, (n, p, p))) for text, n in samples), config.data.bucket)


def run(names: Sequence[str], repeat: int = 5, say: Callable[[str], None] = print) -> dict:
    """{"machine": …, "rows": [one for each workload]}."""
    return measure({name: WORKLOADS[name] for name in names}, repeat, say)


def measure(workloads: dict[str, Workload], repeat: int = 5, say: Callable[[str], None] = print) -> dict:
    """The same for any workloads. ConfigError for a mesh that does not fit."""
    machine = clock.machine()
    rows = []
    for name, w in workloads.items():
        rows.append(_row(name, w, repeat))
        say(f"{name}: {rows[-1]['step_s'] * 1e3:.1f} ms")
        machine["jax_peak"] = max(machine["jax_peak"], clock.peak())
    for r in rows:
        r["share"] = r["tflops"] * 1e12 / machine["jax_peak"] / r["devices"]
    return {"machine": machine | {"repeat": repeat}, "rows": rows}


def batch(w: Workload) -> dict[str, np.ndarray]:
    """Every row with all samples, made by the packer."""
    rng, m = np.random.default_rng(0), w.config.model
    rows: list[list[Planned]] = [[] for _ in range(w.bucket.rows if w.bucket else 1)]
    for row in rows:
        for text, shape in w.samples:
            latents = rng.standard_normal((m.latent_channels, *shape), np.float32)
            task = "text2video" if shape[0] > 1 else "text2image"
            number = sum(map(len, rows))
            sample = Sample(task=task, prompt=str(text), vision_latents=latents, shift=10.0, sample_id=number)
            row.append(plan(sample, work.Length(), m.sequence))
    return fill(rows, w.bucket or _bucket(rows[0]), m.sequence)


def _bucket(planned: list[Planned]) -> Any:
    """Exactly as large as one row of all of them."""
    one = tight_bucket(planned, rows=1)
    sums = {k: sum(p.size[k] for p in planned) for k in planned[0].size}
    return dataclasses.replace(one, **sums, segments=len(planned))


def _row(name: str, w: Workload, repeat: int) -> dict:
    config, host, devices = w.config, batch(w), len(jax.devices()) if w.bucket else 1
    if devices == 1:
        return _timed(name, w, host, repeat)
    built = mesh.build(config.mesh)
    mesh.check(config, built)
    with jax.set_mesh(built):
        return _timed(name, w, host, repeat, devices)


def _timed(name: str, w: Workload, host: dict[str, np.ndarray], repeat: int, devices: int = 1) -> dict:
    config, m = w.config, w.config.model
    counts = flops.count(host)
    rows = None if shard.no_mesh() else shard.batch_sharding(jax.sharding.get_mesh())
    device, run = jax.device_put(host, rows), step.make_train_step(config)
    at, times = state.init(config), []
    for i in range(repeat + 1):
        spent, (at, metrics) = ours.timed(run, at, device)
        if not math.isfinite(float(metrics["loss"])) or not bool(metrics["finite"]):
            raise RuntimeError(f"{name}: the loss is {float(metrics['loss'])}; speed means nothing.")
        if i:  # the first compiles
            times.append(spent)
    seconds = ours.median(times).wall
    train_und = optim.reaches_und(config.optim, cosmos.abstract(m))
    total = flops.train_step(m, counts, train_und)
    done = flops.train_step(m, counts, train_und, remat=True)
    return {
        "shape": name, "layers": m.layers, "samples": len(w.samples) * len(host["und_ids"]), "devices": devices,
        "tokens": counts.und + counts.gen, "tflop": total / 1e12, "step_s": seconds,
        "tflops": total / seconds / 1e12, "recomputed": done / total, "loss": float(metrics["loss"]),
        "peak_bytes": memory_peak(),
    }  # fmt: skip
