"""The table of published sizes, on whatever accelerator this is: `bench generate --accelerator`.

In: a full-size model and video VAE, random weights drawn on the device in bfloat16. Out: for each size: steps, shift,
guidance; compile time; fixed time (captions, decoding); seconds of all steps; the sum; beside it, vLLM-Omni's. Every
program is compiled, and its memory compared with what is free, before any weight is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cosmos_jax import flops
from cosmos_jax.bench import ours, work
from cosmos_jax.codecs.wan import params as wan_params
from cosmos_jax.codecs.wan.codec import WanCodec
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.config import ConfigError, ModelConfig
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import engine, schedules
from cosmos_jax.sampling.generate import Job

NAMES = ("256p", "480p", "720p", "t2i")
WAN, HALF = WanConfig(), Precision("bfloat16")  # as published
# One H200, Nano, bfloat16, from the request to the result (vLLM-Omni's published table); and the time of the same
# operations without recomputed text at 740 TFLOP/s, which no exact bfloat16 program can beat by much.
VLLM_OMNI = {"256p": 6.79, "480p": 58.1, "720p": 208.4, "t2i": 2.60}
LIMIT = {"256p": 4.8, "480p": 45.8, "720p": 166.6, "t2i": 1.4}


@dataclasses.dataclass
class Planned:
    """A size whose programs are compiled and fit."""

    name: str
    job: Job
    engine: engine.Engine
    compile_s: float


def plan(name: str, cfg: ModelConfig, texts: tuple[int, int], precision: Precision, free: int | None) -> Planned:
    """Compile; ConfigError, one sentence, where the device's memory does not suffice. free: bytes, None = measure."""
    job = work.job(cfg, work.SIZES[name], texts)
    spent, made = ours.timed(lambda: engine.build(ours.abstract(cfg, precision), cfg, job, precision=precision))
    try:
        made.check(free=free)
    except ValueError as e:
        raise ConfigError(f"bench generate, {name} ({work.SIZES[name].says}): {e}") from e
    return Planned(name, job, made, spent.wall)


def run(
    cfg: ModelConfig, names: Sequence[str] = NAMES, texts: tuple[int, int] = work.TEXTS, wan: WanConfig = WAN,
    precision: Precision = HALF, free: int | None = None, say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """{"machine": …, "rows": [one for each size]}. Nothing is timed before a shorter run of the same programs."""
    plans = []
    for name in names:
        plans.append(plan(name, cfg, texts, precision, free))
        say(f"{name}: compiled in {plans[-1].compile_s:.1f} s; {plans[-1].engine.check(free=free)}")
        say(f"{name}: {work.attention(cfg, work.SIZES[name], precision, texts)}")
    load = ours.random(cfg, precision)
    captions = load("captions")
    read = {p.name: [ours.timed(p.engine.prefill, captions, p.job) for _ in range(2)][1] for p in plans}
    del captions  # before the generator's weights come
    generator = load("generator")
    codec = WanCodec(wan, jax.jit(lambda k: wan_params.init(wan, k))(jax.random.key(1)), precision)
    rows = []
    for p in plans:
        rows.append(_row(p, cfg, texts, *read.pop(p.name), generator, codec))
        say(f"{p.name}: {rows[-1]['total_s']:.2f} s")
    device = jax.devices()[0]
    side = 2048 if device.platform == "cpu" else 8192
    machine = {"device": device.device_kind, "dtype": precision.compute, "jax_peak": ours.peak(precision.dtype, side)}
    return {"machine": machine | {"model": cfg.name}, "rows": rows}


def _row(p: Planned, cfg: ModelConfig, texts, prefill: ours.Time, cache, generator: dict, codec: WanCodec) -> dict:
    size, schedule = work.SIZES[p.name], p.job.schedule
    warm = dataclasses.replace(p.job, schedule=schedules.unipc(2, 5.0))
    jax.block_until_ready(p.engine.denoise(generator, cache, warm))
    denoise, latents = ours.timed(p.engine.denoise, generator, cache, p.job)
    if not np.isfinite(np.asarray(latents["vision"])).all():
        raise RuntimeError(f"{p.name}: the latents are not finite; speed means nothing.")
    clip = np.random.RandomState(0).standard_normal((cfg.latent_channels, size.t, size.h, size.w)).astype(np.float32)
    codec.decode(clip[:, :2])
    decode, _ = ours.timed(codec.decode, clip)
    read, step = (sum(x.values()) for x in flops.denoising(cfg, texts, size.tokens(cfg)))
    total = read + step * schedule.steps
    row: dict[str, Any] = {
        "size": p.name, "says": size.says, "tokens": size.tokens(cfg), "steps": schedule.steps,
        "shift": work.task(size.task).shift, "guidance": p.job.guidance.text, "compile_s": p.compile_s,
        "prefill_s": prefill.wall, "decode_s": decode.wall, "denoise_s": denoise.wall,
        "step_s": denoise.wall / schedule.steps, "total_s": prefill.wall + denoise.wall + decode.wall,
        "tflop": total / 1e12, "tflops": total / (prefill.wall + denoise.wall) / 1e12,
        "memory": {n: m._asdict() for n, m in p.engine.memory.items()},
    }  # fmt: skip
    return row | {"vllm_omni_s": VLLM_OMNI.get(p.name), "limit_s": LIMIT.get(p.name)}
