"""The same attention as `reference.py`, tile by tile: memory for one tile of scores, whatever the length.

In: q, k, v of one or more key sets and their masks. Out: attended values, zero on padding, and the log-sum-exp. Plain
XLA, on any platform.

    for each row, for each query block:  running (sum of p·v, max, sum of p)
        for each key block:  nothing visible → skip;  everything visible → no mask;  else → masked scores
        divide once at the end

The running softmax is Milakov & Gimelshein's (arXiv:1805.02867), the tiling FlashAttention's (arXiv:2205.14135).
Padding, other segments and the future cost nothing beyond the tiles on their border. The backward pass recomputes each
tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.attention.segments import by_range, code

NOTHING = jnp.finfo(jnp.float32).min  # the running max before any key; finite, so that exp(-inf − max) is 0


@dataclass(frozen=True)
class Tiles:
    """Largest tile, and how heads and invisible tiles are treated (measured on a CPU: docs/speed.md)."""

    queries: int = 256
    keys: int = 1024
    one_head: bool = True  # True: one key head at a time (fits a CPU's cache); False: all at once (fills a GPU)
    skip: bool = True  # False: mask every tile, and never branch on what ids say


CPU = Tiles()
ACCELERATOR = Tiles(queries=512, keys=1024, one_head=False, skip=False)


def attend(
    q: jax.Array, q_ids: jax.Array, parts: list[tuple], scale: float, *, tiles: Tiles, precision=None
) -> tuple[jax.Array, jax.Array]:
    """Attend inside each segment with one softmax over several key sets.

    q [B,Tq,Hq,d], q_ids [B,Tq]; parts: (k [B,Tk,Hkv,d], v, ids [B,Tk], limit [B,Tq] or None) each, as in `Masks`.
    Query head h reads key head h // (Hq / Hkv). Returns [B,Tq,Hq,d] in q's dtype and the log-sum-exp [B,Hq,Tq]; a query
    that sees nothing gets 0 and −inf.
    """
    b, tq, hq, d = q.shape
    hkv = parts[0][0].shape[2]
    group = hq // hkv
    q_ids = _blocks(q_ids, tiles.queries, -1)
    q = _blocks(q, tiles.queries)
    n, size = q.shape[1:3]
    q = q.reshape(b, n, size, hkv, group, d).transpose(0, 3, 1, 4, 2, 5).reshape(b, hkv, n, group * size, d)
    sides = []
    for k, v, ids, limit in parts:
        ids = _blocks(ids, tiles.keys, -1)
        limit = None if limit is None else _blocks(limit, tiles.queries, 0)
        k, v = (_blocks(x, tiles.keys).transpose(0, 3, 1, 2, 4) for x in (k, v))  # [B,Hkv,blocks,keys,d]
        kinds = jax.vmap(lambda *x: code(*by_range(*x)))(q_ids, ids, limit)
        sides.append((k, v, (ids, limit, kinds)))

    def row(args):
        q, q_ids, sides = args
        heads = (q, [(k, v) for k, v, _ in sides])
        masks = [mask for _, _, mask in sides]
        one = functools.partial(_head, q_ids=q_ids, masks=masks, scale=scale, tiles=tiles, dot=precision)
        return jax.lax.map(one, heads) if tiles.one_head else jax.vmap(one)(heads)

    out, lse = jax.lax.map(row, (q, q_ids, sides))  # [B,Hkv,blocks,group·queries,d or 1]
    out = out.reshape(b, hkv, n, group, size, d).transpose(0, 2, 4, 1, 3, 5).reshape(b, n * size, hq, d)
    lse = lse.reshape(b, hkv, n, group, size).transpose(0, 1, 3, 2, 4).reshape(b, hq, n * size)
    return out[:, :tq], lse[:, :, :tq]


def _head(args, q_ids, masks, scale, tiles, dot):
    """One key head of one row: q [blocks, group·queries, d] → the same shape, and the log-sum-exp."""
    q, keys = args

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(xs):
        q, q_ids, masks = xs
        total = jnp.zeros_like(q, jnp.float32)  # like q: inside shard_map a carry must vary as its update does
        state = total, jnp.full_like(total[:, :1], NOTHING), total[:, :1]
        for (k, v), k_ids, (limit, kinds) in zip(keys, ids, masks, strict=True):
            step = functools.partial(_tile, q=q, q_ids=q_ids, limit=limit, scale=scale, tiles=tiles, dot=dot)
            step = jax.checkpoint(step, prevent_cse=False)
            state, _ = jax.lax.scan(step, state, (k, v, k_ids, jnp.arange(len(k)), kinds))
        total, top, weight = state
        some = jnp.where(weight > 0, weight, 1.0)  # not a tiny number: a cotangent divided by it would be infinite
        return (total / some).astype(q.dtype), jnp.where(weight > 0, top + jnp.log(some), -jnp.inf)

    ids = [ids for ids, _, _ in masks]
    return jax.lax.map(block, (q, q_ids, [(limit, kinds) for _, limit, kinds in masks]))


def _tile(state, xs, q, q_ids, limit, scale, tiles, dot):
    """Add the keys of one tile to the running softmax: state = (sum of p·v, max, sum of p), all float32."""
    k, v, k_ids, j, kind = xs
    group, queries, keys = len(q) // len(q_ids), len(q_ids), len(k_ids)

    def add(masked, state):
        total, top, weight = state
        s = jnp.einsum("rd,kd->rk", q, k, precision=dot, preferred_element_type=jnp.float32) * scale
        if masked:
            mask = (q_ids[:, None] == k_ids) & (q_ids[:, None] >= 0)
            if limit is not None:
                mask &= j * keys + jnp.arange(keys) < limit[:, None]
            s = jnp.where(mask, s.reshape(group, queries, keys), -jnp.inf).reshape(s.shape)
        new = jax.lax.stop_gradient(jnp.maximum(top, s.max(-1, keepdims=True)))
        p, shrink = jnp.exp(s - new), jnp.exp(top - new)
        values = jnp.einsum("rk,kd->rd", p.astype(v.dtype), v, precision=dot, preferred_element_type=jnp.float32)
        return total * shrink + values, new, weight * shrink + p.sum(-1, keepdims=True)

    if not tiles.skip:
        return add(True, state), None
    branches = [lambda s: s, functools.partial(add, False), functools.partial(add, True)]
    return jax.lax.switch(kind, branches, state), None


def _blocks(x: jax.Array, most: int, fill=0) -> jax.Array:
    """[B,T,…] → [B,blocks,size,…], size ≤ most and as even as it can be; the end is padded with `fill`."""
    t = x.shape[1]
    n = max(-(-t // most), 1)
    size = -(-t // n)
    x = jnp.pad(x, ((0, 0), (0, n * size - t), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    return x.reshape(x.shape[0], n, size, *x.shape[2:])
