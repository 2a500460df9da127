"""The whole network attends, normalises and rotates through the kernels of TPUs (simulated) as through XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import synthetic

from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from pallas_kernels import platform

EDGE = dict(qk_norm_und=False, k_norm_und_for_gen=True, norm_cast="after_weight")
WEIGHTED = dict(control_weight=jnp.linspace(-0.5, 1.0, 8 * 2 * 24).reshape(8, 2, 24))  # a third takes no part


@pytest.mark.parametrize(("change", "fields"), [({}, {}), (EDGE, WEIGHTED)], ids=["nano", "edge, weighted controls"])
def test_outputs_and_gradients_of_the_network(change, fields):
    cfg, batch = dataclasses.replace(synthetic.MODEL, **change), synthetic.batch(0) | fields
    params = cosmos.init(cfg, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    times = jnp.full(batch["segment_shift"].shape, 400.0)

    def run(attention):
        def loss(p):
            out = cosmos.apply(p, here, batch, noised, times, precision=HIGHEST)
            return sum((x**2).sum() for x in jax.tree.leaves(out)), out

        here = dataclasses.replace(cfg, attention=attention, remat="attn")
        program = jax.jit(jax.grad(loss, has_aux=True)).trace(params)
        return program.lower().compile()(params), str(program.jaxpr)

    want, plain = run("xla")
    with platform.interpreted():
        got, kernels = run("mosaic_tpu")
    for name in ("attention_forward", "attention_dq", "attention_dkv", "norm_rope", "norm_rope_backward"):
        assert name in kernels and name not in plain
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()
