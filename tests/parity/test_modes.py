"""Every generation mode through our table, packer and network against diffusers' transformer on the same sample.

Threshold: 2e-6 (parity protocol §4.3). All samples of a family are rows of one batch: one compilation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import modes_oracle, oracle

from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import guidance
from data_pipelines.packing import context_tokens, fill, plan, tight_bucket, unpack
from data_pipelines.sample import Sample
from data_pipelines.schema import MODALITIES
from data_pipelines.tokenizer import ChatTokenizer

TOK = ChatTokenizer()
LIMIT = 2e-6


def draw(*shape):
    return np.random.RandomState(sum(shape)).standard_normal(shape).astype(np.float32)


def latents(t, h=5, w=6, seed=0):
    return np.random.RandomState(seed).standard_normal((8, t, h, w)).astype(np.float32)


def sample(task, **fields):
    return Sample(task, **dict(prompt="The red puck slides right.", vision_latents=latents(3), fps=10.0) | fields)


def actions(rows):
    return np.clip(draw(rows, 12), -3, 3)


CONTROLS = (latents(3, seed=1), latents(3, seed=2))
EDIT = dict(context=(latents(1, 6, 7, seed=3),), vision_latents=latents(1), system="You edit images.")
JOINT = sample("transfer", context=CONTROLS, clean_frames=(0,))
CASES: dict[str, tuple[Sample, dict]] = {  # sample, and what the reference is told of it
    "transfer, two controls in one attention": (JOINT, dict(clean=[0])),
    "image edit": (sample("image2image", **EDIT), dict(clean=[], shared=False)),
    "sound to video": (sample("sound2video", sound_latents=draw(6, 9), clean_frames=(0,)), dict(clean=[0])),
    "video to sound": (sample("video2sound", sound_latents=draw(6, 9)), dict(clean=[0, 1, 2], sound_noisy=True)),
    "video to video, frames 0 and 2": (sample("video2video", clean_frames=(0, 2)), dict(clean=[0, 2])),
    "policy with history and state": (
        sample("policy", actions=actions(11), clean_actions=3, action_start=-2, domain=9),
        dict(clean=[0], action_noisy=list(range(3, 11))),
    ),
    "forward dynamics with state": (sample("forward_dynamics", actions=actions(9), action_start=0), dict(clean=[0])),
}  # fmt: skip
WEIGHTS = (1.0, 3.0)
WEIGHTED = dataclasses.replace(JOINT, weights=WEIGHTS)


@functools.lru_cache
def pair(family):
    ref = oracle.OMNI if family == "nano" else oracle.EDGE
    model, cfg = oracle.reference(ref), oracle.model_config(ref)
    return model, cfg, oracle.params(model, cfg)


def fed(s: Sample, clean, shared=True, sound_noisy=False, action_noisy=()):
    ids = plan(s, TOK, pair("nano")[1].sequence).ids
    return modes_oracle.reference_inputs(s, ids, clean, sound_noisy, list(action_noisy), shared)


@functools.partial(jax.jit, static_argnames=("cfg", "cached"))
def network(params, cfg, batch, cached=False):
    noised = {n: batch[f"{n}_x0"] for n in MODALITIES}
    t = jnp.full(batch["segment_shift"].shape, float(modes_oracle.T))
    if not cached:
        return cosmos.apply(params, cfg, batch, noised, t, precision=HIGHEST).velocity
    cache = cosmos.und(params, cfg, batch, precision=HIGHEST).cache
    return cosmos.gen(params, cfg, batch, noised, t, cache, precision=HIGHEST)


def batch_of(samples, cfg):
    planned = [plan(s, TOK, cfg.sequence) for s in samples]
    bucket = dataclasses.replace(tight_bucket(planned, len(planned)), segments=2)
    return fill([[p] for p in planned], bucket, cfg.sequence)


def ours(family, samples, change=dict, **kw):
    """Velocities of the samples, one per row."""
    _, cfg, params = pair(family)
    b = change(batch_of(samples, cfg))
    v = {n: np.asarray(x) for n, x in network(params, cfg, b, **kw).items()}
    for i, s in enumerate(samples):  # nothing flows to a control
        target = int(np.prod([s.vision_latents.shape[1], *(-(-n // 2) for n in s.vision_latents.shape[2:])]))
        own = v["vision"][i][b["vision_segment_ids"][i] == 0]
        assert not own[:-target].any()
    return [unpack(v, b, i, 0, s, cfg.sequence) for i, s in enumerate(samples)]


def possible(family):
    return [n for n, (s, _) in CASES.items() if family == "nano" or s.sound_latents is None]


@functools.lru_cache
def every_case(family):
    names = possible(family)
    return dict(zip(names, ours(family, [CASES[n][0] for n in names]), strict=True))


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in ("nano", "edge") for n in possible(f)])
def test_velocity_equals_diffusers(family, name):
    s, told = CASES[name]
    want = modes_oracle.run(pair(family)[0], fed(s, **told))
    got = every_case(family)[name]
    assert set(want) == set(got)
    for modality, b in want.items():
        a = got[modality]
        if b.any():
            off = oracle.relative(a, b)[0]
            print(f"{family}, {name}: {modality} {off:.1e}")
            assert off <= LIMIT
        np.testing.assert_array_equal(a == 0, b == 0)  # conditions: exactly 0


@pytest.mark.parametrize("name", ["transfer, two controls in one attention", "image edit"])
def test_the_comparison_notices_positions(name):
    """Negative control: controls one after the other, a source image at the same place."""
    s, told = CASES[name]
    want = modes_oracle.run(pair("nano")[0], fed(s, **told | dict(shared=not told.get("shared", True))))
    assert oracle.relative(every_case("nano")[name]["vision"], want["vision"])[0] > 100 * LIMIT


@functools.lru_cache
def weighted(family):
    """Beside a sample without weights and one with a single control, in one batch."""
    one = dataclasses.replace(WEIGHTED, context=CONTROLS[:1], weights=(4.0,))
    return ours(family, [WEIGHTED, JOINT, one])


@pytest.mark.parametrize("family", ["nano", "edge"])
def test_weighted_controls_are_one_attention_each(family, monkeypatch):
    kw = fed(WEIGHTED, clean=[0])
    joint = modes_oracle.run(pair(family)[0], kw)["vision"]
    modes_oracle.one_attention_per_control(monkeypatch, kw, WEIGHTS)
    want = modes_oracle.run(pair(family)[0], kw)["vision"]
    off = oracle.relative(weighted(family)[0]["vision"], want)[0]
    print(f"{family}: {off:.1e}; joint attention is {oracle.relative(joint, want)[0]:.1e} away")
    assert off <= LIMIT and oracle.relative(joint, want)[0] > 100 * LIMIT


def test_weighted_controls_with_cached_text():
    again = ours("nano", [WEIGHTED], cached=True)[0]["vision"]
    assert oracle.relative(again, weighted("nano")[0]["vision"])[0] <= 1e-6


def test_neighbours_of_a_weighted_sample_keep_their_one_attention():
    """A sample without weights, and one whose single control has one, are what they are alone."""
    _, joint, one = weighted("nano")
    alone = dataclasses.replace(WEIGHTED, context=CONTROLS[:1], weights=())
    for got, s in ((joint, JOINT), (one, alone)):
        assert oracle.relative(got["vision"], ours("nano", [s])[0]["vision"])[0] <= 1e-6


@pytest.mark.parametrize(("controls", "weights"), [((0, 0), (2.0, 2.0)), ((1, 0), (0.0, 3.0))])
def test_one_control_twice_or_beside_one_without_weight_is_that_control(controls, weights):
    two = dataclasses.replace(JOINT, context=tuple(CONTROLS[i] for i in controls), weights=weights)
    one = ours("nano", [dataclasses.replace(JOINT, context=CONTROLS[:1])])[0]["vision"]
    assert oracle.relative(ours("nano", [two])[0]["vision"], one)[0] <= 1e-6


def test_controls_out_of_sight_leave_the_target_alone():
    """The branch of control guidance: the target keeps its place (diffusers: cond_no_control_static)."""
    model, cfg, params = pair("nano")
    s = dataclasses.replace(JOINT, task="text2video", context=())
    want = modes_oracle.run(model, fed(s, clean=[0]))["vision"]
    planned = [plan(s, TOK, cfg.sequence) for s in (JOINT, WEIGHTED)]
    bucket = tight_bucket(planned, 2)
    rows = [[p] for p in planned]
    hidden = guidance.without(fill(rows, bucket, cfg.sequence), context_tokens(rows, bucket))
    v = {"vision": np.asarray(network(params, cfg, hidden)["vision"])}
    for i, s in enumerate((JOINT, WEIGHTED)):
        assert oracle.relative(unpack(v, hidden, i, 0, s, cfg.sequence)["vision"], want)[0] <= LIMIT


def _tokens(b):
    n = int((b["gen_segment_ids"][0] >= 0).sum()) // 3
    return slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)


def unnormalised(b):
    w = b["control_weight"].copy()
    w[0, :, _tokens(b)[2]] *= 4
    return dict(b, control_weight=w)


def swapped(b):
    w = b["control_weight"].copy()
    target = _tokens(b)[2]
    w[0, :, target] = w[0, ::-1, target]
    return dict(b, control_weight=w)


def seen_by_the_other(b):
    w = b["control_weight"].copy()
    w[0, 1, _tokens(b)[0]] = 1e-9  # takes part in the other's attention, adds nothing of its own
    return dict(b, control_weight=w)


@pytest.mark.parametrize("change", [unnormalised, swapped, seen_by_the_other])
def test_a_wrong_weight_is_noticed(change):
    wrong = ours("nano", [WEIGHTED], change)[0]["vision"]
    assert oracle.relative(wrong, weighted("nano")[0]["vision"])[0] > 100 * LIMIT
