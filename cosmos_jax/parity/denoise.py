"""Denoising against diffusers: transformer, guidance and the checkpoint's scheduler, step by step.

In: a loader of the transformer, the scheduler's files; our params and config. Out: rows. Teacher-forced: every step
starts from the reference's latents, so each step is judged alone. Free: all steps on our own latents.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch

from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos
from cosmos_jax.parity import inputs, reference, rows, schedule
from cosmos_jax.parity.rows import Row
from cosmos_jax.precision import HIGHEST, Precision
from cosmos_jax.sampling import generate, guidance, scheduler_config
from cosmos_jax.sampling.schedules import Schedule

NAME, GUIDANCE = "denoising", 6.0
CONDITIONS = dict(cond=(0,), action_cond=(1,))
CAPTIONS = (29, 7)  # tokens of the caption, and of the negative one
# published: latents after so many steps, torch32 against torch64 (spec reference_parity.md §4.1)
FREE_FLOOR = ((1, 5.1e-8), (10, 5.4e-7), (20, 1.6e-6), (35, 6.6e-6))
Latents = dict[str, np.ndarray]


@dataclass
class Golden:
    """latents[i] enter step i (the last entry: what came out), velocities[i] were predicted from them, before guidance:
    [2, …], with the caption and with the negative one (without guidance: [1, …])."""

    kws: list[dict]  # inputs with the caption, and with the negative one
    config: dict
    index: dict
    guidance: float
    latents: list[Latents] = field(default_factory=list)
    velocities: list[Latents] = field(default_factory=list)
    velocities64: list[Latents] = field(default_factory=list)  # of the same latents, in float64
    noise: dict[str, np.ndarray] = field(default_factory=dict)  # what a stochastic scheduler drew


def golden(load: reference.Load, config: dict, index: dict) -> Golden:
    """Run the reference, as its pipeline does: two forwards, guidance in float32, one solver for each modality."""
    model = load(torch.float32)
    ref = dict(model.config)
    kws = [inputs.inputs(ref, und_len=n, **CONDITIONS) for n in CAPTIONS]  # type: ignore[arg-type]
    kws[1]["input_ids"] = kws[1]["input_ids"] + 11
    made, _ = schedule.build(config, index)
    distilled = scheduler_config.fixed_sigmas(config, index) is not None
    g = Golden(kws, config, index, 1.0 if distilled else GUIDANCE)
    x = {n: kws[0][f"{n}_tokens"][0] for n in inputs.present(kws[0])}
    x["vision"] = x["vision"][0]
    g.latents.append({n: v.numpy() for n, v in x.items()})
    solvers, extras = {n: schedule.start(made) for n in x}, {}
    for i, n in enumerate(x):
        extras[n], drawn = schedule.fresh(made, tuple(x[n].shape), len(made.timesteps), seed=schedule.SEED + i)
        if drawn is not None:
            g.noise[n] = drawn
    for t in made.timesteps:
        g.velocities.append(_velocity(model, g, g.latents[-1], t))
        v = {n: _guide(a, g.guidance) for n, a in g.velocities[-1].items()}
        x = {
            n: solvers[n].step(torch.from_numpy(v[n])[None], t, x[n][None], return_dict=False, **extras[n])[0][0]
            for n in x
        }
        g.latents.append({n: a.numpy() for n, a in x.items()})
    doubles = reference.fits_float64(sum(p.numel() for p in model.parameters()))
    del model
    reference.release()
    if doubles:
        model = load(torch.float64)
        g.velocities64 = [_velocity(model, g, a, t) for a, t in zip(g.latents, made.timesteps, strict=False)]
        del model
        reference.release()
    return g


def _velocity(model, g: Golden, latents: Latents, t) -> Latents:
    """The reference's velocities of these latents, one for each caption."""
    out = []
    for kw in g.kws if g.guidance != 1 else g.kws[:1]:
        fed = {f"{n}_tokens": [torch.from_numpy(a[None] if n == "vision" else a)] for n, a in latents.items()}
        told = {k: torch.full_like(v, t, dtype=t.dtype) for k, v in kw.items() if k.endswith("_timesteps")}
        with reference.exact():
            r = model(**reference.feed(kw | fed | told, model))
        parts = {"vision": r.sample[0], "action": r.action, "sound": r.sound}
        out.append({n: reference.numpy(parts[n][0]) for n in latents})
    return {n: np.stack([o[n] for o in out]) for n in latents}


def _guide(v: np.ndarray, scale: float) -> np.ndarray:
    return v[0] if len(v) == 1 else v[1] + np.float32(scale) * (v[0] - v[1])


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def _cache(params: dict, cfg: ModelConfig, both: dict, precision: Precision):
    return cosmos.und(params, cfg, both, precision=precision).cache


@functools.partial(jax.jit, static_argnames=("cfg", "precision", "form"))
def step(params, cfg: ModelConfig, rows, cache, state, row, fresh, precision: Precision, form: guidance.Form):
    """(velocities of every branch of `form` before guidance, float32; the state after this step).

    rows, cache: of the branches, stacked. row: one of `Schedule.rows`, with the scales "text" and "control".
    """
    x = guidance.stack(*[state.x] * len(form))
    times = jax.numpy.full_like(rows["segment_shift"], row["timestep"])
    v = cosmos.gen(params, cfg, rows, x, times, cache, precision=precision)
    v = {n: a.astype(jax.numpy.float32) for n, a in v.items() if n in state.x}
    whole = guidance.combine(v, row["text"], row["control"], form) if len(form) > 1 else v
    whole = {n: whole.get(n, jax.numpy.zeros_like(a)) for n, a in state.x.items()}
    return v, generate.solver_step(state, whole, row, fresh)


def check(g: Golden, params: dict, cfg: ModelConfig, plan: Schedule | None = None) -> list[Row]:
    """All rows. plan: another schedule than the one that the checkpoint's files ask for."""
    plan = plan or schedule.ours(g.config, g.index)[0]
    batches = [inputs.batch(kw, cfg) for kw in g.kws]
    guided = g.guidance != 1
    both = guidance.stack(*batches) if guided else batches[0]
    cache = _cache(params, cfg, both, HIGHEST)
    path: list[Any] = [inputs.to_buffers(x, batches[0], cfg) for x in g.latents]
    noise = [inputs.to_buffers({n: a[i] for n, a in g.noise.items()}, batches[0], cfg) for i in range(len(path) - 1)]

    form = ("cond", "uncond") if guided else ("cond",)

    def at_step(state, i):
        row = {k: r[i] for k, r in plan.rows().items()} | {"text": np.float32(g.guidance), "control": np.float32(1)}
        return step(params, cfg, both, cache, state, row, noise[i], HIGHEST, form)

    forced = free = generate.start(jax.tree.map(jax.numpy.asarray, path[0]))
    out: list[Row] = []
    for i in range(min(plan.steps, len(g.velocities))):
        v, forced = at_step(forced._replace(x=path[i]), i)
        _, free = at_step(free, i)
        ours = [
            inputs.to_reference({n: a[k : k + 1] for n, a in v.items()}, g.kws[0], cfg)
            for k in range(len(both["und_ids"]))
        ]
        ends = [inputs.to_reference(s.x, g.kws[0], cfg) for s in (forced, free)]
        for n, want in g.velocities[i].items():
            known: dict[str, Any] = {"exact64": g.velocities64[i][n]} if g.velocities64 else {}
            limit, at = rows.by_depth(cfg.layers), dict[str, Any](index=i, peaks=False)
            after = g.latents[i + 1][n]
            out += [
                rows.compare((NAME, "velocity", f"step {i}: {n}"), np.stack([o[n] for o in ours]), want, limit,
                             alone=True, plot=f"{n}: velocity at each step", **at, **known),
                rows.compare((NAME, "next latents", f"step {i}: {n}"), ends[0][n], after, rows.NEXT_LATENTS, alone=True,
                             plot=f"{n}: latents after each step", **at),
                rows.compare((NAME, "all on our own", f"step {i}: {n}"), ends[1][n], after, rows.FREE_LATENTS,
                             plot=f"{n}: latents after each step", floor=free_floor(i + 1), **at),
            ]  # fmt: skip
    return out


def free_floor(steps: int) -> float:
    """Published noise floor of the latents after so many steps, interpolated."""
    x, y = zip(*FREE_FLOOR, strict=True)
    return float(np.exp(np.interp(steps, x, np.log(y))))
