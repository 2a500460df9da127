"""Hopper backward kernels: dq of 128 queries, dk and dv of 128 keys; weights are recomputed from the log-sum-exp.

In: what the forward pass saw, its log-sum-exp and delta = rowsum(do · o) − dlse. Out: the gradients, in q's and k's
dtype, summed in float32.

    p = exp(scale · q·kᵀ − lse)     ds = p (do·vᵀ − delta)
    dq = scale · ds·k               dk = scale · dsᵀ·q       dv = pᵀ·do

Two kernels recompute p and ds instead of one that adds to dq from many blocks: two products more, but the same result
every time and no memory besides the outputs (spec kernels.md a.5).
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

LOG2E = math.log2(math.e)


def dq(
    q, k, v, do, lse, delta, q_ids, limit, k_ids, visits,
    *, rows: int, keys: int, stages: int, scale: float, interpret,
):  # fmt: skip
    """→ dq [Tq,Hq,d]. q, do [Tq,Hq,d], k, v [Tk,Hkv,d], lse, delta [Hq,Tq]; visits: of tiles [2·rows, keys]."""
    (tq, heads, d), kv_heads = q.shape, k.shape[1]
    pairs = gpu.COMPUTE
    scratch = dict(
        q=gpu.tile(pairs, rows, d, dtype=q.dtype),
        do=gpu.tile(pairs, rows, d, dtype=q.dtype),
        k=gpu.tile(stages, keys, d, dtype=q.dtype),
        v=gpu.tile(stages, keys, d, dtype=q.dtype),
        lse=gpu.numbers(pairs, rows, dtype=jnp.float32),
        delta=gpu.numbers(pairs, rows, dtype=jnp.float32),
        q_ids=gpu.numbers(pairs, rows),
        limit=gpu.numbers(pairs, rows),
        k_ids=gpu.numbers(stages, keys),
        q_ready=plgpu.Barrier(num_arrivals=6, num_barriers=pairs),
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ids_ready=plgpu.Barrier(num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=pairs, num_barriers=stages),
    )
    grid = dict(kv_head=kv_heads, tile=tq // (pairs * rows), member=heads // kv_heads)
    how = dict(group=heads // kv_heads, rows=rows, keys=keys, stages=stages, scale=scale, interpret=interpret)
    body = functools.partial(_dq_kernel, **how)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    run = gpu.call(body, "attention_dq", grid, out, scratch, interpret)
    return run(q, k, v, do, lse, delta, q_ids, limit, k_ids, visits.counts, visits.tiles)


def _dq_kernel(
    q_in, k_in, v_in, do_in, lse_in, delta_in, q_ids_in, limit_in, k_ids_in, counts, index, dq_out,
    *, q, do, k, v, lse, delta, q_ids, limit, k_ids, q_ready, ready, ids_ready, free,
    group: int, rows: int, keys: int, stages: int, scale: float, interpret,
):  # fmt: skip
    me, at, kv_head = lax.axis_index("warpgroup"), lax.axis_index("tile"), lax.axis_index("kv_head")
    head = kv_head * group + lax.axis_index("member")
    whole, steps = counts[at, 0], counts[at, 1]

    @pl.when(me == gpu.COPY)
    def _copy():
        plgpu.set_max_registers(gpu.COPY_REGISTERS, action="decrease")

        def load(step, slot, masked):
            block = pl.ds(index[at, step] * keys, keys)
            gpu.fetch(
                (k_in.at[block, kv_head], k.at[slot]), (v_in.at[block, kv_head], v.at[slot]), barrier=ready.at[slot]
            )
            if masked:
                gpu.fetch((k_ids_in.at[block], k_ids.at[slot]), barrier=ids_ready.at[slot])

        gpu.produce(0, whole, stages, free, functools.partial(load, masked=False))
        gpu.produce(whole, steps, stages, free, functools.partial(load, masked=True))
        gpu.drain(steps, stages, free)

    @pl.when(me != gpu.COPY)
    def _compute():
        plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")
        mine = pl.ds((at * gpu.COMPUTE + me) * rows, rows)
        gpu.fetch(
            (q_in.at[mine, head], q.at[me]),
            (do_in.at[mine, head], do.at[me]),
            (lse_in.at[head, mine], lse.at[me]),
            (delta_in.at[head, mine], delta.at[me]),
            (q_ids_in.at[mine], q_ids.at[me]),
            (limit_in.at[mine], limit.at[me]),
            barrier=q_ready.at[me],
        )
        plgpu.barrier_wait(q_ready.at[me])
        my_lse = plgpu.load(lse.at[me], layout=gpu.ROWS) * LOG2E
        my_delta, my_ids, my_limit = (plgpu.load(x.at[me], layout=gpu.ROWS) for x in (delta, q_ids, limit))
        shape = (rows, keys)

        def visit(step, total, masked):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(ready.at[slot])

            def weights(s):
                p = jnp.exp2(s * (scale * LOG2E) - gpu.over_rows(my_lse, shape))
                if not masked:
                    return p
                plgpu.barrier_wait(ids_ready.at[slot])
                ids = plgpu.load(k_ids.at[slot], layout=gpu.COLUMNS)
                before = gpu.position(shape, 1) < gpu.over_rows(my_limit - index[at, step] * keys, shape)
                seen = (gpu.over_columns(ids, shape) == gpu.over_rows(my_ids, shape)) & before
                return jnp.where(seen, p, 0.0)  # of a dead row, and not the scores: its p is inf

            p, dp = gpu.two_products(q.at[me], k.at[slot].T, weights, do.at[me], v.at[slot].T)
            ds = p * (dp - gpu.over_rows(my_delta, shape))
            (total,) = gpu.accumulate((total, lambda: ds, k.at[slot]), interpret=interpret)
            gpu.release(free.at[slot], interpret)
            return total

        total = lax.fori_loop(0, whole, functools.partial(visit, masked=False), gpu.zeros(rows, q.shape[-1]))
        total = lax.fori_loop(whole, steps, functools.partial(visit, masked=True), total)
        q.at[me][...] = (total * scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q.at[me], dq_out.at[mine, head])
        plgpu.wait_smem_to_gmem(0)


def dkv(
    q, k, v, do, lse, delta, q_ids, limit, k_ids, visits,
    *, rows: int, stages: int, scale: float, interpret,
):  # fmt: skip
    """→ dk, dv [Tk,Hkv,d], summed over the query heads of each group. visits: of tiles [rows, 2·rows], transposed."""
    (_, heads, d), (tk, kv_heads, _) = q.shape, k.shape
    pairs = gpu.COMPUTE
    scratch = dict(
        k=gpu.tile(pairs, rows, d, dtype=q.dtype),
        v=gpu.tile(pairs, rows, d, dtype=q.dtype),
        q=gpu.tile(stages, rows, d, dtype=q.dtype),
        do=gpu.tile(stages, rows, d, dtype=q.dtype),
        lse=gpu.numbers(stages, rows, dtype=jnp.float32),
        delta=gpu.numbers(stages, rows, dtype=jnp.float32),
        q_ids=gpu.numbers(stages, rows),
        limit=gpu.numbers(stages, rows),
        k_ids=gpu.numbers(pairs, rows),
        k_ready=plgpu.Barrier(num_arrivals=3, num_barriers=pairs),
        ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        ids_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=pairs, num_barriers=stages),
    )
    grid = dict(kv_head=kv_heads, tile=tk // (pairs * rows))
    body = functools.partial(
        _dkv_kernel, group=heads // kv_heads, rows=rows, stages=stages, scale=scale, interpret=interpret
    )
    out = (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype))
    run = gpu.call(body, "attention_dkv", grid, out, scratch, interpret)
    return run(q, k, v, do, lse, delta, q_ids, limit, k_ids, visits.counts, visits.tiles)


def _dkv_kernel(
    q_in, k_in, v_in, do_in, lse_in, delta_in, q_ids_in, limit_in, k_ids_in, counts, index, dk_out, dv_out,
    *, q, do, k, v, lse, delta, q_ids, limit, k_ids, k_ready, ready, ids_ready, free,
    group: int, rows: int, stages: int, scale: float, interpret,
):  # fmt: skip
    me, at, kv_head = lax.axis_index("warpgroup"), lax.axis_index("tile"), lax.axis_index("kv_head")
    whole, visited = counts[at, 0], counts[at, 1]
    steps = visited * group  # a tile is visited by each head of the group, one after the other

    @pl.when(me == gpu.COPY)
    def _copy():
        plgpu.set_max_registers(gpu.COPY_REGISTERS, action="decrease")

        def load(step, slot, masked):
            block = pl.ds(index[at, lax.div(step, group)] * rows, rows)
            head = kv_head * group + lax.rem(step, group)
            gpu.fetch(
                (q_in.at[block, head], q.at[slot]),
                (lse_in.at[head, block], lse.at[slot]),
                (do_in.at[block, head], do.at[slot]),
                (delta_in.at[head, block], delta.at[slot]),
                barrier=ready.at[slot],
            )
            if masked:
                gpu.fetch(
                    (q_ids_in.at[block], q_ids.at[slot]),
                    (limit_in.at[block], limit.at[slot]),
                    barrier=ids_ready.at[slot],
                )

        gpu.produce(0, whole * group, stages, free, functools.partial(load, masked=False))
        gpu.produce(whole * group, steps, stages, free, functools.partial(load, masked=True))
        gpu.drain(steps, stages, free)

    @pl.when(me != gpu.COPY)
    def _compute():
        plgpu.set_max_registers(gpu.COMPUTE_REGISTERS, action="increase")
        start = (at * gpu.COMPUTE + me) * rows
        mine = pl.ds(start, rows)
        gpu.fetch(
            (k_in.at[mine, kv_head], k.at[me]),
            (v_in.at[mine, kv_head], v.at[me]),
            (k_ids_in.at[mine], k_ids.at[me]),
            barrier=k_ready.at[me],
        )
        plgpu.barrier_wait(k_ready.at[me])
        my_ids = plgpu.load(k_ids.at[me], layout=gpu.ROWS)
        shape = (rows, rows)  # keys × queries: everything is transposed here

        def visit(step, carry, masked):
            dk, dv = carry
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(ready.at[slot])

            def weights(s):
                its_lse = plgpu.load(lse.at[slot], layout=gpu.COLUMNS) * LOG2E
                p = jnp.exp2(s * (scale * LOG2E) - gpu.over_columns(its_lse, shape))
                if not masked:
                    return p
                plgpu.barrier_wait(ids_ready.at[slot])
                ids, most = (plgpu.load(x.at[slot], layout=gpu.COLUMNS) for x in (q_ids, limit))
                before = gpu.position(shape, 0) < gpu.over_columns(most - start, shape)
                seen = (gpu.over_columns(ids, shape) == gpu.over_rows(my_ids, shape)) & before
                return jnp.where(seen, p, 0.0)

            p, dp = gpu.two_products(k.at[me], q.at[slot].T, weights, v.at[me], do.at[slot].T)

            def ds():
                its_delta = plgpu.load(delta.at[slot], layout=gpu.COLUMNS)
                return p * (dp - gpu.over_columns(its_delta, shape))

            dv, dk = gpu.accumulate((dv, lambda: p, do.at[slot]), (dk, ds, q.at[slot]), interpret=interpret)
            gpu.release(free.at[slot], interpret)
            return dk, dv

        carry = gpu.zeros(rows, k.shape[-1]), gpu.zeros(rows, k.shape[-1])
        carry = lax.fori_loop(0, whole * group, functools.partial(visit, masked=False), carry)
        dk, dv = lax.fori_loop(whole * group, steps, functools.partial(visit, masked=True), carry)
        k.at[me][...] = (dk * scale).astype(k.dtype)
        v.at[me][...] = dv.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k.at[me], dk_out.at[mine, kv_head])
        plgpu.copy_smem_to_gmem(v.at[me], dv_out.at[mine, kv_head])
        plgpu.wait_smem_to_gmem(0)
