"""Fused packed attention for TPUs: forward, dq, and dk with dv, in Mosaic (contract: fused.py).

In: q [Hq,Tq,d], k and v [Hkv,Tk,d], the lists of `tpu_lists.py`. Out: attended values and log-sum-exp, or gradients.

    grid: heads × entries of the list          one list per step, its length is a number the program computes
      forward, dq   list by queries: one tile of queries stays, tiles of keys pass; written at the last
      dk and dv     list by keys: one tile of keys stays, tiles of queries pass, of each query head that reads these
                    keys (innermost axis): their sum is float32 and written once

A tile is computed `chunk` columns at a time with a running base-2 softmax (FlashAttention-2, arXiv:2307.08691). The
scale multiplies float32 scores: folded into a bfloat16 q it would round q a second time. Tiles in which everything is
visible touch no mask. Query quantities are columns [queries,128], equal along lanes, in forward and dq, and rows
[1,queries] in dk/dv, which computes scores transposed; nothing is transposed inside the loop.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.segments import Flat
from pallas_kernels.attention.tpu_lists import LANES, Lists, Tiles, key_tile, plan, query_tile, read, tiles

__all__ = ["HEADS_FIRST", "HEAD_DIM", "Tiles", "backward", "forward", "plan", "tiles"]
HEAD_DIM = LANES
HEADS_FIRST = True
NOTHING = -1e30  # the running max before any key; finite, so that exp2(−inf − max) is 0
LOG2E = math.log2(math.e)


def forward(q, k, v, flat: Flat, lists: Lists, sizes: Tiles, scale: float, interpret):
    """→ (o as q, log-sum-exp [Hq,Tq] float32)."""
    o, lse = _by_query(
        functools.partial(_forward_kernel, scale=scale),
        "attention_forward", (q,), (k, v), (), flat, lists, sizes, interpret,
        outputs=[q, jax.ShapeDtypeStruct((q.shape[0], 1, q.shape[1]), jnp.float32)],
        scratch=[(sizes.queries, q.shape[2]), (sizes.queries, LANES), (sizes.queries, LANES)],
    )  # fmt: skip
    return o, lse[:, 0]


def backward(q, k, v, o, do, lse, delta, flat: Flat, lists: Lists, sizes: Tiles, scale: float, interpret):
    """→ (dq, dk, dv). lse, delta [Hq,Tq] float32."""
    lse, delta = lse[:, None], delta[:, None]
    (dq,) = _by_query(
        functools.partial(_dq_kernel, scale=scale),
        "attention_dq", (q, do), (k, v), (lse, delta), flat, lists, sizes, interpret,
        outputs=[q],
        scratch=[(sizes.queries, q.shape[2]), (sizes.queries, LANES), (sizes.queries, LANES)],
    )  # fmt: skip
    return dq, *_dkv(q, k, v, do, lse, delta, flat, lists, sizes, scale, interpret)


def _by_query(kernel, name, of_q, of_k, rows, flat, lists, sizes, interpret, outputs, scratch):
    """Run a kernel over the list by queries.

    of_q, of_k [H,T,d]; rows [Hq,1,Tq]; outputs: things of their shape and dtype; scratch: shapes, float32.
    """
    heads, _, d = of_q[0].shape
    group = heads // of_k[0].shape[0]
    column = pl.BlockSpec((sizes.queries, LANES), lambda h, t, work: (query_tile(work[t]), 0))
    k_ids = pl.BlockSpec((1, sizes.keys), lambda h, t, work: (0, key_tile(work[t])))
    block = pl.BlockSpec((None, sizes.queries, d), lambda h, t, work: (h, query_tile(work[t]), 0))
    keys = pl.BlockSpec((None, sizes.keys, d), lambda h, t, work: (h // group, key_tile(work[t]), 0))
    row = pl.BlockSpec((None, 1, sizes.queries), lambda h, t, work: (h, 0, query_tile(work[t])))
    return pl.pallas_call(
        functools.partial(kernel, chunk=sizes.chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, lists.query_steps[0]),
            in_specs=[column, column, k_ids] + [block] * len(of_q) + [keys] * len(of_k) + [row] * len(rows),
            out_specs=[row if x.shape[1] == 1 else block for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=_params(sizes, 2),
        interpret=interpret,
        name=name,
    )(lists.by_query, lists.q_ids, lists.limit, flat.k_ids[None], *of_q, *of_k, *rows)


def _dkv(q, k, v, do, lse, delta, flat, lists, sizes, scale, interpret):
    heads, _, d = k.shape
    group = q.shape[0] // heads
    column = pl.BlockSpec((sizes.keys, LANES), lambda h, t, g, work: (key_tile(work[t]), 0))
    of_all = pl.BlockSpec((1, sizes.queries), lambda h, t, g, work: (0, query_tile(work[t])))
    row = pl.BlockSpec((None, 1, sizes.queries), lambda h, t, g, work: (h * group + g, 0, query_tile(work[t])))
    block = pl.BlockSpec((None, sizes.queries, d), lambda h, t, g, work: (h * group + g, query_tile(work[t]), 0))
    keys = pl.BlockSpec((None, sizes.keys, d), lambda h, t, g, work: (h, key_tile(work[t]), 0))
    return pl.pallas_call(
        functools.partial(_dkv_kernel, chunk=sizes.chunk, scale=scale, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, lists.key_steps[0], group),
            in_specs=[of_all, of_all, column, block, block, keys, keys, row, row],
            out_specs=[keys, keys],
            scratch_shapes=[pltpu.VMEM((sizes.keys, d), jnp.float32) for _ in range(2)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_params(sizes, 3),
        interpret=interpret,
        name="attention_dkv",
    )(lists.by_key, lists.q_ids[None, :, 0], flat.limit[None], lists.k_ids, q, do, k, v, lse, delta)


def _params(sizes: Tiles, axes: int) -> pltpu.CompilerParams:
    semantics = [pltpu.PARALLEL] + [pltpu.ARBITRARY] * (axes - 1)  # heads may go to different cores
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=sizes.vmem)


def _forward_kernel(work, q_ids, limit, k_ids, q, k, v, o, lse, total, top, weight, *, chunk, scale):
    """total [queries,d]: sum of p·v; top: running max of raw scores; weight: sum of p, one partial sum per lane."""
    entry = read(work[pl.program_id(1)])

    @pl.when(entry.first)
    def _():
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, NOTHING)
        weight[...] = jnp.zeros_like(weight)

    def tile(masked: bool):
        for part in _parts(len(k), chunk):
            s = _dot(q[...], k[part], 1, 1)
            if masked:
                s = jnp.where(_visible(q_ids, limit, k_ids, entry.key * len(k), part), s, -jnp.inf)
            best = functools.reduce(jnp.maximum, _groups(s)).max(1, keepdims=True)
            old, new = top[...], jnp.maximum(top[...], best)
            shrink = jnp.exp2((old - new) * (scale * LOG2E))
            p = jnp.exp2((s - _wide(new, s)) * (scale * LOG2E))
            weight[...] = weight[...] * shrink + sum(_groups(p))
            total[...] = total[...] * _wide(shrink, total) + _dot(p.astype(v.dtype), v[part], 1, 0)
            top[...] = new

    pl.when(entry.full)(functools.partial(tile, False))
    pl.when(entry.some)(functools.partial(tile, True))

    @pl.when(entry.last)
    def _():
        whole = weight[...].sum(1, keepdims=True)
        least = jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
        o[...] = (total[...] / least).astype(o.dtype)
        lse[...] = _row(jnp.where(whole > 0, top[...] * scale + jnp.log(least), -jnp.inf))


def _dq_kernel(
    work, q_ids, limit, k_ids, q, do, k, v, lse, delta, dq, total, lse_column, delta_column, *, chunk, scale
):
    entry = read(work[pl.program_id(1)])

    @pl.when(entry.first)
    def _():
        total[...] = jnp.zeros_like(total)
        lse_column[...] = _column(lse[...] * LOG2E)
        delta_column[...] = _column(delta[...])

    def tile(masked: bool):
        for part in _parts(len(k), chunk):
            s = _dot(q[...], k[part], 1, 1)
            p = jnp.exp2(s * (scale * LOG2E) - _wide(lse_column[...], s))
            if masked:
                p = jnp.where(_visible(q_ids, limit, k_ids, entry.key * len(k), part), p, 0.0)
            ds = p * (_dot(do[...], v[part], 1, 1) - _wide(delta_column[...], s))
            total[...] += _dot(ds.astype(k.dtype), k[part], 1, 0)

    pl.when(entry.full)(functools.partial(tile, False))
    pl.when(entry.some)(functools.partial(tile, True))

    @pl.when(entry.last)
    def _():
        dq[...] = (total[...] * scale).astype(dq.dtype)


def _dkv_kernel(work, q_ids, limit, k_ids, q, do, k, v, lse, delta, dk, dv, k_total, v_total, *, chunk, scale, group):
    entry, member = read(work[pl.program_id(1)]), pl.program_id(2)

    @pl.when(entry.first & (member == 0))
    def _():
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    def tile(masked: bool):
        for part in _parts(len(q), chunk):
            s = _dot(k[...], q[part], 1, 1)  # [keys, queries]
            p = jnp.exp2(s * (scale * LOG2E) - lse[:, part] * LOG2E)
            if masked:
                at = entry.key * len(k) + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
                p = jnp.where((_wide(k_ids[...], s) == q_ids[:, part]) & (at < limit[:, part]), p, 0.0)
            v_total[...] += _dot(p.astype(do.dtype), do[part], 1, 0)
            ds = p * (_dot(v[...], do[part], 1, 1) - delta[:, part])
            k_total[...] += _dot(ds.astype(q.dtype), q[part], 1, 0)

    pl.when(entry.full)(functools.partial(tile, False))
    pl.when(entry.some)(functools.partial(tile, True))

    @pl.when(entry.last & (member == group - 1))
    def _():
        dk[...] = (k_total[...] * scale).astype(dk.dtype)
        dv[...] = v_total[...].astype(dv.dtype)


def _visible(q_ids, limit, k_ids, start, part: slice) -> jax.Array:
    """bool [queries, part]: the rule of segments.py. q_ids, limit [queries,128]; k_ids [1,keys]; start: of the tile."""
    ids = k_ids[:, part]
    at = start + part.start + jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    return (_wide(q_ids[...], ids) == ids) & (at < _wide(limit[...], ids))


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Contract axis `of_a` of a with `of_b` of b in float32; bfloat16 exactly, float32 in full precision."""
    how = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    numbers = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=how, preferred_element_type=jnp.float32)


def _parts(size: int, chunk: int) -> list[slice]:
    return [slice(at, min(at + chunk, size)) for at in range(0, size, chunk)]


def _groups(x: jax.Array) -> list[jax.Array]:
    """[n,m] → its columns, 128 at a time: whole registers."""
    return [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]


def _wide(x: jax.Array, like) -> jax.Array:
    """[n,128], equal along lanes → [n,m] with the width of `like`."""
    return x if like.shape[1] == LANES else jnp.concatenate([x] * (like.shape[1] // LANES), 1)


def _row(column: jax.Array) -> jax.Array:
    """[n,128], equal along lanes → [1,n]."""
    return column.T[:1]


def _column(row: jax.Array) -> jax.Array:
    """[1,n] → [n,128], equal along lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T
