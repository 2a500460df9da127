"""What must hold of the network beside being diffusers' (test_report.py compares it, task by task, layer by layer).

That the comparison can fail: test_mutations.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import oracle

from cosmos_jax.model import cosmos, rope
from cosmos_jax.precision import HIGHEST


@functools.lru_cache
def pair(variant: str):
    ref = oracle.OMNI if variant == "omni" else oracle.EDGE
    model, cfg = oracle.reference(ref), oracle.model_config(ref)
    return ref, model, cfg, oracle.params(model, cfg)


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def run(params, cfg, batch, timesteps, precision):
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    return cosmos.apply(params, cfg, batch, noised, timesteps, precision=precision)


@pytest.mark.parametrize("variant", ["omni", "edge"])
def test_und_stream_ignores_generation_tokens_bit_for_bit(variant):
    ref, _, cfg, params = pair(variant)
    batch = oracle.batch(oracle.inputs(ref), cfg)
    other = oracle.batch(oracle.inputs(ref, seed=2), cfg)
    t = np.full((1, 2), 437, np.float32)
    a, b = run(params, cfg, batch, t, HIGHEST), run(params, cfg, other, t * 0.5, HIGHEST)
    assert np.abs(np.asarray(a.velocity["vision"] - b.velocity["vision"])).max() > 0.1
    np.testing.assert_array_equal(a.hidden, b.hidden)


@pytest.mark.parametrize("variant", ["omni", "edge"])
def test_cached_und_equals_recomputed(variant):
    ref, _, cfg, params = pair(variant)
    batch = oracle.batch(oracle.inputs(ref), cfg)
    t = np.full((1, 2), 437, np.float32)

    @jax.jit
    def cached(params, batch):
        noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
        cache = cosmos.und(params, cfg, batch, precision=HIGHEST).cache
        return cosmos.gen(params, cfg, batch, noised, t, cache, precision=HIGHEST)

    ours, want = cached(params, batch), run(params, cfg, batch, t, HIGHEST).velocity
    for name in want:
        if want[name].size:
            assert oracle.relative(ours[name], want[name])[0] <= 1e-6


@pytest.mark.parametrize("change", ["scan", "full", "dots", "attn"])
def test_scan_and_remat_change_nothing(change):
    """Unrolled layers and every rematerialisation policy give the same velocity and the same gradient."""
    import dataclasses

    ref, _, cfg, params = pair("omni")
    other = dataclasses.replace(cfg, scan=False) if change == "scan" else dataclasses.replace(cfg, remat=change)
    batch = oracle.batch(oracle.inputs(ref), cfg)

    @functools.partial(jax.jit, static_argnums=1)
    def grad(params, cfg):
        noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
        t = jnp.full((1, 2), 437.0)
        return jax.value_and_grad(
            lambda p: (cosmos.apply(p, cfg, batch, noised, t, precision=HIGHEST).velocity["vision"] ** 2).sum()
        )(params)

    a, b = grad(params, cfg), grad(params, other)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(np.asarray(x)).max() + 1e-12
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(y) / scale, atol=2e-6)


@pytest.mark.parametrize(("theta", "most"), [(5e6, 1), (1e8, 3)])
def test_frequencies_are_pytorchs(theta, most):
    """Heads of 128, as published. PyTorch's own vectorised and scalar powers differ in as many."""
    reference = (1.0 / theta ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)).numpy()
    ours = rope.inverse_frequencies(theta, 128)
    assert (ours != reference).sum() <= most
    np.testing.assert_array_max_ulp(ours, reference, 1)
