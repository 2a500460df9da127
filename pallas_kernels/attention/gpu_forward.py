"""Hopper forward kernel: two warpgroups of 64 queries of one head take turns at the tensor cores.

In: q, k, v token-major, ids, limits and the tiles to visit. Out: o in q's dtype and the natural log-sum-exp.

    copying warpgroup:   for each tile of the list: keys, values (and, in tiles that need a mask, the keys' ids)
    compute warpgroups:  for tiles that are visible as a whole: scores → softmax → values
                         for the others: the same under the mask
    one's softmax runs while the other multiplies (FlashAttention-3, arXiv:2407.08608: "ping-pong")

The running maximum is kept in powers of two, already scaled, so that a weight is one multiply-add and one exp2.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import gpu_mosaic as gpu

NOTHING = float(jnp.finfo(jnp.float32).min)  # the running max before any key; finite, so that exp2(-inf − max) is 0


def forward(q, k, v, q_ids, limit, k_ids, visits, *, rows: int, keys: int, stages: int, scale: float, interpret):
    """q [Tq,Hq,d], k, v [Tk,Hkv,d] → o [Tq,Hq,d], log-sum-exp [Hq,Tq]. visits: of tiles [2·rows, keys]."""
    tq, heads, d = q.shape
    body = functools.partial(
        _kernel, group=heads // k.shape[1], rows=rows, keys=keys, stages=stages, scale=scale, interpret=interpret
    )
    pairs = gpu.COMPUTE
    scratch = dict(
        qo=gpu.tile(pairs, rows, d, dtype=q.dtype),
        k=gpu.tile(stages, keys, d, dtype=q.dtype),
        v=gpu.tile(stages, keys, d, dtype=q.dtype),
        lse=gpu.numbers(pairs, rows, dtype=jnp.float32),
        q_ids=gpu.numbers(pairs, rows),
        limit=gpu.numbers(pairs, rows),
        k_ids=gpu.numbers(stages, keys),
        q_ready=plgpu.Barrier(num_arrivals=3, num_barriers=pairs),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        ids_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=pairs, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=pairs, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=pairs),
    )
    grid = dict(kv_head=k.shape[1], tile=tq // (pairs * rows), member=heads // k.shape[1])
    out = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((heads, tq), jnp.float32))
    run = gpu.call(body, "attention_forward", grid, out, scratch, interpret)
    return run(q, k, v, q_ids, limit, k_ids, visits.counts, visits.tiles)


def _kernel(
    q_in, k_in, v_in, q_ids_in, limit_in, k_ids_in, counts, index, o_out, lse_out,
    *, qo, k, v, lse, q_ids, limit, k_ids, q_ready, k_ready, v_ready, ids_ready, k_free, v_free, turn,
    group: int, rows: int, keys: int, stages: int, scale: float, interpret,
):  # fmt: skip
    me, at, kv_head = lax.axis_index("warpgroup"), lax.axis_index("tile"), lax.axis_index("kv_head")
    head = kv_head * group + lax.axis_index("member")
    whole, steps = counts[at, 0], counts[at, 1]

    @pl.when(me == gpu.COPY)
    def _copy():
        plgpu.set_max_registers(gpu.COPY_REGISTERS, action="decrease")

        def load(step, masked):
            slot, block = lax.rem(step, stages), pl.ds(index[at, step] * keys, keys)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
            gpu.fetch((k_in.at[block, kv_head], k.at[slot]), barrier=k_ready.at[slot])
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
            if masked:  # ids are read between keys and values: free when the values are
                gpu.fetch((k_ids_in.at[block], k_ids.at[slot]), barrier=ids_ready.at[slot])
            gpu.fetch((v_in.at[block, kv_head], v.at[slot]), barrier=v_ready.at[slot])

        pl.loop(0, whole)(functools.partial(load, masked=False))
        pl.loop(whole, steps)(functools.partial(load, masked=True))
        gpu.drain(steps, stages, k_free, v_free)

    @pl.when(me != gpu.COPY)
    def _compute():
        plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")
        mine = pl.ds((at * gpu.COMPUTE + me) * rows, rows)
        gpu.fetch(
            (q_in.at[mine, head], qo.at[me]),
            (q_ids_in.at[mine], q_ids.at[me]),
            (limit_in.at[mine], limit.at[me]),
            barrier=q_ready.at[me],
        )
        plgpu.barrier_wait(q_ready.at[me])

        def swap():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def visit(step, carry, masked):
            total, top, weight = carry
            slot = lax.rem(step, stages)
            shape = (rows, keys)
            plgpu.barrier_wait(k_ready.at[slot])
            s = gpu.product(qo.at[me], k.at[slot].T, after=swap)
            gpu.release(k_free.at[slot], interpret)
            if masked:
                plgpu.barrier_wait(ids_ready.at[slot])
                ids = plgpu.load(k_ids.at[slot], layout=gpu.COLUMNS)
                s = jnp.where(seen(ids, index[at, step] * keys, shape), s, -jnp.inf)
            new = jnp.maximum(top, s.max(axis=1) * c)
            shrink = jnp.exp2(top - new)
            p = jnp.exp2(s * c - gpu.over_rows(new, shape))
            total *= gpu.over_rows(shrink, total.shape)
            weight = weight * shrink + p.sum(axis=1)
            p = p.astype(v.dtype)
            total, weight, new, p = lax.optimization_barrier((total, weight, new, p))
            plgpu.barrier_arrive(turn)  # the tensor cores are the other's after its softmax …
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)  # … and mine again
            (total,) = gpu.accumulate((total, lambda: p, v.at[slot]), interpret=interpret)
            gpu.release(v_free.at[slot], interpret)
            return total, new, weight

        c = scale * math.log2(math.e)
        carry = gpu.zeros(rows, qo.shape[-1]), gpu.filled(rows, NOTHING), gpu.filled(rows, 0.0)
        pl.when(me == 1)(swap)
        carry = lax.fori_loop(0, whole, functools.partial(visit, masked=False), carry)
        my_ids, my_limit = (plgpu.load(x.at[me], layout=gpu.ROWS) for x in (q_ids, limit))

        def seen(ids, start, shape):
            before = gpu.position(shape, 1) < gpu.over_rows(my_limit - start, shape)
            return (gpu.over_columns(ids, shape) == gpu.over_rows(my_ids, shape)) & before

        total, top, weight = lax.fori_loop(whole, steps, functools.partial(visit, masked=True), carry)
        pl.when(me == 0)(swap)

        some = jnp.maximum(weight, float(jnp.finfo(jnp.float32).tiny))
        qo.at[me][...] = (total * gpu.over_rows(1 / some, total.shape)).astype(qo.dtype)
        lse.at[me][...] = jnp.where(weight > 0, top * math.log(2) + jnp.log(some), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(qo.at[me], o_out.at[mine, head])
        plgpu.copy_smem_to_gmem(lse.at[me], lse_out.at[head, mine])
        plgpu.wait_smem_to_gmem(0)
