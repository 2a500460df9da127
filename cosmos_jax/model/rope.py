"""Interleaved multi-axis rotary embedding (spec model.md §2.4, NUM-2).

In: fp32 positions [B, 3, N] (T, H, W; fractional). Out: cos and sin tables and the rotation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    """[dim/2] float32, theta^(−2i/dim), in the reference's own order of roundings: exponent, power, reciprocal.

    The power is exact before it is rounded, as PyTorch's is almost everywhere; numpy's float32 power is one ulp off in
    13 of Nano's 64 frequencies, which at positions past 15 000 is 1e-4 in the tables and 4e-6 in a velocity.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return (np.float32(1.0) / power).astype(np.float32)


def slot_axis(sections: tuple[int, int, int]) -> np.ndarray:
    """[dim/2] ∈ {0 T, 1 H, 2 W}: slots 1, 4, 7 … turn with H, slots 2, 5, 8 … with W, all others with T."""
    axis = np.zeros(sum(sections), np.int32)
    axis[1 : 3 * sections[1] : 3] = 1
    axis[2 : 3 * sections[2] : 3] = 2
    return axis


def tables(positions: jax.Array, theta: float, sections: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """cos, sin [B, N, head_dim] float32.

    Phases are elementwise fp32 products: positions pass 15 000, where a bf16 or TF32 dot would destroy them.
    """
    inverse = jnp.asarray(inverse_frequencies(theta, 2 * sum(sections)))
    axis = slot_axis(sections)
    t, h, w = (positions[:, i, :, None].astype(jnp.float32) * inverse for i in range(3))
    phase = jnp.where(axis == 0, t, jnp.where(axis == 1, h, w))
    phase = jnp.concatenate([phase, phase], -1)
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-split (NeoX) rotation of x [B, N, heads, head_dim] in x's dtype."""
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin
