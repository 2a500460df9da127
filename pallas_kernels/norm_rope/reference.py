"""The definition, in jnp: what `RMSNorm` and `rotate` of the model do one after the other, and the change of layout."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CASTS = ("before_weight", "after_weight")


class How(NamedTuple):
    """What is fixed when a program is traced."""

    head_dim: int
    eps: float
    cast: str
    factors: tuple[float, ...]
    tokens: int  # rows of the results
    interpret: bool  # kernels are simulated


def norm_rope(xs, weights, cos, sin, how: How) -> tuple[jax.Array, ...]:
    """As the front door says."""
    return tuple(_one(x, w, cos, sin, factor, how) for x, w, factor in zip(xs, weights, how.factors, strict=True))


def _one(x, weight, cos, sin, factor: float, how: How):
    t = x.shape[0]
    x = x.reshape(t, -1, how.head_dim)
    if weight is not None:
        x = normed(x, weight, how.eps, how.cast)
    cos, sin = cos[:, None].astype(x.dtype), signed(sin[:, None], how.head_dim).astype(x.dtype)
    y = rotated(x, jnp.roll(x, how.head_dim // 2, -1), cos, sin, factor)
    return jnp.pad(y.swapaxes(0, 1), ((0, 0), (0, how.tokens - t), (0, 0)))


def normed(x, weight, eps: float, cast: str, width: int | None = None):
    """RMSNorm over the last axis. width: how many of its elements exist, when the others are 0."""
    y = unweighted(x.astype(jnp.float32), eps, width)[0]
    if cast == "before_weight":
        return y.astype(x.dtype) * weight.astype(x.dtype)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def unweighted(x32, eps: float, width: int | None = None):
    """(x / root mean square, the factor that made it) in float32."""
    mean = jnp.sum(x32 * x32, -1, keepdims=True) / (width or x32.shape[-1])
    scale = jax.lax.rsqrt(mean + eps)
    return x32 * scale, scale


def signed(sin, width: int):
    """sin with the sign that the rotation gives to its first half."""
    first = jax.lax.broadcasted_iota(jnp.int32, sin.shape, sin.ndim - 1) < width // 2
    return jnp.where(first, -sin, sin)


def rotated(x, swapped, cos, sin, factor: float = 1.0):
    """x·cos + swapped·sin, products in x's dtype, the sum in float32. swapped: x with its halves exchanged."""
    total = (x * cos).astype(jnp.float32) + (swapped * sin).astype(jnp.float32)
    return (total * factor).astype(x.dtype)
