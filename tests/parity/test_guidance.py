"""Guidance equals the references: text and controls, their intervals, the normalisation; mistakes in each show.

The velocities of transfer are mixed by diffusers' own block, on its own tiny transformer; the framework's formulas are
written out here once more, in numpy.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.cosmos.denoise import Cosmos3TransferLoopDenoiser
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens
from parity import oracle
from parity.test_sampling import tiny
from parity.test_solver import diffusers_unipc

from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import generate, guidance, schedules
from cosmos_jax.sampling.guidance import Guidance
from data_pipelines.packing import context_tokens, fill, plan, tight_bucket, unpack
from data_pipelines.sample import Sample

STEPS, SHIFT, FPS, SHAPE = 5, 5.0, 10.0, (8, 3, 5, 6)
TIMES = schedules.unipc(STEPS, SHIFT).timesteps
LENGTHS = {"the caption": 19, "": 7}


class Words:
    """A tokenizer: the prompt decides how many ids there are, and which."""

    def generation_ids(self, prompt, system=None):
        n = LENGTHS[prompt]
        return [(n + 37 * i) % 430 for i in range(n)]


def latents(seed):
    return np.random.RandomState(seed).standard_normal(SHAPE).astype(np.float32)


@functools.lru_cache
def packed(controls=1, weights=()):
    """Ours: the pack with the caption, the pack with the negative one, the tokens of the controls, the sample."""
    _, cfg, _ = tiny()
    items = tuple(latents(40 + i) for i in range(controls))
    s = Sample(
        "transfer", "the caption", 3, vision_latents=latents(30), fps=FPS, context=items, clean_frames=(0,),
        weights=weights,
    )  # fmt: skip
    plans = [plan(x, Words(), cfg.sequence) for x in (s, dataclasses.replace(s, prompt=""))]
    bucket = tight_bucket(plans, rows=1)
    cond, uncond = (fill([[p]], bucket, cfg.sequence) for p in plans)
    return cond, uncond, context_tokens([plans[:1]], bucket), s


def ours(how, steps=STEPS, controls=1, weights=(), **kw):
    _, cfg, params = tiny()
    cond, uncond, hidden, s = packed(controls, weights)
    noise = generate.framework_buffers(cond, {(0, 0): (5, [SHAPE] * (controls + 1))}, cfg.patch)
    out = generate.sample_latents(
        params, cfg, cond, noise, schedules.unipc(steps, SHIFT), how, uncond=uncond, controls=hidden,
        precision=HIGHEST, **kw,
    )  # fmt: skip
    return unpack({"vision": np.asarray(out["vision"])}, cond, 0, 0, s, cfg.sequence)["vision"]


def static(prompt, controls):
    """One sequence as diffusers' transfer packs it: the text, the controls, the target (first frame clean)."""
    n, (_, t, h, w) = LENGTHS[prompt], SHAPE
    grid = (t, -(-h // 2), -(-w // 2))
    text, after = get_3d_mrope_ids_text_tokens(n, 0, use_float_positions=True)
    item, _ = get_3d_mrope_ids_vae_tokens(*grid, after + 15000, True, FPS, 24.0, 4)
    size, at = int(np.prod(grid)), n + controls * int(np.prod(grid))
    noisy = torch.arange(at, at + size).view(t, -1)[1:].flatten()
    return dict(
        input_ids=torch.tensor(Words().generation_ids(prompt)), text_indexes=torch.arange(n), und_len=n,
        position_ids=torch.cat([text, *[item.float()] * (controls + 1)], 1), sequence_length=at + size,
        vision_token_shapes=[grid] * (controls + 1), vision_sequence_indexes=torch.arange(n, at + size),
        vision_mse_loss_indexes=noisy,
        vision_noisy_frame_indexes=[torch.tensor([], dtype=torch.long)] * controls + [torch.arange(1, t)],
    )  # fmt: skip


@functools.lru_cache
def reference(how, steps=STEPS, controls=1):
    """diffusers' transfer loop: its denoiser block, its solver, the clean frame put back after each step.

    An open interval, or `normalize`: the velocities of the same sequences, mixed as the framework does.
    """
    model = tiny()[0]
    s = packed(controls)[3]
    sequences = {
        "cond_full_static": static("the caption", controls),
        "cond_no_control_static": static("the caption", 0),
        "uncond_full_static": static("", controls),
    }
    solver = diffusers_unipc(steps, SHIFT)
    mask = torch.ones(1, *SHAPE)
    mask[:, :, 0] = 0
    clean = torch.from_numpy(s.vision_latents)[None]
    x = mask * torch.from_numpy(generate.framework_noise(5, SHAPE))[None] + (1 - mask) * clean
    noisy = sequences["uncond_full_static"]["vision_mse_loss_indexes"]
    for i, t in enumerate(solver.timesteps):
        state = BlockState(
            denoiser_input_fields=sequences, velocity_mask=mask, guidance_scale=how.text, control_guidance=how.control,
            guidance_interval=how.interval, control_guidance_interval=how.control_interval,
            vision_tokens_full=[*(torch.from_numpy(c)[None] for c in s.context), x],
            vision_tokens_target=[x], vision_timesteps=torch.full((len(noisy),), int(t)),
        )  # fmt: skip
        if how.closed:
            components = SimpleNamespace(transformer=model, scheduler=solver)
            Cosmos3TransferLoopDenoiser()(components, state, i, t)
            v = state.velocity
        else:
            v = torch.from_numpy(framework(how, int(t), functools.partial(velocity, model, sequences, state)))
        x = solver.step(v[None], t, x[None], return_dict=False)[0][0]
        x = mask * x + (1 - mask) * clean
    return x[0].numpy()


def velocity(model, sequences, state, name):
    """One forward of the reference: the target's velocity, 0 on its clean frame."""
    sequence = sequences[f"{name}_static"]
    tokens = state.vision_tokens_target if name == "cond_no_control" else state.vision_tokens_full
    with torch.no_grad():
        out = model(vision_tokens=tokens, vision_timesteps=state.vision_timesteps, **sequence)
    return (out.sample[-1] * state.velocity_mask).numpy()


def framework(how, t, forward):
    """cosmos-framework, inference/transfer.py and `velocity_fn`: controls on the caption's branch, then the text."""

    def acts(scale, interval):
        return scale != 1 and (interval is None or interval[0] < t < interval[1])

    cond = forward("cond_full")
    if acts(how.control, how.control_interval):
        without = forward("cond_no_control")
        cond = without + how.control * (cond - without)
    if not acts(how.text, how.interval):
        return cond
    negative = forward("uncond_full")
    v = negative + how.text * (cond - negative)
    return v * np.clip(np.linalg.norm(cond) / (np.linalg.norm(v) + 1e-8), 0, 1) if how.normalize else v


CLOSED = dict(closed=True)
CASES = {
    "text alone": Guidance(3.0, 1.0, **CLOSED),
    "controls alone": Guidance(1.0, 1.5, **CLOSED),
    "both": Guidance(3.0, 1.5, **CLOSED),
    "neither": Guidance(1.0, 1.0, **CLOSED),
    "intervals that end on a step": Guidance(
        3.0, 1.5, (float(TIMES[3]), float(TIMES[1])), (float(TIMES[2]), 1000.0), **CLOSED
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_transfer_equals_diffusers(name):
    assert oracle.relative(ours(CASES[name]), reference(CASES[name]))[0] <= 5e-5


OPEN = {
    "intervals that end on a step": dataclasses.replace(CASES["intervals that end on a step"], closed=False),
    "normalised": Guidance(3.0, 1.5, normalize=True),
}


@pytest.mark.parametrize("name", OPEN)
def test_the_frameworks_formulas(name):
    assert oracle.relative(ours(OPEN[name]), reference(OPEN[name]))[0] <= 5e-5
    other = dataclasses.replace(OPEN[name], closed=True, normalize=False)
    assert oracle.relative(ours(other), reference(OPEN[name]))[0] > 1e-3


def test_two_controls_in_one_attention_equal_diffusers():
    how = Guidance(3.0, 2.0, closed=True)
    assert oracle.relative(ours(how, steps=2, controls=2), reference(how, steps=2, controls=2))[0] <= 5e-5


def test_without_its_controls_a_sample_is_a_sample_that_never_had_any():
    """Scale 0 leaves the branch `free` alone; also where each control has an attention and a weight of its own."""
    how = Guidance(1.0, 0.0, closed=True)
    for weights in ((), (1.0, 2.0)):
        assert oracle.relative(ours(how, 2, controls=2, weights=weights), reference(how, 2))[0] <= 5e-5


@pytest.fixture
def recompiled():
    """Programs compiled with something replaced are not kept."""
    generate.denoise_cached.clear_cache()
    yield
    generate.denoise_cached.clear_cache()


def test_steps_outside_the_intervals_run_fewer_rows(monkeypatch, recompiled):
    ran, true = [], cosmos.gen

    def gen(params, cfg, rows, *args, **kw):
        jax.debug.callback(lambda: ran.append(len(rows["gen_segment_ids"])), ordered=True)
        return true(params, cfg, rows, *args, **kw)

    monkeypatch.setattr(cosmos, "gen", gen)
    ours(CASES["intervals that end on a step"])
    jax.effects_barrier()
    assert ran == [2, 3, 3, 2, 1]  # steps 0 … 4: controls until 2, the text from 1 to 3


MISTAKES = {  # of steps with text and control guidance: what stands in for what
    "cond + s(cond − uncond)": ("combine", lambda true: lambda v, s, c, f, o: _add(true(v, s, c, f, o), v, f)),
    "captions swapped": ("combine", lambda true: lambda v, s, c, f, o: true(v, s, c, (f[1], f[0], *f[2:]), o)),
    "controls after the text": ("combine", lambda true: lambda v, s, c, f, o: true(v, c, s, f, o)),
    "the cache of the other branch": ("pick", lambda true: lambda cache, have, want: true(cache, have[::-1], want)),
    "the free branch reads the negative caption": ("READS", lambda true: {**true, "free": "uncond"}),
    "controls stay in sight": ("without", lambda true: lambda batch, controls: batch),
    "the target hidden instead": ("without", lambda true: lambda batch, controls: true(batch, ~controls)),
}


def _add(mixed, v, form):
    """n + c(f − n) + s(… − u) instead of u + s(… − u)."""
    parts = {n: dict(zip(form, jnp.split(x, len(form)), strict=True)) for n, x in v.items()}
    return {n: mixed[n] + parts[n]["cond"] - parts[n]["uncond"] for n in mixed}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name, monkeypatch, recompiled):
    where, make = MISTAKES[name]
    monkeypatch.setattr(guidance, where, make(getattr(guidance, where)))
    how = CASES["both"]
    assert oracle.relative(ours(how), reference(how))[0] > 1e-2


def test_normalisation_is_per_sample_and_over_all_modalities():
    rng = np.random.RandomState(0)
    owner = {"vision": np.array([[0, 0, 1, -1]]), "action": np.array([[1, 1, 0]])}
    v = {n: rng.standard_normal((2, ids.shape[1], 5)).astype(np.float32) for n, ids in owner.items()}
    v["vision"][:, 3] = 0  # padding
    owners = {n: ids[..., None] == np.arange(3) for n, ids in owner.items()}
    got = guidance.combine(v, 4.0, owners=owners)
    plain = {n: x[1:] + 4 * (x[:1] - x[1:]) for n, x in v.items()}
    for segment in (0, 1):
        own = {n: ids == segment for n, ids in owner.items()}
        length = {
            k: np.sqrt(sum(np.square(tree[n][:1][own[n]]).sum() for n in own)) for k, tree in (("c", v), ("v", plain))
        }
        ratio = length["c"] / (length["v"] + 1e-8)
        assert ratio < 0.9
        for n in own:
            np.testing.assert_allclose(got[n][own[n]], plain[n][own[n]] * ratio, rtol=1e-5)
    long = guidance.combine(v, 0.5, owners=owners)  # shorter than the caption's velocity: left alone
    short = {n: x[1:] + np.float32(0.5) * (x[:1] - x[1:]) for n, x in v.items()}
    lengths = [np.sqrt(sum(np.square(t[n][:1][owner[n] == 0]).sum() for n in owner)) for t in (v, short)]
    assert lengths[1] < lengths[0]
    np.testing.assert_allclose(long["vision"][owner["vision"] == 0], short["vision"][owner["vision"] == 0], rtol=1e-6)


@pytest.mark.parametrize("closed, runs", [(True, [2, 2, 2, 1]), (False, [1, 2, 1, 1])])
def test_the_ends_of_an_interval(closed, runs):
    rows, forms = Guidance(3.0, interval=(400, 900), closed=closed).plan(np.array([900, 700, 400, 399]))
    assert [len(forms[i]) for i in rows["form"]] == runs
    np.testing.assert_array_equal(rows["text"], [3.0 if n == 2 else 1.0 for n in runs])


def test_control_guidance_needs_controls():
    cond, uncond, _, _ = packed()
    with pytest.raises(ValueError, match="control guidance 1.5 needs to know the controls"):
        generate.Job(cond, {}, schedules.unipc(4, 5.0), Guidance(3.0, 1.5), uncond)
    generate.Job(cond, {}, schedules.unipc(4, 5.0), Guidance(3.0, 1.5, control_interval=(2000, 3000)), uncond)
