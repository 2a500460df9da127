"""Classifier-free guidance: one batch holds both branches.

In: conditional and unconditional rows. Out: the guided velocity. Each device stacks its *own* conditional and
unconditional rows, so guidance moves no data between devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax import shard
from data_pipelines.schema import MODALITIES


def stack(cond, uncond):
    """Two pytrees of [B, …] → one of [2B, …]: per device, its conditional rows, then its unconditional rows."""
    return shard.rowwise(lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b), cond, uncond)


def combine(velocity, guidance: jax.Array):
    """Velocities [2B, …] of a `stack`ed batch → [B, …] float32: v_u + g·(v_c − v_u).

    In float32 like diffusers; the framework combines bfloat16 velocities (spec model.md §7.5, DISC-3).
    """

    def mix(v, g):
        cond, uncond = jnp.split(v.astype(jnp.float32), 2)
        return uncond + g * (cond - uncond)

    return shard.rowwise_shared(lambda v, g: jax.tree.map(lambda x: mix(x, g), v), (velocity,), (guidance,))


def check(batch: dict, uncond: dict | None, guidance: float) -> bool:
    """Whether guidance needs the second branch. ValueError when that branch is missing or packed differently."""
    if guidance == 1:
        return False
    if uncond is None:
        raise ValueError(
            f"sample.guidance={guidance} needs an unconditional batch; give `uncond` or set guidance to 1."
        )
    for name, x in batch.items():
        if x.shape != uncond[name].shape:
            raise ValueError(f"uncond[{name!r}] has shape {uncond[name].shape}, the batch {x.shape}: pack both alike.")
    for name in (f"{m}_{field}" for m in MODALITIES for field in ("segment_ids", "token_ids", "noisy")):
        if isinstance(batch[name], np.ndarray) and not np.array_equal(batch[name], uncond[name]):
            raise ValueError(f"uncond[{name!r}] differs from the batch's: both branches must denoise the same tokens.")
    return True
