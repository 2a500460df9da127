"""The flow operations as whole programs of abstract arguments: for compiling ahead of time, counting bytes, timing.

In: a size. Out: name → (function, its arguments as `jax.ShapeDtypeStruct`), and the bytes that each must move at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import flow

Program = tuple[Callable, tuple]
PATCH = 192  # features of a vision token: 48 channels of 2 × 2


def programs(tokens: int = 44_160, features: int = PATCH, impl: str = "auto") -> dict[str, Program]:
    """noise, noise_backward, error, error_backward, update (UniPC with text guidance and conditions)."""

    def buffer(dtype=jnp.float32):
        return jax.ShapeDtypeStruct((tokens, features), dtype)

    line, noisy, x = jax.ShapeDtypeStruct((tokens,), jnp.float32), buffer(bool), buffer()
    row = {n: jax.ShapeDtypeStruct((), jnp.float32) for n in ("sigma", "text", "control")}
    row |= {n: jax.ShapeDtypeStruct((k,), jnp.float32) for n, k in (("corrector", 5), ("predictor", 3))}

    def noise(x0, noise, sigma, noisy):
        return flow.noise(x0, noise, sigma, noisy, impl=impl)

    def noise_backward(x0, noise, sigma, noisy, dx_t):
        return jax.vjp(lambda *a: flow.noise(*a, noisy, impl=impl), x0, noise, sigma)[1](dx_t)

    def error(predicted, x0, noise, noisy, weight):
        return flow.squared_error(predicted, x0, noise, noisy, weight, impl=impl)

    def error_backward(predicted, x0, noise, noisy, weight, dtoken):
        f = lambda p: flow.squared_error(p, x0, noise, noisy, weight, impl=impl)  # noqa: E731
        return jax.vjp(f, predicted)[1](dtoken)

    def update(x, corrected, older, oldest, cond, uncond, row, noisy, clean):
        both = {"cond": cond, "uncond": uncond}
        return flow.update(x, corrected, older, oldest, both, row, noisy=noisy, pinned=clean, impl=impl)

    return {
        "noise": (noise, (x, x, line, noisy)),
        "noise_backward": (noise_backward, (x, x, line, noisy, x)),
        "error": (error, (x, x, x, noisy, line)),
        "error_backward": (error_backward, (x, x, x, noisy, line, line)),
        "update": (update, (x,) * 6 + (row, noisy, x)),
    }


def least(function: Callable, arguments: tuple) -> int:
    """Bytes of what comes in and goes out: no program can move fewer. (All of it is used, or the bound is too high.)"""
    every: Any = (arguments, jax.eval_shape(function, *arguments))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(every))
