"""The denoising loop: noise and conditions in, clean latents out.

In: packed batch (data_pipelines/schema.py; what is not noisy is a condition), noise buffers, a `Schedule`. Out: buffers
shaped like `*_x0`. Two programs: `prefill` reads the captions once (reasoner weights alone), `denoise_cached` runs the
steps on their keys and values (generator weights alone); all guidance branches are rows of one batch. Solver state is
float32 (spec model.md §7). `sample_latents` is both; `engine` compiles them ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax import shard
from cosmos_jax.config import ModelConfig
from cosmos_jax.flow import draw_noise
from cosmos_jax.model import cosmos
from cosmos_jax.model.block import KV
from cosmos_jax.model.modality import noisy_elements, valid_elements
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import guidance as guiding
from cosmos_jax.sampling.guidance import Guidance
from cosmos_jax.sampling.schedules import Schedule
from data_pipelines.packing import patchify
from data_pipelines.schema import MODALITIES
from pallas_kernels.flow import Updated, update

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


def solver_step(
    state: State,
    velocity: Buffers,
    row: dict,
    fresh: Buffers | None = None,
    keep: tuple[Buffers, Buffers] | None = None,
) -> State:
    """One step. `row`: one row of `Schedule.rows()`. Formula: `pallas_kernels.flow.update`.

    fresh: unit noise like x, for a schedule that draws any. keep: as in `advance`.
    """
    buffers = state._asdict() | {"velocity": velocity}
    if "noise" in row:
        buffers["fresh"] = fresh
    if keep is not None:
        buffers |= dict(zip(("noisy", "pinned"), keep, strict=True))
    new = jax.tree.map(lambda *x: update(**dict(zip(buffers, x, strict=True)), row=row), *buffers.values())
    x, corrected, clean = jax.tree.transpose(jax.tree.structure(state.x), jax.tree.structure(Updated(0, 0, 0)), new)
    return State(x, corrected, clean, state.older)


def advance(
    velocity_fn: Callable[[Buffers, dict], Buffers],
    state: State,
    rows: dict,
    *,
    keep: tuple[Buffers, Buffers] | None = None,
    fresh: Callable[[dict], Buffers] | None = None,
    progress: Callable[[int], None] | None = None,
    trajectory: bool = False,
) -> tuple[State, Buffers | None]:
    """As many solver steps as `rows` has; traceable. Returns the state, and x after each step [n, …] if `trajectory`.

    rows: `step_rows` of a schedule, and whatever else (leading axis n) velocity_fn(x, row) and fresh(row), unit noise
    like x, look up there. keep: (noisy, clean), where noisy (bool) is False, x is put back to `clean` after every step.
    `progress(i)` is called on the host when step i is done, in no guaranteed order; the device does not wait for it.
    """

    def body(state, row):
        drawn = fresh(row) if "noise" in row else None
        new = solver_step(state, velocity_fn(state.x, row), row, drawn, keep)
        if progress is not None:
            done = jnp.sum(jax.tree.leaves(new.x)[0])  # an argument that does not exist before the step is done
            jax.debug.callback(lambda i, _: progress(i), row["step"], done)
        return new, new.x if trajectory else None

    return jax.lax.scan(body, state, rows)


def step_rows(schedule: Schedule) -> dict:
    """What `advance` needs of every step; leading axis N."""
    return schedule.rows() | {"step": np.arange(schedule.steps, dtype=np.int32)}


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
    progress: as in `advance`.
    """
    if schedule.noise is not None and fresh is None:
        raise ValueError("this schedule adds fresh noise in every step; say where it comes from.")
    state, path = advance(
        lambda x, row: velocity_fn(x, row["timestep"]), start(x), step_rows(schedule),
        keep=None if noisy is None else (noisy, x), fresh=None if fresh is None else lambda row: fresh(row["step"]),
        progress=progress, trajectory=trajectory,
    )  # fmt: skip
    return (state.x, path) if trajectory else state.x


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch to denoise: every segment is its own sample; all share schedule and guidance.

    noise: unit Gaussian buffers like `*_x0`, from `framework_buffers` or `flow.draw_noise`. uncond: the same samples
    packed with the negative (or empty) caption, for text guidance. controls: [B,V] bool, the tokens that
    control guidance hides (`packing.context_tokens`). A stochastic schedule adds unit noise in every step: `fresh`,
    buffers like `noise` with a leading axis N, or what `key` draws per sample, token and step.
    ValueError when these contradict each other. What no step uses is ignored; `forms` says which branches run.
    """

    batch: dict
    noise: Buffers
    schedule: Schedule
    guidance: Guidance = Guidance()
    uncond: dict | None = None
    controls: Any = None
    key: jax.Array | None = None
    fresh: Buffers | None = None

    def __post_init__(self):
        if self.schedule.noise is not None and self.key is None and self.fresh is None:
            raise ValueError("this schedule adds fresh noise in every step; pass the key that draws it, or `fresh`.")
        guiding.check(self.batch, self.uncond, self.controls, self.forms, self.guidance)

    @functools.cached_property
    def _plan(self) -> tuple[dict, tuple[guiding.Form, ...]]:
        return self.guidance.plan(self.schedule.timesteps)

    @property
    def forms(self) -> tuple[guiding.Form, ...]:
        """The sets of branches that its steps run."""
        return self._plan[1]

    @property
    def rows(self) -> dict:
        """Per step: solver, guidance, fresh noise. Leading axis N."""
        rows = step_rows(self.schedule) | self._plan[0]
        return rows if self.fresh is None or self.schedule.noise is None else rows | {"fresh": self.fresh}

    @property
    def captions(self) -> tuple[dict, ...]:
        """What `prefill` reads: one batch for each caption."""
        batches = {"cond": self.batch, "uncond": self.uncond}
        return tuple(
            {k: x for k, x in batches[b].items() if k.startswith(("und_", "vit_"))}
            for b in guiding.captions(guiding.union(self.forms))
        )

    @property
    def inputs(self) -> dict:
        """What `denoise_cached` needs besides the noise: nothing that no step uses."""
        branches = guiding.union(self.forms)
        out = {"batch": self.batch}
        out |= {"uncond": self.uncond} if "uncond" in branches else {}
        out |= {"controls": self.controls} if "free" in branches else {}
        return out if self.schedule.noise is None or self.fresh is not None else out | {"key": self.key}


class Static(NamedTuple):
    """What of a job is compiled into its program."""

    cfg: ModelConfig
    precision: Precision
    forms: tuple[guiding.Form, ...]
    normalize: bool = False
    reuse: bool = True
    trajectory: bool = False


def sample_latents(
    params: dict,
    cfg: ModelConfig,
    batch: dict,
    noise: Buffers,
    schedule: Schedule,
    guidance: float | Guidance = 1.0,
    *,
    precision: Precision,
    uncond: dict | None = None,
    controls: jax.Array | None = None,
    key: jax.Array | None = None,
    fresh: Buffers | None = None,
    reuse: bool = True,
    progress: Callable[[int], None] | None = None,
    trajectory: bool = False,
) -> Any:
    """Denoise every noisy token of `batch`; returns {"vision", "action", "sound"} float32 buffers like `*_x0`.

    The other arguments: `Job`; a number as guidance is text guidance. Clean tokens come back bit-equal to x0, invalid
    channels and padding as 0. trajectory: also return the latents after each step, [N, …] each.
    `reuse=False` runs the und tower again in every step: the same numbers, slower (a test of the reuse).
    """
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(text=float(guidance))
    job = Job(batch, noise, schedule, guidance, uncond, controls, key, fresh)
    static = Static(cfg, precision, job.forms, guidance.normalize, reuse, trajectory)
    if reuse:
        cache = prefill(cosmos.part(params, "reasoner"), job.captions, cfg=cfg, precision=precision)
        params = cosmos.part(params, "generator")
    else:
        cache = None
    return denoise_cached(params, cache, job.inputs, noise, job.rows, static=static, progress=progress)


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def prefill(params: dict, captions: tuple[dict, ...], *, cfg: ModelConfig, precision: Precision) -> KV:
    """Keys and values [L, n·B, U, Hkv, d] of the captions of all branches. params: those of the reasoner suffice."""
    rows = guiding.stack(*captions)
    with shard.branches(len(captions) > 1 and shard.size("cfg") > 1):
        return cosmos.und(params, cfg, rows, precision=precision).cache


@functools.partial(jax.jit, static_argnames=("static", "progress"))
def denoise_cached(params, cache, inputs, noise, rows, *, static: Static, progress=None):
    """All steps, on the cache of `prefill`. params: those of the generator suffice. Arguments: `Job`."""
    state, path = steps(params, cache, inputs, begin(inputs["batch"], noise, static.cfg), rows, static, progress)
    out = finish(state.x, inputs["batch"])
    return (out, finish(path, inputs["batch"], static.trajectory)) if static.trajectory else out


def begin(batch: dict, noise: Buffers, cfg: ModelConfig) -> State:
    """Conditions where tokens are clean, noise elsewhere, 0 in what is no element."""
    noisy, clean = _conditions(batch, cfg)
    return start({n: jnp.where(noisy[n], noise[n], clean[n]) for n in noisy})


def steps(params, cache, inputs, state: State, rows, static: Static, progress=None) -> tuple[State, Buffers | None]:
    """`advance` for the model: as many steps as `rows` has, each on the rows of the branches that its form names."""
    cfg, precision = static.cfg, static.precision
    batch = inputs["batch"]
    have = guiding.captions(guiding.union(static.forms))
    branches = {"cond": batch, "uncond": inputs.get("uncond")}
    if "controls" in inputs:
        branches["free"] = guiding.without(batch, inputs["controls"])
    owners = guiding.members(batch) if static.normalize else None

    def model(form):
        packed = guiding.stack(*(branches[b] for b in form))
        own = None if cache is None else guiding.pick(cache, have, form)

        def velocity(x, row):
            x = guiding.stack(*[x] * len(form))
            timesteps = jnp.full_like(packed["segment_shift"], row["timestep"])
            with shard.branches(guiding.apart(form)):
                if own is None:
                    v = cosmos.apply(params, cfg, packed, x, timesteps, precision=precision).velocity
                else:
                    v = cosmos.gen(params, cfg, packed, x, timesteps, own, precision=precision)
            return guiding.combine(v, row["text"], row["control"], form, owners) if len(form) > 1 else v

        return velocity

    models = [model(form) for form in static.forms]

    def velocity(x, row):
        return models[0](x, row) if len(models) == 1 else jax.lax.switch(row["form"], models, x, row)

    def fresh(row):
        if "fresh" in row:
            return {n: row["fresh"][n] for n in state.x}
        return {n: draw_noise(jax.random.fold_in(inputs["key"], row["step"]), batch, n) for n in state.x}

    return advance(
        velocity, state, rows, keep=_conditions(batch, cfg), fresh=fresh, progress=progress,
        trajectory=static.trajectory,
    )  # fmt: skip


def finish(x: Buffers, batch: dict, stacked: bool = False) -> Buffers:
    """Every modality; one that the batch has no room for comes back empty."""
    return {n: x.get(n, batch[f"{n}_x0"][None] if stacked else batch[f"{n}_x0"]) for n in MODALITIES}


def _conditions(batch: dict, cfg: ModelConfig) -> tuple[Buffers, Buffers]:
    """Modality → (what is denoised, bool; the clean latents, 0 in what is no element)."""
    noisy, clean = {}, {}
    for n in (n for n in MODALITIES if batch[f"{n}_x0"].size):
        noisy[n] = noisy_elements(batch, n, cfg.patch)
        clean[n] = jnp.where(valid_elements(batch, n, cfg.patch), batch[f"{n}_x0"], 0.0)
    return noisy, clean
