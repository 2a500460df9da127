"""norm_rope as whole programs of abstract arguments: for compiling ahead of time, counting bytes, timing."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.norm_rope import norm_rope

Program = tuple[Callable, tuple]


def programs(
    tokens: int = 44_160, heads: tuple[int, ...] = (32, 8), head_dim: int = 128, impl: str = "auto", dtype=jnp.bfloat16
) -> dict[str, Program]:
    """norm_rope, norm_rope_backward: name → (function, its arguments). heads: of q and k (default: Nano, 720p)."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    xs, weights = tuple(array(tokens, h * head_dim) for h in heads), (array(head_dim),) * len(heads)
    table = array(tokens, head_dim, dtype=jnp.float32)

    def forward(xs, weights, cos, sin):
        return norm_rope(xs, weights, cos, sin, eps=1e-6, impl=impl)

    def backward(xs, weights, cos, sin, dys):
        return jax.vjp(lambda xs, ws: forward(xs, ws, cos, sin), xs, weights)[1](dys)

    dys = tuple(array(h, tokens, head_dim) for h in heads)
    args = (xs, weights, table, table)
    return {"norm_rope": (forward, args), "norm_rope_backward": (backward, (*args, dys))}
