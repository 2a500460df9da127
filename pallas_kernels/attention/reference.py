"""Asymmetric packed attention in plain XLA: the definition of "correct" for every later kernel.

In: projected, rotated q, k, v of the two streams and their masks. Out: attended values, zero on padding, and the
logarithm of the softmax's denominator.

    und queries: causal, over und keys of the same segment
    gen queries: unmasked, over und *and* gen keys of the same segment, in one softmax

Source: spec model.md §2.2; the two streams are never concatenated.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def attend(
    q: jax.Array, parts: list[tuple[jax.Array, jax.Array, jax.Array]], scale: float, precision=None
) -> tuple[jax.Array, jax.Array]:
    """Attend with one softmax over several key sets.

    q: [B, Tq, Hq, d]. parts: (k [B, Tk, Hkv, d], v [B, Tk, Hkv, d], mask [B, Tq, Tk] bool) each. Query head h reads key
    head h // (Hq / Hkv). Softmax in float32. Returns [B, Tq, Hq, d] in q's dtype and the log-sum-exp of the scores
    [B, Hq, Tq] float32; a query that sees nothing gets 0 and −inf.
    """
    b, tq, hq, d = q.shape
    hkv = parts[0][0].shape[2]
    group = hq // hkv
    q_rows = q.reshape(b, tq, hkv, group, d).transpose(0, 2, 3, 1, 4).reshape(b, hkv, group * tq, d)
    scores = []
    for k, _, mask in parts:
        s = jnp.einsum("bhrd,bkhd->bhrk", q_rows, k, precision=precision, preferred_element_type=jnp.float32) * scale
        s = s.reshape(b, hkv, group, tq, k.shape[1])
        scores.append(jnp.where(mask[:, None, None], s, -jnp.inf))
    top = jnp.maximum(jax.lax.stop_gradient(_max_over_parts(scores)), jnp.finfo(jnp.float32).min)
    out, total = jnp.zeros(q_rows.shape, jnp.float32), jnp.zeros(top.shape, jnp.float32)
    for (_, v, _), s in zip(parts, scores, strict=True):
        p = jnp.exp(s - top)
        total = total + p.sum(-1, keepdims=True)
        p = p.astype(v.dtype).reshape(b, hkv, group * tq, v.shape[1])
        out = out + jnp.einsum("bhrk,bkhd->bhrd", p, v, precision=precision, preferred_element_type=jnp.float32)
    some = jnp.where(total > 0, total, 1.0)  # not a tiny number: a cotangent divided by it would be infinite
    out = out.reshape(b, hkv, group, tq, d) / some
    lse = jnp.where(total > 0, top + jnp.log(some), -jnp.inf).reshape(b, hq, tq)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, tq, hq, d).astype(q.dtype), lse


def _max_over_parts(scores: list[jax.Array]) -> jax.Array:
    top = scores[0].max(-1, keepdims=True)
    for s in scores[1:]:
        top = jnp.maximum(top, s.max(-1, keepdims=True))
    return top


def same_segment(q_segment_ids: jax.Array, k_segment_ids: jax.Array) -> jax.Array:
    """[B, Tq], [B, Tk] → [B, Tq, Tk]: same sample, and not padding (negative)."""
    return (q_segment_ids[:, :, None] == k_segment_ids[:, None, :]) & (q_segment_ids[:, :, None] >= 0)


def seen(q_ids: jax.Array, k_ids: jax.Array, limit: jax.Array | None) -> jax.Array:
    """[B, Tq], [B, Tk], [B, Tq] → [B, Tq, Tk]: who sees whom (segments.py). limit None: all of the sample."""
    mask = same_segment(q_ids, k_ids)
    return mask if limit is None else mask & (jnp.arange(k_ids.shape[1]) < limit[:, :, None])
