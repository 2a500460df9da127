"""Fused attention on Hopper GPUs (sm_90a; H100, H200) by Mosaic GPU: who visits which tile, in three kernels.

In: what `fused.py` hands every backend. Out: o, log-sum-exp, and from their cotangents dq, dk, dv.

| kernel | one block of threads computes | and visits, of its list |
|---|---|---|
| forward | 128 queries of a head | tiles of 128 keys |
| dq | 128 queries of a head | tiles of 64 keys |
| dk, dv | 128 keys of a key head | tiles of 64 queries, for each query head of the group |

A list names first the tiles that are visible as a whole, then those under a mask: two loops, of which the first reads
no ids at all. Lists are built once per step and serve every layer. All sums are float32; dk and dv are summed over the
group inside the kernel. The kernels are in `gpu_forward.py` and `gpu_backward.py`, their words in `gpu_mosaic.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_backward, gpu_forward, segments
from pallas_kernels.attention.segments import Flat

HEAD_DIM = 128
HEADS_FIRST = False
WARPGROUPS = 2  # that compute; each has `rows` queries (dk, dv: keys) of the block


class Tiles(NamedTuple):
    """Sizes of tiles and how many of them are in flight."""

    rows: int = 64  # of a tensor core's product: queries of a warpgroup; in dk, dv its keys, and the queries of a step
    keys: int = 128  # of a step, forward
    stages: int = 2
    dq_keys: int = 64
    dq_stages: int = 4
    dkv_stages: int = 4

    @property
    def pad(self) -> tuple[int, int]:
        block = WARPGROUPS * self.rows
        return block, math.lcm(block, self.keys, self.dq_keys)

    def __str__(self) -> str:
        return f"tiles of {WARPGROUPS * self.rows} × {self.keys}"


class Visits(NamedTuple):
    """For each block of threads the tiles it visits: whole ones first, then those under a mask."""

    counts: jax.Array  # int32 [blocks, 2]: how many are whole; how many there are
    tiles: jax.Array  # int32 [blocks, tiles]


class Lists(NamedTuple):
    forward: Visits
    dq: Visits
    dkv: Visits
    q_ids: jax.Array  # the queries' ids, but −2 for padding: equal to no key's


def tiles(queries: int, keys: int, kind: str) -> Tiles:
    """The same for every length so far: not yet measured on a GPU (docs/kernels.md)."""
    return Tiles()


def plan(flat: Flat, tiles: Tiles) -> Lists:
    """What each kernel visits."""
    block = WARPGROUPS * tiles.rows
    return Lists(
        visits(segments.kinds(flat, block, tiles.keys)),
        visits(segments.kinds(flat, block, tiles.dq_keys)),
        visits(segments.kinds(flat, tiles.rows, block).T),
        jnp.where(flat.q_ids < 0, -2, flat.q_ids),
    )


def visits(kinds: jax.Array) -> Visits:
    """[blocks, tiles] of SKIP, ALL, SOME → the lists."""
    order = jnp.array([2, 0, 1], jnp.int32)[kinds]  # of SKIP, ALL, SOME
    listed = jnp.argsort(order, axis=1, stable=True).astype(jnp.int32)
    whole, some = ((kinds == kind).sum(1, dtype=jnp.int32) for kind in (segments.ALL, segments.SOME))
    return Visits(jnp.stack([whole, whole + some], 1), listed)


def forward(q, k, v, flat: Flat, lists: Lists, tiles: Tiles, scale: float, interpret):
    """q [Tq,Hq,d], k, v [Tk,Hkv,d] → o [Tq,Hq,d], log-sum-exp [Hq,Tq]."""
    _check(q)
    return gpu_forward.forward(
        q, k, v, lists.q_ids, flat.limit, flat.k_ids, lists.forward,
        rows=tiles.rows, keys=tiles.keys, stages=tiles.stages, scale=scale, interpret=interpret,
    )  # fmt: skip


def backward(q, k, v, o, do, lse, delta, flat: Flat, lists: Lists, tiles: Tiles, scale: float, interpret):
    """→ dq [Tq,Hq,d], dk, dv [Tk,Hkv,d]; delta [Hq,Tq]: see fused.py."""
    how = dict(rows=tiles.rows, scale=scale, interpret=interpret)
    inputs = (q, k, v, do, lse, delta, lists.q_ids, flat.limit, flat.k_ids)
    dq = gpu_backward.dq(*inputs, lists.dq, keys=tiles.dq_keys, stages=tiles.dq_stages, **how)
    return dq, *gpu_backward.dkv(*inputs, lists.dkv, stages=tiles.dkv_stages, **how)


def _check(q: jax.Array) -> None:
    if q.shape[-1] != HEAD_DIM:
        raise ValueError(
            f"attention: mosaic_gpu is written for head_dim ≤ {HEAD_DIM}, this is {q.shape[-1]}; take xla."
        )
