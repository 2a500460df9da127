"""Packed and unpacked runs of the same samples give the same loss and the same gradient."""

import dataclasses

import jax
import numpy as np
from data import toy

from cosmos_jax.loss import loss_fn
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from data_pipelines.packing import capacity, choose, fill, needs, plan, tight_bucket
from data_pipelines.toy_world.samples import TASKS


def test_packing_changes_neither_loss_nor_gradient():
    config = toy.config()
    model = dataclasses.replace(config.model, layers=2)
    config = dataclasses.replace(config, model=model)
    samples = [
        plan(toy.sample(t.name, i, sample_id=100 + i), toy.assets().tokenizer, toy.spec()) for i, t in enumerate(TASKS)
    ]
    bucket = dataclasses.replace(config.data.bucket, rows=4)
    rows, waiting = [], samples
    while waiting:
        chosen = choose(np.array([needs(p) for p in waiting]), capacity(bucket))
        rows.append([waiting[k] for k in chosen])
        waiting = [p for k, p in enumerate(waiting) if k not in chosen]
    packed = fill(rows, bucket, toy.spec())
    assert (packed["segment_sample_id"] >= 0).sum() == len(TASKS)
    alone = fill([[p] for p in samples], tight_bucket(samples, len(samples)), toy.spec())
    params = jax.tree.map(
        lambda p: p + 0.05 * np.random.RandomState(p.size % 1000).standard_normal(p.shape).astype(np.float32),
        cosmos.init(model, jax.random.key(0)),
    )
    run = jax.jit(jax.value_and_grad(lambda p, b: loss_fn(p, config, b, jax.random.key(1), HIGHEST), has_aux=True))
    (a, metrics_a), grad_a = run(params, packed)
    (b, metrics_b), grad_b = run(params, alone)
    assert abs(a - b) <= 1e-5 * abs(b)
    for name in metrics_a:
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    total = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(grad_b)))
    off = np.sqrt(
        sum(float(((x - y) ** 2).sum()) for x, y in zip(*map(jax.tree.leaves, (grad_a, grad_b)), strict=True))
    )
    assert off <= 1e-5 * total
