"""Squared error of a predicted velocity, per token. The target is made where it is needed, from x0 and the noise."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.flow import rows
from pallas_kernels.flow.noising import velocity


def squared_error(predicted, x0, noise, noisy, weight, *, impl: str = "auto") -> jax.Array:
    """weight · Σ over the `noisy` features of (predicted − (noise − x0))² → [..., N] float32.

    predicted, x0, noise: [..., N, P] float32. noisy: the same, bool. weight: [..., N]. The gradient goes to `predicted`
    alone: the others are data.
    """
    x0, noise, weight = jax.lax.stop_gradient((x0, noise, weight))
    return _error(predicted, x0, noise, noisy, weight, rows.choose(impl), platform.interpreting())


def _difference(predicted, x0, noise, noisy):
    return jnp.where(noisy, predicted, 0.0) - velocity(x0, noise, noisy)


def _squares(predicted, x0, noise, noisy, _):
    return (_difference(predicted, x0, noise, noisy) ** 2,)


def _slope(predicted, x0, noise, noisy, scale, _):
    return (scale * (2.0 * _difference(predicted, x0, noise, noisy)),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _error(predicted, x0, noise, noisy, weight, impl, interpret):
    buffers = (predicted, x0, noise, noisy)
    sums = rows.run(_squares, buffers, results=("sum",), name="flow_error", impl=impl, interpret=interpret)[0]
    return sums * weight


def _forward(predicted, x0, noise, noisy, weight, impl, interpret):
    saved = (predicted, x0, noise, noisy, weight)
    return _error(*saved, impl, interpret), saved


def _backward(impl, interpret, saved, dtoken):
    *buffers, weight = saved
    name = "flow_error_backward"
    slope = rows.run(_slope, buffers, (dtoken * weight,), name=name, impl=impl, interpret=interpret)[0]
    return slope, None, None, None, None


_error.defvjp(_forward, _backward)
