"""Who sees whom: segment ids and limits → masks, and which tiles of a score matrix hold anything.

In: int32 ids of packed tokens (−1 is padding; in a row each sample is one run, ids rising). Out: `Masks` in rows, as
the model has them; `Flat`, all rows as one buffer, as the kernels want them; `kinds` of its tiles.

    query i sees key j of a key set    ⇔    q_ids[i] = k_ids[j] ≥ 0   and   j < limit[i]

Causal attention, attention inside a sample, frame-causal attention and padding are all this rule (spec kernels.md K4).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

SKIP, ALL, SOME = 0, 1, 2  # what of a tile is visible
SEGMENTS = 2**16  # segment ids of one row are below this


class Segments(NamedTuple):
    """The sample of each token of a packed batch, int32."""

    und: jax.Array  # [B,U]
    gen: jax.Array | None = None  # [B,G]
    gen_limit: jax.Array | None = None  # [B,G]: a gen query sees gen tokens of its row before this one; None = all


class Masks(NamedTuple):
    """Queries against one or more key sets, row by row. All int32."""

    q_ids: jax.Array  # [B,Tq]
    k_ids: tuple[jax.Array, ...]  # [B,Tk] each
    limits: tuple[jax.Array | None, ...]  # [B,Tq] each: exclusive position in that key set; None = no limit


class Flat(NamedTuple):
    """The same as one buffer of queries and one of keys, key sets side by side in each row. All int32.

    A query's visible keys are one run per key set: `first` … `last` (both inclusive; first > last: none).
    """

    q_ids: jax.Array  # [Tq]
    k_ids: jax.Array  # [Tk]
    limit: jax.Array  # [Tq]: exclusive position in the buffer of keys; keys past it, in any set, are not seen
    first: jax.Array  # [Tq, key sets]
    last: jax.Array  # [Tq, key sets]
    runs: jax.Array  # bool [1]: ids were runs in rising order, so first and last can be trusted


def causal(ids: jax.Array) -> Masks:
    """Queries and keys are the same tokens; none sees a later one. ids [B,T]."""
    limit = jnp.broadcast_to(jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32), ids.shape)
    return Masks(ids, (ids,), (limit,))


def und_masks(s: Segments) -> Masks:
    """und queries over und keys: causal inside a sample."""
    return causal(s.und)


def gen_masks(s: Segments) -> Masks:
    """gen queries over [und; gen] keys of their sample."""
    return Masks(s.gen, (s.und, s.gen), (None, s.gen_limit))


def full_masks(ids: jax.Array) -> Masks:
    """Everything inside a sample. ids [B,T]."""
    return Masks(ids, (ids,), (None,))


def flatten(m: Masks, queries: int, keys: int) -> Flat:
    """Rows one after the other; both buffers padded to multiples of `queries` and `keys` (at least one)."""
    rows = m.q_ids.shape[0]
    offset = SEGMENTS * jnp.arange(rows, dtype=jnp.int32)[:, None]

    def shift(ids):
        return jnp.where(ids < 0, -1, ids + offset)

    width = sum(ids.shape[1] for ids in m.k_ids)
    start = width * jnp.arange(rows, dtype=jnp.int32)[:, None]
    firsts, lasts, limit, runs, at = [], [], None, jnp.bool_(True), 0
    for ids, most in zip(m.k_ids, m.limits, strict=True):
        first, last, sorted_ids = jax.vmap(_run)(m.q_ids, ids)
        runs &= sorted_ids.all()
        if most is not None:
            last = jnp.minimum(last, most - 1)
            limit = start + at + most  # only the last key set of a row can be limited: `_one_limit`
        firsts.append(start + at + first)
        lasts.append(start + at + last)
        at += ids.shape[1]
    _one_limit(m)
    if limit is None:
        limit = jnp.broadcast_to(start + width, m.q_ids.shape)
    k_ids = jnp.concatenate([shift(ids) for ids in m.k_ids], 1)
    first, last = (jnp.stack(x, -1).reshape(-1, len(m.k_ids)) for x in (firsts, lasts))
    return Flat(
        _padded(shift(m.q_ids).reshape(-1), queries, -1),
        _padded(k_ids.reshape(-1), keys, -1),
        _padded(limit.reshape(-1), queries, 0),
        _padded(first, queries, 0),
        _padded(last, queries, -1),
        runs[None],
    )


def _one_limit(m: Masks) -> None:
    if any(x is not None for x in m.limits[:-1]):
        raise ValueError("only the last key set can have a limit; put the limited one last.")


def _run(q_ids: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[Tq], [Tk] → first and last position of each query's id among the keys, and whether the ids never fall."""
    filled = jax.lax.cummax(ids)  # padding inside or after a run takes its id
    real = jax.lax.cummax(jnp.where(ids >= 0, jnp.arange(len(ids), dtype=jnp.int32), -1))
    first = jnp.searchsorted(filled, q_ids, side="left").astype(jnp.int32)
    after = jnp.searchsorted(filled, q_ids, side="right").astype(jnp.int32)
    last = jnp.where(after > 0, real[jnp.maximum(after - 1, 0)], -1)
    nothing = (q_ids < 0) | (last < first)
    return jnp.where(nothing, 0, first), jnp.where(nothing, -len(ids), last), ((ids < 0) | (ids == filled)).all()


def _padded(x: jax.Array, multiple: int, fill: int) -> jax.Array:
    short = max(multiple, -(-x.shape[0] // multiple) * multiple) - x.shape[0]
    return jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1)), constant_values=fill)


def kinds(f: Flat, queries: int, keys: int) -> jax.Array:
    """[Tq/queries, Tk/keys] of SKIP, ALL (every pair is visible), SOME.

    Sound for any ids. Exact where ids are runs in rising order: a tile is SKIP if and only if no pair is visible.
    """
    q_ids, k_ids, limit = f.q_ids.reshape(-1, queries), f.k_ids.reshape(-1, keys), f.limit.reshape(-1, queries)
    seen, whole = by_range(q_ids, k_ids, limit)
    tile = jnp.arange(len(k_ids), dtype=jnp.int32)
    first, last = (x[:, :, None] // keys for x in (f.first, f.last))
    touched = ((first <= tile) & (tile <= last) & (f.last >= f.first)[:, :, None]).any(1)  # [Tq, tiles of keys]
    seen &= touched.reshape(len(q_ids), queries, -1).any(1) | ~f.runs
    return code(seen, whole)


def by_range(q_ids: jax.Array, k_ids: jax.Array, limit: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """bool [n,m] twice: may the tile hold a visible pair; are all of its pairs visible. Sound for any ids.

    q_ids, limit [n,queries], k_ids [m,keys], both cut from buffers that start at 0. limit: see `Flat`; None = none.
    """
    q_low, q_high = (x[:, None] for x in _range(q_ids))
    k_low, k_high = (x[None] for x in _range(k_ids))
    seen = (q_low <= k_high) & (k_low <= q_high)
    whole = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    whole &= (q_ids.min(1) >= 0)[:, None] & (k_ids.min(1) >= 0)
    if limit is not None:
        start = k_ids.shape[1] * jnp.arange(len(k_ids), dtype=jnp.int32)
        seen &= start < jnp.where(q_ids < 0, 0, limit).max(1)[:, None]
        whole &= start + k_ids.shape[1] <= limit.min(1)[:, None]
    return seen, whole


def code(seen: jax.Array, whole: jax.Array) -> jax.Array:
    """bool, bool → SKIP, ALL or SOME."""
    return jnp.where(whole, ALL, jnp.where(seen, SOME, SKIP)).astype(jnp.int32)


def _range(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest segment of each block [n, size]; padding alone is an empty range."""
    return jnp.where(ids < 0, jnp.iinfo(jnp.int32).max, ids).min(-1), ids.max(-1)


@functools.partial(jax.jit, static_argnames=("queries", "keys"))
def visible(f: Flat, queries: int | None = None, keys: int | None = None) -> jax.Array:
    """bool [Tq,Tk], or [tiles, tiles] with sizes: the rule itself, for tests and pictures; O(Tq·Tk)."""
    seen = (f.q_ids[:, None] == f.k_ids) & (f.q_ids[:, None] >= 0)
    seen &= jnp.arange(len(f.k_ids)) < f.limit[:, None]
    if queries is None or keys is None:
        return seen
    return seen.reshape(len(f.q_ids) // queries, queries, -1, keys).any((1, 3))
