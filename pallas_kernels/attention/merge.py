"""Two partial attentions over different keys → the attention over both.

In: attended values and log-sum-exps of the same queries over two disjoint sets of keys. Out: the same over their union,
in plain differentiable jnp. Used where keys arrive in turns (`context.py`); two key sets that are both at hand belong
into one call of `attention` instead (spec kernels.md K5).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Partial = tuple[jax.Array, jax.Array]  # (o [B,T,H,d], log-sum-exp [B,H,T] float32, −inf: no key seen)


def merge(a: Partial, b: Partial) -> Partial:
    """(o, lse) and (o, lse) → (o, lse), float32. A query that saw no key in either gets 0 and −inf, and no gradient."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    a_weight, b_weight = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = a_weight + b_weight
    alive = total > 0
    total = jnp.where(alive, total, 1.0)
    out = by_query(a_weight / total) * out_a + by_query(b_weight / total) * out_b
    return out, jnp.where(alive, top + jnp.log(total), -jnp.inf)


def by_query(x: jax.Array) -> jax.Array:
    """[B,H,T] → [B,T,H,1]: beside values."""
    return x.swapaxes(1, 2)[..., None]
