"""The denoising loop: noise and conditions in, clean latents out, in one compiled function.

In: packed batch (data_pipelines/schema.py; what is not noisy is a condition), noise buffers, a `Schedule`. Out: buffers
shaped like `*_x0`. The und tower runs once per prompt, both guidance branches in one batch; every step reads its keys
and values. Solver state is float32 (spec model.md §7).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.config import ModelConfig
from cosmos_jax.flow import draw_noise
from cosmos_jax.model import cosmos
from cosmos_jax.model.modality import valid_elements
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import guidance as two_branches
from cosmos_jax.sampling.schedules import Schedule
from data_pipelines.packing import patchify
from data_pipelines.schema import MODALITIES

Buffers = dict[str, jax.Array]  # modality → [B, tokens, features] float32


def framework_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unit Gaussian noise as the framework draws it: float32 of numpy's RandomState (spec model.md §7.1)."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def framework_buffers(
    batch: dict, samples: dict[tuple[int, int], tuple[int, list[tuple[int, int, int, int]]]], patch: int
) -> dict[str, np.ndarray]:
    """`framework_noise` of every sample, in the batch's buffers: {"vision", "action", "sound"} float32 like `*_x0`.

    samples: (row, segment) → (seed, latent shapes [C,T,h,w] of its vision items). Every vision item, the action [T_a,A]
    and the sound [Ds,T_s] of a sample are drawn from the same seed, each from its beginning, as in the framework.
    """
    buffers = {n: np.zeros(batch[f"{n}_x0"].shape, np.float32) for n in MODALITIES}
    for (row, segment), (seed, shapes) in samples.items():
        place = {n: np.flatnonzero(np.asarray(batch[f"{n}_segment_ids"])[row] == segment) for n in MODALITIES}
        action, sound = ((len(place[n]), buffers[n].shape[-1]) for n in ("action", "sound"))
        items = [patchify(framework_noise(seed, shape), patch) for shape in shapes]
        noise = {"vision": np.concatenate(items) if items else np.zeros((0, buffers["vision"].shape[-1]))}
        noise |= {"action": framework_noise(seed, action), "sound": framework_noise(seed, sound[::-1]).T}
        for name, where in place.items():
            if len(where) != len(noise[name]):
                raise ValueError(
                    f"row {row}, segment {segment} has {len(where)} {name} tokens, but the shapes {shapes} give "
                    f"{len(noise[name])}; name every vision item of the sample, clean ones included."
                )
            buffers[name][row, where] = noise[name]
    return buffers


class State(NamedTuple):
    """What a solver remembers. All four are pytrees like the sample."""

    x: Buffers  # where the model is evaluated next
    corrected: Buffers  # the state the last predictor started from
    older: Buffers  # clean latents predicted one and …
    oldest: Buffers  # … two steps ago


def start(x: Buffers) -> State:
    """The state before the first step; its history has weight 0 there."""
    return State(x, x, x, x)


def solver_step(state: State, velocity: Buffers, row: dict, fresh: Buffers | None = None) -> State:
    """One step. `row`: one row of `Schedule.rows()`. Formula: `schedules` module docstring, m = x − σ·v.

    fresh: unit noise like x, for a schedule that draws any.
    """
    c, p = row["corrector"], row["predictor"]
    m = jax.tree.map(lambda x, v: x - row["sigma"] * v, state.x, velocity)
    corrected = jax.tree.map(lambda *terms: _weigh(c, terms), state.x, state.corrected, m, state.older, state.oldest)
    x = jax.tree.map(lambda *terms: _weigh(p, terms), corrected, m, state.older)
    if "noise" in row:
        x = jax.tree.map(lambda x, e: x + row["noise"] * e, x, fresh)
    return State(x, corrected, m, state.older)


def denoise(
    velocity_fn: Callable[[Buffers, jax.Array], Buffers],
    x: Buffers,
    schedule: Schedule,
    noisy: Buffers | None = None,
    *,
    fresh: Callable[[jax.Array], Buffers] | None = None,
    progress: Callable[[int], None] | None = None,
    trajectory: bool = False,
) -> Buffers | tuple[Buffers, Buffers]:
    """Integrate dx/dσ = velocity_fn(x, timestep) from the first sigma of `schedule` to 0; traceable.

    x: pytree of float32 arrays; timestep: float32 scalar in 0 … 1000. Where `noisy` (same tree, bool) is False, x is
    put back after every step, so conditions stay exact. `trajectory`: also return x after each step, stacked [N, …].
    `fresh(i)`: unit noise like x for step i; ValueError if the schedule draws noise and this is missing.
    `progress(i)` is called on the host when step i is done, in no guaranteed order.
    """
    if schedule.noise is not None and fresh is None:
        raise ValueError("this schedule adds fresh noise in every step; say where it comes from.")

    def body(state, xs):
        i, row = xs
        drawn = fresh(i) if "noise" in row else None
        new = solver_step(state, velocity_fn(state.x, row["timestep"]), row, drawn)
        if noisy is not None:
            new = new._replace(x=jax.tree.map(jnp.where, noisy, new.x, x))
        if progress is not None:
            jax.debug.callback(progress, i)
        return new, new.x if trajectory else None

    state, path = jax.lax.scan(body, start(x), (jnp.arange(schedule.steps), schedule.rows()))
    return (state.x, path) if trajectory else state.x


def sample_latents(
    params: dict,
    cfg: ModelConfig,
    batch: dict,
    noise: Buffers,
    schedule: Schedule,
    guidance: float = 1.0,
    *,
    precision: Precision,
    uncond: dict | None = None,
    key: jax.Array | None = None,
    reuse: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Buffers:
    """Denoise every noisy token of `batch`; returns {"vision", "action", "sound"} float32 buffers like `*_x0`.

    noise: unit Gaussian buffers, from `framework_buffers` or `flow.draw_noise`. Every segment is its own sample; all
    share the schedule. uncond: the same samples packed with the negative (or empty) caption, needed when guidance ≠ 1:
    v = v_u + guidance·(v_c − v_u). Clean tokens come back bit-equal to x0, invalid channels and padding as 0.
    key: draws the noise that a stochastic schedule adds, per sample, token and step; a deterministic one needs none.
    `reuse=False` runs the und tower again in every step: the same numbers, slower (a test of the reuse).
    ValueError when guidance and uncond contradict each other, and for a stochastic schedule without a key.
    """
    if schedule.noise is not None and key is None:
        raise ValueError("this schedule adds fresh noise in every step; pass the key that draws it.")
    guided = two_branches.check(batch, uncond, guidance)
    return _sample(
        params, cfg, batch, uncond if guided else None, noise, schedule, jnp.float32(guidance), key,
        precision=precision, reuse=reuse, progress=progress,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "precision", "reuse", "progress"))
def _sample(params, cfg, batch, uncond, noise, schedule, guidance, key, *, precision, reuse, progress):
    names = [n for n in MODALITIES if batch[f"{n}_x0"].size]
    x, noisy = {}, {}
    for n in names:
        valid = valid_elements(batch, n, cfg.patch)
        noisy[n] = valid & batch[f"{n}_noisy"][..., None]
        x[n] = jnp.where(noisy[n], noise[n], jnp.where(valid, batch[f"{n}_x0"], 0.0))
    rows = batch if uncond is None else two_branches.stack(batch, uncond)
    cache = cosmos.und(params, cfg, rows, precision=precision).cache

    def velocity(x, timestep):
        if uncond is not None:
            x = two_branches.stack(x, x)
        timesteps = jnp.full_like(rows["segment_shift"], timestep)
        if reuse:
            v = cosmos.gen(params, cfg, rows, x, timesteps, cache, precision=precision)
        else:
            v = cosmos.apply(params, cfg, rows, x, timesteps, precision=precision).velocity
        return v if uncond is None else two_branches.combine(v, guidance)

    def fresh(i):
        step_key = jax.random.fold_in(key, i)
        return {n: draw_noise(step_key, batch, n) for n in names}

    done = denoise(velocity, x, schedule, noisy, fresh=fresh, progress=progress)
    return {n: done[n] if n in done else batch[f"{n}_x0"] for n in MODALITIES}


def _weigh(weights: jax.Array, terms: tuple) -> jax.Array:
    """Σ weights[i] · terms[i]."""
    total = weights[0] * terms[0]
    for i in range(1, len(terms)):
        total = total + weights[i] * terms[i]
    return total
