"""The programs that a plan compiles: the train step of `train`, the denoising step of `generate`.

In: `Config` and a mesh that has been entered, of chips that need not be here. Out: what the compiler says of memory and
collectives, and where the arguments' bytes go.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from cosmos_jax import mesh as meshes
from cosmos_jax import shard, state, step
from cosmos_jax.config import Config, ModelConfig
from cosmos_jax.model import attention
from cosmos_jax.plan import hlo
from cosmos_jax.plan.packing import CAPTION, LATENTS, NEGATIVE
from cosmos_jax.precision import resolve
from cosmos_jax.sampling import engine, schedules
from cosmos_jax.sampling.generate import Job
from cosmos_jax.sampling.guidance import Guidance
from cosmos_jax.sampling.memory import held
from data_pipelines.packing import fill, plan, tight_bucket
from data_pipelines.sample import Sample
from data_pipelines.schema import FIELDS, Bucket, SequenceSpec, field_shape
from data_pipelines.tasks import task
from pallas_kernels.platform import temporaries


def batch(bucket: Bucket, spec: SequenceSpec, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes that the loader's batches have on the mesh."""
    place = shard.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(
            field_shape(name, bucket, spec), jax.dtypes.canonicalize_dtype(field.dtype), sharding=place
        )
        for name, field in FIELDS.items()
    }


def train(cfg: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The step that `train` runs, on the state that it has: parameters, optimiser and average donated."""
    meshes.check(cfg, mesh)
    attention.check(cfg.model, resolve(cfg.precision))
    at, packed = state.abstract(cfg), batch(cfg.data.bucket, cfg.model.sequence, mesh)
    jitted: Any = step.make_train_step(cfg)
    program = jitted.lower(at, packed).compile()
    parts = {"parameters": "params"} | ({} if cfg.optim.offload else {"optimiser": "opt", "average": "ema"})
    on_device = {name: held(at[part]) for name, part in parts.items()} | {"batch": held(packed)}
    return _report(program, mesh, on_device)


def generate(cfg: Config, mesh: jax.sharding.Mesh, size: str) -> dict[str, Any]:
    """One denoising step of as many samples as the mesh has groups; weights in the compute dtype, captions cached."""
    meshes.check_model(cfg.model, mesh)
    exact = resolve(cfg.precision)
    attention.check(cfg.model, exact)
    params = state.abstract_params(cfg.model, exact.dtype)
    made = engine.build(params, cfg.model, job(cfg.model, size, shard.row_parts()), precision=exact)
    report = _report(made.programs["step"], mesh, {"parameters": held(made.params["generator"])})
    return report | {"prefill": sum(made.memory["prefill"]), "samples": shard.row_parts()}


def job(cfg: ModelConfig, size: str, samples: int) -> Job:
    """So many equal samples, a caption and a negative one each: shapes alone matter, so everything is 0."""
    name = "text2video" if LATENTS[size][0] > 1 else "text2image"
    row, shape = task(name), (cfg.latent_channels, *LATENTS[size])
    empty = np.broadcast_to(np.float32(0), shape)
    planned: list[Any] = [
        plan(Sample(task=name, prompt=str(n), vision_latents=empty, shift=row.shift), _Length(), cfg.sequence)
        for n in (CAPTION, NEGATIVE)
    ]
    bucket = tight_bucket(planned, rows=1)
    batch, other = (
        {k: np.broadcast_to(x, (samples, *x.shape[1:])) for k, x in fill([[p]], bucket, cfg.sequence).items()}
        for p in planned
    )
    noise: dict[str, Any] = {m: batch[f"{m}_x0"] for m in ("vision", "action", "sound")}
    return Job(batch, noise, schedules.unipc(row.steps, row.shift), Guidance(text=row.guidance), other)


class _Length:
    """A tokenizer whose prompts are their own lengths."""

    def generation_ids(self, prompt: str, system: str | None = None) -> np.ndarray:
        return np.zeros(int(prompt), np.int32)


def _report(program: jax.stages.Compiled, mesh: jax.sharding.Mesh, parts: dict[str, int]) -> dict[str, Any]:
    memory = program.memory_analysis()
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    slices = len({getattr(d, "slice_index", None) for d in mesh.devices.flat})
    found = hlo.collectives(program.as_text(), dict(mesh.shape), slices)
    return {
        "memory": parts | {
            "other": arguments - sum(parts.values()),
            "results": results, "temporaries": temporaries(memory), "code": memory.generated_code_size_in_bytes,
        },
        "aliased": memory.alias_size_in_bytes, "arguments": arguments,
        "peak": memory.peak_memory_in_bytes - host, "host": host,
        "collectives": [dataclasses.asdict(c) for c in found],
        "devices": math.prod(mesh.shape.values()),
    }  # fmt: skip
