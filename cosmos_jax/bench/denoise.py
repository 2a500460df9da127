"""`bench denoise`: one denoising step of a few layers, and where its time goes.

In: names of workloads. Out: a row for each: the step that `generate` runs (both guidance branches, captions read
before), and the parts of its layers timed alone. `other` is what remains: patches in and out, time, guidance, solver.
Alone, a part cannot be fused or overlapped with its neighbours, so parts may add up to more than the step; then `other`
is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from cosmos_jax import flops
from cosmos_jax.bench import clock, ours, work
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import attention, rope
from cosmos_jax.model.block import Stream, Tower
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import guidance


class Workload(NamedTuple):
    cfg: ModelConfig
    size: str
    texts: tuple[int, int] = work.TEXTS


def _nano(layers: int) -> ModelConfig:
    return ModelConfig(name=f"nano-{layers}", layers=layers, vocab=4096, action_dim=0, sound_dim=0)


WORKLOADS = {f"nano-{n}": Workload(_nano(4), n) for n in work.SIZES}
WORKLOADS["scaled-256p"] = Workload(work.SCALING, "256p", (64, 96))


def run(names: Sequence[str], repeat: int = 5, say: Callable[[str], None] = print) -> dict:
    """{"machine": …, "rows": [one for each workload]}."""
    machine = clock.machine()
    rows = []
    for name in names:
        rows.append(_row(name, WORKLOADS[name], Precision(machine["dtype"]), repeat, say))
        say(f"{name}: {rows[-1]['step_s'] * 1e3:.1f} ms")
        machine["jax_peak"] = max(machine["jax_peak"], clock.peak())
    for r in rows:
        r["share"] = r["tflops"] * 1e12 / machine["jax_peak"]
    return {"machine": machine | {"repeat": repeat}, "rows": rows}


def _row(name: str, w: Workload, precision: Precision, repeat: int, say) -> dict:
    cfg, size = w.cfg, work.SIZES[w.size]
    say(f"{name}: {cfg.layers} layers, {work.attention(cfg, size, precision, w.texts)}")
    one = ours.Ours(cfg, work.job(cfg, size, w.texts), precision)
    load = ours.random(cfg, precision)
    one.prefill(load("captions"))
    params, times = load("generator"), []
    for i in range(repeat + 1):
        spent, latents = one.step(params)
        if i:  # the first warms up
            times.append(spent)
    if not np.isfinite(latents).all():
        raise RuntimeError(f"{name}: the latents are not finite; speed means nothing.")
    step = ours.median(times).wall
    parts = _parts(one, precision, repeat)
    counted = flops.denoising(cfg, w.texts, size.tokens(cfg))[1]
    total = sum(counted.values())
    row: dict[str, Any] = {
        "shape": name, "layers": cfg.layers, "tokens": size.tokens(cfg), "tflop": total / 1e12, "step_s": step,
        "tflops": total / step / 1e12, "other_s": step - sum(parts.values()),
    }  # fmt: skip
    operations = _operations(cfg, 2 * size.tokens(cfg)) | {"attention": counted["gen_attention"]}
    for part, seconds in parts.items():
        row |= {f"{part}_s": seconds, f"{part}_tflops": operations[part] / seconds / 1e12}
    return row


def _operations(cfg: ModelConfig, tokens: int) -> dict[str, int]:
    """Of the matmuls before and after attention, all layers."""
    q, kv = (n * cfg.head_dim for n in (cfg.heads, cfg.kv_heads))
    inner = (3 if cfg.mlp_act == "swiglu" else 2) * cfg.mlp
    return {n: 2 * tokens * cfg.layers * cfg.hidden * w for n, w in (("qkv", q + 2 * kv), ("mlp", q + inner))}


def _parts(one: ours.Ours, precision: Precision, repeat: int) -> dict[str, float]:
    """Seconds of all layers: norm, q, k, v and their rotation; attention; output, norm and MLP."""
    cfg = one.cfg
    batch = guidance.stack(one.inputs["batch"], one.inputs["uncond"])
    rows, tokens = batch["gen_segment_ids"].shape
    captions = batch["und_segment_ids"].shape[1]

    def draw(key):
        *keys, seed = jax.random.split(key, 4)
        tower = jax.tree.map(lambda x: x.astype(precision.dtype), Tower(nnx.Rngs(seed), cfg, qk_norm=True))
        shapes = (tokens, cfg.hidden), (captions, cfg.kv_heads, cfg.head_dim), (tokens, cfg.heads, cfg.head_dim)
        return tower, *(jax.random.normal(k, (rows, *s), precision.dtype) for k, s in zip(keys, shapes, strict=True))

    tower, h, cached, attended = jax.jit(draw)(jax.random.key(0))
    cos, sin = jax.jit(lambda x: rope.tables(x, cfg.rope_theta, cfg.rope_sections))(batch["gen_positions"])
    ids = batch["gen_segment_ids"], batch["und_segment_ids"]
    plans = jax.jit(lambda gen, und: attention.gen_plans(gen, und, cfg.attention, precision))(*ids)
    qkv = jax.jit(lambda tower, h, cos, sin: tower.qkv(h, Stream(cos, sin, plans), precision))
    q, k, _, v = qkv(tower, h, cos, sin)
    attend = jax.jit(lambda q, k, v, plans: attention.gen_attend(q, k, v, plans, None, precision))
    finish = jax.jit(lambda tower, h, o: tower.finish(h, o, precision))
    timed = {
        "qkv": clock.Timed(lambda: qkv(tower, h, cos, sin)),
        "attention": clock.Timed(lambda: attend(q, (cached, k), (cached, v), plans)),
        "mlp": clock.Timed(lambda: finish(tower, h, attended)),
    }
    return {n: s * cfg.layers for n, s in clock.medians(timed, repeat).items()}
