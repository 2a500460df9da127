"""Rectified flow (spec model.md §6.1): x_t = sigma · noise + (1 − sigma) · x0, and the velocity is noise − x0."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.flow import rows


def noise(x0, noise, sigma, noisy, *, impl: str = "auto") -> jax.Array:
    """x_t [..., N, P]: noised where `noisy` [..., N, P] (bool), x0 exactly elsewhere.

    x0, noise: [..., N, P] float32. sigma: [..., N]. Differentiable in these three.
    """
    return _noise(x0, noise, sigma, noisy, rows.choose(impl), platform.interpreting())


def velocity(x0, noise, noisy) -> jax.Array:
    """What is to be predicted, 0 where nothing is. Nothing that trains needs it whole: `error.py` makes it again."""
    return jnp.where(noisy, noise - x0, 0.0)


def _x_t(x0, noise, noisy, sigma, _):
    return (jnp.where(noisy, sigma * noise + (1.0 - sigma) * x0, x0),)


def _slopes(x0, noise, dx_t, noisy, sigma, _):
    on = jnp.where(noisy, dx_t, 0.0)
    return jnp.where(noisy, (1.0 - sigma) * dx_t, dx_t), sigma * on, (noise - x0) * on


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _noise(x0, noise, sigma, noisy, impl, interpret):
    return rows.run(_x_t, (x0, noise, noisy), (sigma,), name="flow_noise", impl=impl, interpret=interpret)[0]


def _forward(x0, noise, sigma, noisy, impl, interpret):
    return _noise(x0, noise, sigma, noisy, impl, interpret), (x0, noise, sigma, noisy)


def _backward(impl, interpret, saved, dx_t):
    x0, noise, sigma, noisy = saved
    dx0, dnoise, dsigma = rows.run(
        _slopes, (x0, noise, dx_t, noisy), (sigma,), results=("each", "each", "sum"),
        name="flow_noise_backward", impl=impl, interpret=interpret,
    )  # fmt: skip
    return dx0, dnoise, dsigma, None


_noise.defvjp(_forward, _backward)
