"""The compiled programs of the denoising loop: the same numbers as `sample_latents`, in less memory, refused in time."""

import dataclasses
import gc
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from parity import oracle
from parity.test_sampling import branches, noise_of, sample, tiny

from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST, Precision
from cosmos_jax.sampling import engine, generate, memory, schedules
from cosmos_jax.sampling.guidance import Guidance
from data_pipelines.schema import MODALITIES


def job(steps=4, guidance=6.0, seed=1, **changes):
    _, cfg, _ = tiny()
    _, (cond, uncond) = branches(cfg, seed=seed)
    made = generate.Job(cond, noise_of(cond), schedules.unipc(steps, 5.0), Guidance(guidance), uncond)
    return dataclasses.replace(made, **changes)


def build(made, dtype=jnp.float32, precision=HIGHEST, **kw):
    _, cfg, _ = tiny()
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), cosmos.abstract(cfg))
    return engine.build(params, cfg, made, precision=precision, **kw)


def test_the_compiled_programs_give_the_latents_of_sample_latents():
    """Another number of steps, seed and scale run in the same programs."""
    _, cfg, params = tiny()
    made = build(job())
    jobs = [job(), job(steps=7, guidance=3.0, seed=2)]
    for one, got in zip(jobs, made.run(lambda name: cosmos.part(params, name), jobs), strict=True):
        want = sample(one.batch, one.uncond, one.schedule.steps, one.guidance.text)
        for name in MODALITIES:
            print(name, oracle.relative(got[name], want[name]), np.array_equal(got[name], want[name]))
            assert oracle.relative(got[name], want[name])[0] <= 1e-6, name
