"""Programs of the flow operations with their gradients, for the tests of every flavour of kernel."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flow, platform

SHAPES = [(1, 150, 24), (2, 64, 13)]  # rows, tokens, features: odd ends of tiles, features that fill no lanes
ROW = {
    "sigma": 0.7, "corrector": (0.3, -0.4, 0.5, 0.9, -0.2), "predictor": (0.8, 0.6, -0.5), "noise": 0.3, "text": 5.0,
    "control": 2.0,
}  # fmt: skip


def buffers(count, shape):
    rng = np.random.RandomState(count)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(count)]


def noise_program(x0, noise, dx_t, sigma, impl):
    noisy = dx_t > -0.5
    x_t, back = jax.vjp(lambda *a: flow.noise(*a, noisy, impl=impl), x0, noise, jax.nn.sigmoid(sigma))
    return x_t, *back(dx_t)


def error_program(predicted, x0, noise, weight, dtoken, impl):
    noisy = x0 + noise > -0.5
    token, back = jax.vjp(lambda p: flow.squared_error(p, x0, noise, noisy, weight**2, impl=impl), predicted)
    return token, *back(dtoken)


def update_program(branches, *bs, impl, row=ROW):
    velocity = dict(zip(("cond", "uncond", "free"), bs[4:7], strict=True))
    row = {n: jnp.asarray(v, jnp.float32) for n, v in row.items()}
    velocity = {n: velocity[n] for n in branches}
    return flow.update(*bs[:4], velocity, row, fresh=bs[7], noisy=bs[8] > 0, pinned=bs[8], impl=impl)


def compare(program, args, impl):
    """Values and gradients of a kernel within 1e-6 of the largest value of XLA's; most are bit-equal."""
    want = jax.jit(lambda *a: program(*a, impl="xla"))(*args)
    with platform.interpreted():
        got = jax.jit(lambda *a: program(*a, impl=impl))(*args)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype == jnp.float32
        assert np.abs(np.asarray(w)).max() > 0.1
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 * float(np.abs(np.asarray(w)).max()))
