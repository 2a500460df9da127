"""The same attention as `reference.py`, tile by tile: memory for one tile of scores, whatever the length.

In: q, k, v of one or two key sets and their segment ids. Out: attended values, zero on padding. Plain XLA, on any
platform.

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

SKIP, ALL, SOME = 0, 1, 2  # what of a tile is visible
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
    q: jax.Array, q_ids: jax.Array, parts: list[tuple[jax.Array, jax.Array, jax.Array]], scale: float, *,
    tiles: Tiles, causal: bool = False, precision=None,
) -> jax.Array:  # fmt: skip
    """Attend inside each segment with one softmax over several key sets.

    q [B,Tq,Hq,d], q_ids [B,Tq]; parts: (k [B,Tk,Hkv,d], v, ids [B,Tk]) each, negative ids are padding. Query head h
    reads key head h // (Hq / Hkv). causal: key j is visible to queries i ≥ j (for keys that are the queries' own).
    Returns [B,Tq,Hq,d] in q's dtype; a query that sees nothing gets 0.
    """
    b, tq, hq, d = q.shape
    hkv = parts[0][0].shape[2]
    group = hq // hkv
    q_ids = _blocks(q_ids, tiles.queries, -1)
    q = _blocks(q, tiles.queries)
    n, size = q.shape[1:3]
    q = q.reshape(b, n, size, hkv, group, d).transpose(0, 3, 1, 4, 2, 5).reshape(b, hkv, n, group * size, d)
    sides = []
    for k, v, ids in parts:
        ids = _blocks(ids, tiles.keys, -1)
        k, v = (_blocks(x, tiles.keys).transpose(0, 3, 1, 2, 4) for x in (k, v))  # [B,Hkv,blocks,keys,d]
        sides.append((k, v, ids, _kinds(q_ids, ids, causal)))

    def row(args):
        q, q_ids, sides = args
        heads = (q, [(k, v) for k, v, _, _ in sides])
        ids = [(ids, kinds) for _, _, ids, kinds in sides]
        one = functools.partial(_head, q_ids=q_ids, ids=ids, scale=scale, tiles=tiles, causal=causal, dot=precision)
        return jax.lax.map(one, heads) if tiles.one_head else jax.vmap(one)(heads)

    out = jax.lax.map(row, (q, q_ids, sides))  # [B,Hkv,blocks,group·queries,d]
    out = out.reshape(b, hkv, n, group, size, d).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(b, n * size, hq, d)[:, :tq]


def _head(args, q_ids, ids, scale, tiles, causal, dot):
    """One key head of one row: q [blocks, group·queries, d] → the same shape."""
    q, keys = args

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(xs):
        q, q_ids, i, kinds = xs
        total = jnp.zeros_like(q, jnp.float32)  # like q: inside shard_map a carry must vary as its update does
        state = total, jnp.full_like(total[:, :1], NOTHING), total[:, :1]
        for (k, v), (k_ids, _), kind in zip(keys, ids, kinds, strict=True):
            step = functools.partial(_tile, q=q, q_ids=q_ids, i=i, scale=scale, tiles=tiles, causal=causal, dot=dot)
            step = jax.checkpoint(step, prevent_cse=False)
            state, _ = jax.lax.scan(step, state, (k, v, k_ids, jnp.arange(len(k)), kind))
        total, _, weight = state
        return (total / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)).astype(q.dtype)

    return jax.lax.map(block, (q, q_ids, jnp.arange(len(q)), [kinds for _, kinds in ids]))


def _tile(state, xs, q, q_ids, i, scale, tiles, causal, dot):
    """Add the keys of one tile to the running softmax: state = (sum of p·v, max, sum of p), all float32."""
    k, v, k_ids, j, kind = xs
    group, queries, keys = len(q) // len(q_ids), len(q_ids), len(k_ids)

    def add(masked, state):
        total, top, weight = state
        s = jnp.einsum("rd,kd->rk", q, k, precision=dot, preferred_element_type=jnp.float32) * scale
        if masked:
            mask = (q_ids[:, None] == k_ids) & (q_ids[:, None] >= 0)
            if causal:
                mask &= i * queries + jnp.arange(queries)[:, None] >= j * keys + jnp.arange(keys)
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


def _kinds(q_ids: jax.Array, k_ids: jax.Array, causal: bool) -> jax.Array:
    """[B,n,queries], [B,m,keys] → [B,n,m] of SKIP, ALL, SOME. Sound for any ids, sharp where segments are runs."""
    q_low, q_high = (x[:, :, None] for x in _range(q_ids))
    k_low, k_high = (x[:, None] for x in _range(k_ids))
    seen = (q_low <= k_high) & (k_low <= q_high)
    whole = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    whole &= (q_ids.min(-1) >= 0)[:, :, None] & (k_ids.min(-1) >= 0)[:, None]
    if causal:
        (n, queries), (m, keys) = q_ids.shape[1:], k_ids.shape[1:]
        q_first, k_first = jnp.arange(n)[:, None] * queries, jnp.arange(m) * keys
        seen &= k_first < q_first + queries
        whole &= k_first + keys <= q_first + 1
    return jnp.where(whole, ALL, jnp.where(seen, SOME, SKIP))


def _range(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest segment of each block; padding alone is an empty range."""
    return jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids).min(-1), ids.max(-1)
