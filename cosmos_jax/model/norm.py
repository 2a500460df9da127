"""Normalisation. Statistics are always float32; what differs between the families is where the result is rounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from cosmos_jax.model.declare import ones, param, use, zeros
from cosmos_jax.precision import Precision


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (spec model.md §2.3, NUM-1).

    cast "before_weight": round to the input dtype, then multiply (Nano, Super: `Qwen3VLTextRMSNorm`);
    cast "after_weight": multiply in float32, then round (Edge: `Cosmos3NemotronRMSNorm`).
    """

    def __init__(self, rngs, size: int, axis: str, eps: float, cast: str):
        self.weight = param(rngs, (size,), (axis,), ones)
        self.eps, self.cast = eps, cast

    def __call__(self, x: jax.Array, precision: Precision) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        weight = use(self.weight, precision)
        if self.cast == "before_weight":
            return y.astype(x.dtype) * weight
        return (y * weight.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / sqrt(var + eps) · weight + bias over the last axis (the vision encoder)."""

    def __init__(self, rngs, size: int, eps: float):
        self.weight = param(rngs, (size,), ("hidden",), ones)
        self.bias = param(rngs, (size,), ("hidden",), zeros)
        self.eps = eps

    def __call__(self, x: jax.Array, precision: Precision) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        var = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(var + self.eps)
        y = y * use(self.weight, precision).astype(jnp.float32) + use(self.bias, precision).astype(jnp.float32)
        return y.astype(x.dtype)
