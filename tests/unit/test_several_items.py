"""Samples of several vision items: what the loss divides by, which noise they get, what they cost."""

import dataclasses

import jax
import numpy as np
import pytest
import synthetic

from cosmos_jax import flops, flow
from cosmos_jax.loss import loss_fn
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import generate
from data_pipelines.packing import one_per_row, plan, unpack
from data_pipelines.sample import Sample, vision_items
from data_pipelines.tokenizer import ChatTokenizer

CONFIG = dataclasses.replace(synthetic.CONFIG, model=dataclasses.replace(synthetic.MODEL, vocab=512))
RNG = np.random.RandomState(0)


def latents(t, h=5, w=4):
    return RNG.standard_normal((4, t, h, w)).astype(np.float32)


TRANSFER = Sample("transfer", "a", 1, vision_latents=latents(3), context=(latents(3), latents(3)), clean_frames=(0,))
EDIT = Sample("image2image", "b", 2, vision_latents=latents(1), context=(latents(1, 4, 7),))
POLICY = Sample(
    "policy", "c", 3, vision_latents=latents(2), actions=RNG.uniform(-1, 1, (6, 4)).astype(np.float32), clean_actions=2,
    action_start=-1,
)  # fmt: skip
SAMPLES = [TRANSFER, EDIT, POLICY]


def batch(samples=SAMPLES):
    spec = CONFIG.model.sequence
    return one_per_row([plan(s, ChatTokenizer(), spec) for s in samples], spec)


def test_the_loss_is_the_mean_over_items_and_clean_ones_count():
    """spec model.md §6.3: squares of an item over all of its elements; an item that is clean adds 0 and dilutes."""
    b, key = batch(), jax.random.key(3)
    params = cosmos.init(CONFIG.model, jax.random.key(0))
    noised = flow.noise_batch(key, b, CONFIG.flow, CONFIG.model.patch)

    @jax.jit
    def run(params):
        metrics = loss_fn(params, CONFIG, b, key, HIGHEST)[1]
        return metrics, cosmos.apply(params, CONFIG.model, b, noised.x_t, noised.timesteps, precision=HIGHEST).velocity

    metrics, v = run(params)
    squares = {n: np.asarray((v[n] - noised.velocity[n]) ** 2) for n in v}
    spec = CONFIG.model.sequence
    parts = [unpack(squares, b, i, 0, s, spec) for i, s in enumerate(SAMPLES)]
    vision = sum(p["vision"].mean() for p in parts) / (3 + 2 + 1)
    assert (parts[0]["vision"][:, 0] == 0).all() and (parts[2]["action"][:2] == 0).all()
    assert float(metrics["loss/vision"]) == pytest.approx(vision, rel=1e-5)
    assert float(metrics["loss/action"]) == pytest.approx(parts[2]["action"].mean(), rel=1e-5)


def test_every_item_gets_the_noise_of_the_seed_from_its_beginning():
    b, spec = batch(), CONFIG.model.sequence
    seeds = {(i, 0): (10 + i, [x.shape for x in vision_items(s)]) for i, s in enumerate(SAMPLES)}
    noise = generate.framework_buffers(b, seeds, CONFIG.model.patch)
    for i, s in enumerate(SAMPLES):
        want = np.random.RandomState(10 + i).standard_normal(s.vision_latents.shape).astype(np.float32)
        np.testing.assert_array_equal(unpack(noise, b, i, 0, s, spec)["vision"], want)
    first = np.random.RandomState(10).standard_normal(TRANSFER.context[0].shape).astype(np.float32)
    control = np.split(noise["vision"][0][b["vision_segment_ids"][0] == 0], 3)[0]
    target = noise["vision"][0][b["vision_segment_ids"][0] == 0][-len(control) :]
    np.testing.assert_array_equal(control, target)
    assert control.max() == pytest.approx(first.max())
    want = np.random.RandomState(12).standard_normal((6, CONFIG.model.action_dim)).astype(np.float32)
    np.testing.assert_array_equal(noise["action"][2, :6], want)


def test_weighted_controls_are_counted_as_they_are_computed():
    joint, apart = (flops.count(batch([s])) for s in (TRANSFER, dataclasses.replace(TRANSFER, weights=(1.0, 2.0))))
    item = TRANSFER.vision_latents.shape[1] * 3 * 2
    assert joint.gen_pairs == 3 * item * (3 * item + joint.und) and joint.gen == apart.gen == 3 * item
    assert apart.gen_pairs == 2 * (2 * item * (2 * item + joint.und))
