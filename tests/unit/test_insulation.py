"""`model.insulate_und`: generation trains the generator only, and nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest
from data import toy
from flax.traverse_util import flatten_dict

from cosmos_jax.loss import loss_fn
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from data_pipelines.packing import Packer, plan


@pytest.mark.parametrize("edge", [False, True])
def test_insulation_stops_exactly_the_gradient_from_gen_to_und(edge):
    config = toy.config()
    model = dataclasses.replace(config.model, layers=2, qk_norm_und=not edge, k_norm_und_for_gen=edge)
    names = ("forward_dynamics", "text2image")  # no supervised text: every gradient comes from generation
    samples = [plan(toy.sample(n, i, sample_id=i), toy.assets().tokenizer, toy.spec()) for i, n in enumerate(names)]
    batch = Packer(dataclasses.replace(config.data.bucket, rows=1), 4).batch(iter(samples), toy.spec())
    params = jax.tree.map(
        lambda p: p + 0.05 * np.random.RandomState(p.size % 1000).standard_normal(p.shape).astype(np.float32),
        cosmos.init(model, jax.random.key(0)),
    )

    def gradient(insulate):
        c = dataclasses.replace(config, model=dataclasses.replace(model, insulate_und=insulate))
        loss, g = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, c, batch, jax.random.key(1), HIGHEST)[0]))(params)
        return loss, {"/".join(map(str, k)): np.asarray(x) for k, x in flatten_dict(g).items()}

    (loss, free), (same, held) = gradient(False), gradient(True)
    assert loss == same
    assert np.abs(free["layers/und/attn/v"]).max() > 0 and np.abs(free["embed_tokens"]).max() > 0
    for name, g in held.items():
        und = ("und" in name and "k_norm_for_gen" not in name) or name.startswith(("embed_tokens", "vit", "lm_head"))
        if und:
            assert not g.any(), name
        else:
            np.testing.assert_allclose(g, free[name], rtol=1e-4, atol=1e-6 * np.abs(free[name]).max(), err_msg=name)
    if edge:
        assert np.abs(held["layers/und/attn/k_norm_for_gen/weight"]).max() > 0
