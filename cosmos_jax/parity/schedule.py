"""The checkpoint's scheduler against diffusers': sigmas and timesteps bit for bit, then every step of a solve.

In: `scheduler_config.json` and `model_index.json`. Out: rows. The solver is driven by a cheap smooth velocity, so that
nothing but the schedule and the solver is compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from cosmos_jax.parity import reference, rows
from cosmos_jax.parity.rows import Row
from cosmos_jax.sampling import generate, scheduler_config
from cosmos_jax.sampling.schedules import Schedule

NAME, STEPS, SEED = "scheduler", 35, 7
FLOOR = 3.3e-7  # published, UniPC of 35 steps (spec reference_parity.md §4.1)
X = reference.draw("scheduler sample", 6, 16)
W = reference.draw("scheduler field", 16, 16) / 4


def field_of(lib, x, w, t):
    """velocity of (x, timestep) in the array library `lib`."""
    return lib.tanh(x @ w) * (0.5 + t / 1000.0) - 0.3 * x


@dataclass
class Golden:
    """What diffusers' scheduler says, and one solve: x after each step [N,…], the velocities it was fed."""

    config: dict
    index: dict
    sigmas: np.ndarray
    timesteps: np.ndarray
    path: np.ndarray = field(default_factory=lambda: np.zeros(0))
    velocities: np.ndarray = field(default_factory=lambda: np.zeros(0))
    note: str = ""


def build(config: dict, index: dict) -> tuple[Any, str]:
    """(diffusers' scheduler with its timesteps set, a note).

    index: `model_index.json`, which may ask for the native grid, with `distilled_sigmas` of `modular_model_index.json`.
    diffusers has no class for Edge's scheduler, whose grid is therefore handed to its UniPC.
    """
    name, sigmas = config.get("_class_name"), scheduler_config.fixed_sigmas(config, index)
    fields = {k: v for k, v in config.items() if not k.startswith("_")}
    if name == scheduler_config.EULER:
        solver = diffusers.FlowMatchEulerDiscreteScheduler.from_config(fields)
        solver.set_timesteps(**({"sigmas": sigmas} if sigmas else {"num_inference_steps": STEPS}))
        return solver, ""
    solver = diffusers.UniPCMultistepScheduler.from_config(fields)
    grid, note = None, ""
    if name == scheduler_config.EDGE:
        grid = native_grid(solver, STEPS)
        note = "diffusers has no such class: its UniPC on the framework's grid"
    elif index.get("use_native_flow_schedule"):
        grid = np.linspace(1 - 1 / solver.config.num_train_timesteps, 0.0, STEPS + 1)[:-1]
    solver.set_timesteps(STEPS, sigmas=grid)
    return solver, note


def native_grid(solver: Any, steps: int) -> np.ndarray:
    """Where the framework's UniPC starts and how it goes on, before the shift."""
    return np.linspace(float(np.float32(1 - 1 / solver.config.num_train_timesteps)), 0.0, steps + 1)[:-1]


def ours(config: dict, index: dict) -> tuple[Schedule, str]:
    """Our schedule, and the line that describes it."""
    return scheduler_config.of_checkpoint(config, index, STEPS)


def fresh(solver: Any, shape: tuple[int, ...], count: int, seed: int = SEED) -> tuple[dict, np.ndarray | None]:
    """(keyword arguments of `solver.step`, the noise it will draw [N,…]); ({}, None) for a deterministic solver."""
    if not getattr(solver.config, "stochastic_sampling", False):
        return {}, None
    generator = torch.Generator().manual_seed(seed)
    noise = np.concatenate([torch.randn((1, *shape), generator=generator).numpy() for _ in range(count)])
    return {"generator": torch.Generator().manual_seed(seed)}, noise


def start(solver: Any) -> Any:
    """A fresh copy at its first step (or it would start at the second of two equal timesteps)."""
    solver = copy.deepcopy(solver)
    solver.set_begin_index(0)
    return solver


def golden(config: dict, index: dict) -> Golden:
    """Run the reference."""
    made, note = build(config, index)
    g = Golden(config, index, made.sigmas.numpy(), made.timesteps.numpy(), note=note)
    solver, x, w = start(made), torch.from_numpy(X), torch.from_numpy(W)
    extra, _ = fresh(made, X.shape, len(g.timesteps))
    path, velocities = [], []
    for t in solver.timesteps:
        velocities.append(field_of(torch, x, w, float(t)))
        x = solver.step(velocities[-1][None], t, x[None], return_dict=False, **extra)[0][0]
        path.append(x)
    g.path, g.velocities = torch.stack(path).numpy(), torch.stack(velocities).numpy()
    return g


@jax.jit
def replay(schedule_rows: dict, velocities, noise):
    """Our solver on recorded velocities → x after each step."""

    def body(state, xs):
        state = generate.solver_step(state, {"x": xs[0]}, xs[1], {"x": xs[2]})
        return state, state.x["x"]

    return jax.lax.scan(body, generate.start({"x": jnp.asarray(X)}), (velocities, schedule_rows, noise))[1]


def check(g: Golden, schedule: Schedule | None = None) -> list[Row]:
    """All rows. schedule: another than the one that the checkpoint's files ask for."""
    schedule = schedule or ours(g.config, g.index)[0]
    out = [
        rows.exact((NAME, "schedule", "sigmas"), schedule.sigmas, g.sigmas, g.note),
        rows.exact((NAME, "schedule", "timesteps"), schedule.timesteps, g.timesteps),
    ]
    if len(schedule.timesteps) != len(g.timesteps):
        return out
    count = len(g.timesteps)
    _, noise = fresh(build(g.config, g.index)[0], X.shape, count)
    drawn = np.zeros((count, *X.shape), np.float32) if noise is None else noise
    given = None if schedule.noise is None else lambda i: {"x": jnp.asarray(drawn)[i]}
    free: Any = generate.denoise(
        lambda x, t: {"x": field_of(jnp, x["x"], W, t)}, {"x": jnp.asarray(X)}, schedule, fresh=given, trajectory=True
    )
    for path, how, alone in ((replay(schedule.rows(), g.velocities, drawn), "recorded velocities", True),
                             (free[1]["x"], "its own velocities", False)):  # fmt: skip
        for i, want in enumerate(g.path):
            out.append(rows.compare(
                (NAME, "solver", f"step {i}, {how}"), path[i], want, rows.TRAJECTORY, floor=FLOOR, peaks=False,
                plot="solver, after each step", index=i, alone=alone,
            ))  # fmt: skip
    return out
