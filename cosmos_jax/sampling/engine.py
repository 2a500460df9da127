"""The programs of the denoising loop, compiled before any parameter is read.

In: shapes of the parameters, a `generate.Job`. Out: an `Engine`, which knows how much memory its programs take, refuses
what does not fit, and runs these very programs. The text tower's weights leave before the generator's arrive. The loop
over steps is one compiled function without any word to the host, or, for somebody who watches, one call a step, never
more than one ahead of the device: a program that calls back to Python is not kept by JAX's persistent cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cosmos_jax import shard
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos
from cosmos_jax.model.block import KV
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import generate
from cosmos_jax.sampling.generate import Buffers, Job, State, Static
from cosmos_jax.sampling.memory import Memory, free_memory, gib, held
from pallas_kernels import platform

# A CPU computes bfloat16 in float32. Left alone, XLA widens the weights of all layers before the first one runs.
NARROW: dict[str, str | bool] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
Load = Callable[[str], dict]  # a job of `cosmos.JOBS` → its parameters, placed


@dataclasses.dataclass(frozen=True)
class Engine:
    """Three compiled programs for jobs of one shape: `prefill`, `begin` (noise → state), `step`.

    memory: "prefill", "denoise" → what one device holds while it runs. params: the abstract parameters of both jobs;
    `reads` is the name of the first: "captions", or "reasoner" where prompts have pictures. at_once: steps per call of
    `step`.
    """

    static: Static
    reads: str
    params: dict[str, dict]
    shapes: tuple  # abstract (captions, inputs, noise, rows of the steps of one call)
    programs: dict[str, jax.stages.Compiled]
    memory: dict[str, Memory]
    at_once: int = 1

    def run(self, load: Load, jobs: Sequence[Job], progress: Callable[[int], None] | None = None) -> Iterator[Any]:
        """`denoise` of every job in turn. Weights are loaded once, and the captions' are dropped in between."""
        params = load(self.reads)
        caches = jax.block_until_ready([self.prefill(params, job) for job in jobs])
        del params  # before the others come
        params = load("generator")
        for i, job in enumerate(jobs):
            yield self.denoise(params, caches[i], job, progress)

    def prefill(self, params: dict, job: Job) -> KV:
        """Keys and values of the job's captions. params: of `self.reads` (more is ignored)."""
        self._must_fit(job)
        return self.programs["prefill"](cosmos.part(params, self.reads), _put(job.captions, self.shapes[0]))

    def denoise(self, params: dict, cache: KV, job: Job, progress: Callable[[int], None] | None = None) -> Any:
        """Buffers like `*_x0`; if compiled with `trajectory`, also the latents after each step, [N, …] numpy arrays.

        progress(i) is called when the device has finished the call that step i was in; it works on the next one then.
        """
        self._must_fit(job)
        inputs, noise = _put(job.inputs, self.shapes[1]), _put(job.noise, self.shapes[2])
        cache = jax.device_put(cache, self.programs["step"].input_shardings[0][1])  # it may have waited on the host
        params, rows = cosmos.part(params, "generator"), job.rows
        state, path, pending = self.programs["begin"](inputs["batch"], noise), [], None

        def settle(i: int, done: jax.Array, latents: Buffers | None) -> None:
            jax.block_until_ready(done)
            if latents is not None:
                path.append(jax.device_get(latents))
            for k in range(i, i + n) if progress is not None else ():
                progress(k)

        n = self.at_once
        for i in range(0, job.schedule.steps, n):
            row = _put(jax.tree.map(lambda x, i=i: x[i : i + n], rows), self.shapes[3])
            state, latents, done = self.programs["step"](params, cache, inputs, state, row)
            if pending is not None:
                settle(*pending)
            pending = (i, done, latents)
        settle(*pending)
        out = generate.finish(state.x, inputs["batch"])
        if not self.static.trajectory:
            return out
        return out, generate.finish(jax.tree.map(lambda *x: np.concatenate(x), *path), job.batch, stacked=True)

    def check(self, jobs: int = 1, release: bool = True, free: int | None = None) -> str:
        """One line about memory; ValueError, one sentence with what would help, where a program does not fit.

        Call it before parameters are read. jobs: how many `run` gets; all their caches are held at once. release: the
        captions' weights leave before the generator's come, as in `run`. free: bytes of the fullest device, measured
        (`memory.free_memory`) unless given; unknown: no refusal.
        """
        free = free_memory() if free is None else free
        other = {"prefill": "generator", "denoise": self.reads}
        caches = (jobs - 1) * self.memory["prefill"].results
        extra = {name: caches + (0 if release else held(self.params[job])) for name, job in other.items()}
        name = max(self.memory, key=lambda n: self.memory[n].total + extra[n])
        need = self.memory[name].total + extra[name]
        if free is not None and need > free:
            also = f", with {gib(extra[name])} of other weights and caches beside it" if extra[name] else ""
            raise ValueError(
                f"{name} needs {gib(need)} of each device ({self.memory[name]}{also}), {gib(need - free)} more than "
                f"the {gib(free)} that are free: use {self._remedies(release, jobs)}."
            )
        known = "of unknown free memory" if free is None else f"of {gib(free)} free"
        return f"{'; '.join(f'{n} {gib(m.total)} ({m})' for n, m in self.memory.items())}; {known} on each device"

    def _remedies(self, release: bool, jobs: int) -> str:
        rows = self.shapes[1]["batch"]["segment_shift"].shape[0]
        wide = any(x.dtype.itemsize > 2 for x in jax.tree.leaves(self.params) if jnp.issubdtype(x.dtype, jnp.floating))
        known = {
            "bfloat16 weights": wide, "one tower's weights at a time": not release,
            "fewer samples at a time": rows > 1 or jobs > 1,
            "fewer frames": True, "a lower resolution": True, "more devices": True,
        }  # fmt: skip
        *most, last = (text for text, helps in known.items() if helps)
        return f"{', '.join(most)} or {last}"

    def _must_fit(self, job: Job) -> None:
        """ValueError for a job of other shapes than the one that was compiled."""
        if job.forms != self.static.forms or job.guidance.normalize != self.static.normalize:
            raise ValueError(f"this engine was compiled for the branches {self.static.forms}, the job has {job.forms}.")
        if job.schedule.steps % self.at_once:
            raise ValueError(f"this engine takes {self.at_once} steps at once, the job has {job.schedule.steps}.")
        ours, theirs = _layout(self.shapes), _layout(_shapes(job, self.at_once))
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"this engine was compiled for {name} of {ours.get(name, 'no shape')}, the job has "
                    f"{theirs.get(name, 'none')}: build one for each shape."
                )


def build(
    params: dict, cfg: ModelConfig, job: Job, *, precision: Precision, trajectory: bool = False, at_once: int = 1
) -> Engine:
    """Compile for jobs of the shapes, branches and kind of schedule of `job`, on the mesh that has been entered.

    params: ShapeDtypeStructs of all parameters (or of both jobs' at least), in the dtype and places they will have.
    at_once: steps that one call of the compiled loop takes; as many as the job has: the loop never meets the host.
    """
    static = Static(cfg, precision, job.forms, job.guidance.normalize, trajectory=trajectory)
    captions, inputs, noise, rows = shapes = _shapes(job, at_once)
    reads = "reasoner" if any(c["vit_patches"].shape[1] for c in captions) else "captions"
    parts = {name: cosmos.part(params, name) for name in (reads, "generator")}
    prefill, cache = _compile(generate.prefill, parts[reads], captions, cfg=cfg, precision=precision)
    begin, state = _compile(_begin, inputs["batch"], noise, cfg=cfg)
    step, _ = _compile(_step, parts["generator"], cache, inputs, state, rows, static=static)
    memory = {"prefill": Memory.of(prefill, parts[reads]), "denoise": Memory.of(step, parts["generator"])}
    return Engine(static, reads, parts, shapes, {"prefill": prefill, "begin": begin, "step": step}, memory, at_once)


@functools.partial(jax.jit, static_argnames="cfg")
def _begin(batch: dict, noise: Buffers, *, cfg: ModelConfig) -> State:
    return generate.begin(batch, noise, cfg)


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def _step(params, cache, inputs, state, rows, *, static: Static):
    """(state, latents [1, …] or None, a number that exists when the step is done: the state is given to the next)."""
    state, latents = generate.steps(params, cache, inputs, state, rows, static)
    return state, latents, jnp.sum(jax.tree.leaves(state.x)[0])


def _compile(function, *args, **static) -> tuple[jax.stages.Compiled, Any]:
    """The program, and its results as ShapeDtypeStructs with the places where they come out."""
    lowered = function.lower(*args, **static)
    program = lowered.compile(NARROW if platform.device().platform == "cpu" else None)

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return program, jax.tree.map(place, lowered.out_info, program.output_shardings)


def _shapes(job: Job, at_once: int) -> tuple[tuple[dict, ...], dict, Buffers, dict]:
    """Abstract captions, inputs, noise and rows of so many steps: rows of a batch over the data-parallel axes."""

    def struct(x, spec: P, shape=None):
        place = None if shard.no_mesh() else NamedSharding(jax.sharding.get_mesh(), spec)
        return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype, sharding=place)

    def batch(tree):
        return jax.tree.map(lambda x: struct(x, P(shard.BATCH)), tree)

    inputs = {k: struct(x, P()) if k == "key" else batch(x) for k, x in job.inputs.items()}

    def step(tree, spec: P):
        return jax.tree.map(lambda x: struct(x, spec, (at_once, *x.shape[1:])), tree)

    rows = {k: step(x, P(None, shard.BATCH) if k == "fresh" else P()) for k, x in job.rows.items()}
    return batch(job.captions), inputs, batch(job.noise), rows


def _layout(shapes: tuple) -> dict[str, str]:
    """Name → shape and dtype."""
    parts = dict(zip(("captions", "inputs", "noise", "steps"), shapes, strict=True))
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for k, x in leaves}


def _put(tree, shapes):
    """On the device, where the program expects it: once for all steps."""
    return jax.device_put(tree, None if shard.no_mesh() else jax.tree.map(lambda x: x.sharding, shapes))
