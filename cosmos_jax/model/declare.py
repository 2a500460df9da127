"""How a module declares a parameter: shape, logical axes and initialiser, in one place.

The axes travel as metadata of the `nnx.Param`, so initialisation, sharding and conversion read the same declaration.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from cosmos_jax import shard
from cosmos_jax.precision import Precision


def normal(std: float):
    """N(0, std²): the rule of the language backbones (std 0.02)."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def truncated(std: float):
    """Normal cut at ±3 std: the rule of the new generator modules (spec model.md §2.8)."""
    return lambda key, shape: std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def ones(key, shape):
    return jnp.ones(shape, jnp.float32)


def zeros(key, shape):
    return jnp.zeros(shape, jnp.float32)


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init) -> nnx.Param:
    """A float32 parameter with logical axes, one name per dimension."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} axis names, got {axes}")
    shard.spec(axes)  # an unknown axis fails here, at declaration
    return nnx.Param(init(rngs.params(), shape), logical=axes)


def use(p: nnx.Param, precision: Precision, axes: tuple[str, ...] | None = None) -> jax.Array:
    """The parameter at use: compute dtype, gathered over fsdp. `axes` overrides the declared ones."""
    return shard.gather(p[...], axes or p.get_metadata()["logical"], precision.dtype)


def project(
    equation: str, x: jax.Array, p: nnx.Param, precision: Precision, *, out: tuple[str, ...], like=None, result=None
) -> jax.Array:
    """einsum(x, p) in the compute dtype (`shard.project`). out: logical axes of the result; result: its dtype."""
    axes = p.get_metadata()["logical"]
    how = shard.Product(equation, axes, out, precision.compute, precision.matmul, precision.reduce, result)
    return shard.project(x, p[...], how, like)


class Dense(nnx.Module):
    """y = x W + b on the last axis; W [in, out]."""

    def __init__(self, rngs, n_in: int, n_out: int, axes: tuple[str, str], init, bias: bool = True):
        self.kernel = param(rngs, (n_in, n_out), axes, init)
        self.bias = param(rngs, (n_out,), axes[1:], zeros) if bias else None

    def __call__(self, x: jax.Array, precision: Precision, out: tuple[str, ...] | None = None) -> jax.Array:
        """x [..., in] → [..., out]; `out`: logical axes of the result (default: as x lies, every feature whole)."""
        out = out or ("batch",) + (shard.SAME,) * (x.ndim - 2) + ("act",)
        letters = "btnmk"[: x.ndim - 1]
        y = project(f"{letters}i,io->{letters}o", x, self.kernel, precision, out=out)
        return y if self.bias is None else y + use(self.bias, precision)
