"""Our denoising, timed: the programs of `sampling.engine`, one step at a time.

In: parameters, a job. Out: seconds of the prefill and of single steps, and what each step made of the latents.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import engine, guidance
from cosmos_jax.sampling.generate import Job


class Time(NamedTuple):
    """`wall`: what a user waits. `cpu`: processor seconds of this process, all threads; other processes add none."""

    wall: float
    cpu: float


def timed(f: Callable, *args) -> tuple[Time, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(f(*args))
    return Time(time.perf_counter() - wall, time.process_time() - cpu), out


def median(times: list[Time]) -> Time:
    return Time(*(float(np.median(x)) for x in zip(*times, strict=True)))


def threads() -> int:
    """What XLA's CPU client uses: one for each core that this process may run on."""
    return len(os.sched_getaffinity(0))


def abstract(cfg: ModelConfig, precision: Precision) -> dict:
    """Shapes of all parameters, stored in the compute dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, precision.dtype), cosmos.abstract(cfg))


def random(cfg: ModelConfig, precision: Precision) -> engine.Load:
    """A loader of random parameters, drawn on the device in the compute dtype: those of one job, no others."""

    def load(name: str) -> dict:
        def draw(key):
            return cosmos.part(jax.tree.map(lambda x: x.astype(precision.dtype), cosmos.init(cfg, key)), name)

        return jax.block_until_ready(jax.jit(draw)(jax.random.key(0)))

    return load


class Ours:
    """One job whose steps are taken one by one."""

    def __init__(self, cfg: ModelConfig, job: Job, precision: Precision):
        shapes = abstract(cfg, precision)
        self.compiling, self.engine = timed(lambda: engine.build(shapes, cfg, job, precision=precision))
        self.cfg, self.job, self.precision, self.done = cfg, job, precision, 0
        self.inputs, self.rows = jax.device_put(job.inputs), job.rows
        self.real = job.batch["vision_index"][0] >= 0
        self.state = self.engine.programs["begin"](self.inputs["batch"], jax.device_put(job.noise))

    def prefill(self, params: dict) -> Time:
        """Read the captions. params: of the job "captions" at least, as in `step` of "generator"."""
        spent, self.cache = timed(self.engine.prefill, params, self.job)
        return spent

    def step(self, params: dict) -> tuple[Time, np.ndarray]:
        """The next step: its time, and the latents after it, [tokens, features]."""
        params = cosmos.part(params, "generator")
        row = {k: np.asarray(x)[self.done : self.done + 1] for k, x in self.rows.items()}
        spent, out = timed(self.engine.programs["step"], params, self.cache, self.inputs, self.state, row)
        self.state, self.done = out[0], self.done + 1
        return spent, np.asarray(self.state.x["vision"][0])[self.real]

    def velocities(self, params: dict) -> np.ndarray:
        """What the model predicts for the next step, before guidance: [branches, tokens, features]. Not the program
        that is timed (which has no reason to return this), but the same function."""
        packed = guidance.stack(self.inputs["batch"], self.inputs["uncond"])
        x = {"vision": jnp.concatenate([self.state.x["vision"]] * 2)}
        times = jnp.full_like(packed["segment_shift"], self.rows["timestep"][self.done])
        gen = jax.jit(functools.partial(cosmos.gen, cfg=self.cfg, precision=self.precision))
        out = gen(cosmos.part(params, "generator"), batch=packed, noised=x, timesteps=times, cache=self.cache)
        return np.asarray(out["vision"])[:, self.real]


def peak(dtype="float32", side: int = 2048) -> float:
    """FLOP/s of a square matmul of this machine, now: the best of three."""
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)  # random: a GPU is faster on ones
    dot = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(dot(x, x))
    return 2 * side**3 / min(timed(dot, x, x)[0].wall for _ in range(3))
