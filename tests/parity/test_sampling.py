"""Sampling equals diffusers: whole trajectories of a guided tiny model, and what must hold exactly.

Thresholds: parity protocol §4.3 (free-running 5e-5; test_report.py compares each step alone).
"""

import copy
import functools

import numpy as np
import pytest
import torch
from parity import oracle
from parity.test_solver import diffusers_unipc

from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import generate, schedules
from data_pipelines.packing import unpatchify
from data_pipelines.schema import FIELDS, MODALITIES

GUIDANCE, CONDITION = 6.0, dict(cond=(0,), action_cond=(1,))
SHAPE = (8, 3, 5, 6)  # C, T, h, w of `oracle.inputs`


@functools.lru_cache
def tiny():
    model = oracle.reference(oracle.OMNI)
    cfg = oracle.model_config(oracle.OMNI)
    return model, cfg, oracle.params(model, cfg)


def branches(cfg, seed=1):
    """The same sample with a long and a short caption: reference inputs and our batches, padded alike."""
    kws = [oracle.inputs(oracle.OMNI, und_len=n, seed=seed, **CONDITION) for n in (29, 7)]
    kws[1]["input_ids"] = kws[1]["input_ids"] + 11
    return kws, [widen(oracle.batch(kw, cfg), 32) for kw in kws]


def widen(batch, und):
    def pad(name, x):
        axes = FIELDS[name].axes
        if "U" not in axes:
            return x
        return np.pad(x, [(0, und - n if a == "U" else 0) for a, n in zip(axes, x.shape, strict=True)],
                      constant_values=FIELDS[name].pad)  # fmt: skip

    return {k: pad(k, v) for k, v in batch.items()}


def rows(*batches):
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def noise_of(batch, seed=5):
    return generate.framework_buffers(batch, {(b, 0): (seed + b, [SHAPE]) for b in range(len(batch["und_ids"]))}, 2)


def sample(batch, uncond=None, steps=4, guidance=GUIDANCE, seed=5, **kw):
    _, cfg, params = tiny()
    schedule = schedules.unipc(steps, 5.0)
    out = generate.sample_latents(
        params, cfg, batch, noise_of(batch, seed), schedule, guidance, uncond=uncond, precision=HIGHEST, **kw
    )
    return {k: np.asarray(v) for k, v in out.items()}


def to_reference(buffers, kw):
    """Our buffers (row 0) → the reference's latents."""
    n = int(np.prod(kw["vision_token_shapes"][0]))
    return {
        "vision": unpatchify(np.asarray(buffers["vision"])[0, :n], SHAPE, 2)[None],
        "action": np.asarray(buffers["action"])[0, : len(kw["action_tokens"][0])],
        "sound": np.asarray(buffers["sound"])[0, : kw["sound_tokens"][0].shape[1]].T,
    }


def reference_loop(model, kws, start, steps, shift):
    """diffusers' transformer and solvers, as its pipeline runs them. Latents before each step and after the last."""
    solver = diffusers_unipc(steps, shift)
    solvers = {name: copy.deepcopy(solver) for name in start}
    x = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in start.items()}
    path, velocities = [x], []
    for t in solver.timesteps:
        out = []
        for kw in kws:
            fed = {f"{k}_tokens": [v] for k, v in x.items()}
            times = {k: torch.full_like(v, int(t)) for k, v in kw.items() if k.endswith("_timesteps")}
            with torch.no_grad():
                r = model(**(kw | fed | times))
            out.append({"vision": r.sample[0], "action": r.action[0], "sound": r.sound[0]})
        v = {k: out[1][k] + GUIDANCE * (out[0][k] - out[1][k]) for k in x}
        x = {k: solvers[k].step(v[k][None], t, x[k][None], return_dict=False)[0][0] for k in x}
        path.append(x)
        velocities.append(v)
    return [{k: v.numpy() for k, v in p.items()} for p in path], [
        {k: v.numpy() for k, v in p.items()} for p in velocities
    ]


@pytest.mark.parametrize("steps", [4, 35])
def test_guided_sampling_equals_diffusers(steps):
    """Free-running, guidance 6, captions of different length, conditions, three modalities."""
    model, cfg, _ = tiny()
    kws, (cond, uncond) = branches(cfg)
    noise = noise_of(cond)
    start = {n: np.where(cond[f"{n}_noisy"][..., None], noise[n], cond[f"{n}_x0"]) for n in MODALITIES}
    path, _ = reference_loop(model, kws, to_reference(start, kws[0]), steps, 5.0)
    ours = to_reference(sample(cond, uncond, steps), kws[0])
    for name, want in path[-1].items():
        assert oracle.relative(ours[name], want)[0] <= 5e-5, name


def test_clean_tokens_stay_exact_and_invalid_elements_stay_zero():
    _, cfg, _ = tiny()
    _, (cond, uncond) = branches(cfg)
    cond["action_width"][0, :4] = uncond["action_width"][0, :4] = 7
    out = sample(cond, uncond)
    for name in MODALITIES:
        clean = (cond[f"{name}_index"] >= 0) & ~cond[f"{name}_noisy"]
        width = 7 if name == "action" else None
        np.testing.assert_array_equal(out[name][clean][:, :width], cond[f"{name}_x0"][clean][:, :width])
        assert (out[name][cond[f"{name}_index"] < 0] == 0).all()
        moved = out[name][cond[f"{name}_noisy"]] != cond[f"{name}_x0"][cond[f"{name}_noisy"]]
        assert moved[:, :7].mean() > 0.5
    assert (out["action"][0, :, 7:] == 0).all()
    edge = unpatchify(out["vision"][0, :27], (8, 3, 6, 6), 2)  # h = 5 is odd: row 5 is padding
    assert (edge[:, :, 5] == 0).all() and (edge[:, 1:, 4] != 0).all()


def test_sampling_repeats_by_seed_and_rows_are_samples_of_their_own():
    _, cfg, _ = tiny()
    a, b = branches(cfg)[1], branches(cfg, seed=9)[1]
    both = sample(rows(a[0], b[0]), rows(a[1], b[1]))
    again = sample(rows(a[0], b[0]), rows(a[1], b[1]))
    other = sample(rows(a[0], b[0]), rows(a[1], b[1]), seed=6)
    alone = sample(a[0], a[1])
    for name in MODALITIES:
        np.testing.assert_array_equal(both[name], again[name])
        assert oracle.relative(other[name], both[name])[0] > 1e-2
        assert oracle.relative(both[name][:1], alone[name])[0] <= 1e-5


def test_guidance_of_one_is_the_conditional_branch_alone():
    _, cfg, _ = tiny()
    _, (cond, uncond) = branches(cfg)
    alone, ignored = sample(cond, guidance=1.0), sample(cond, uncond, guidance=1.0)
    almost = sample(cond, uncond, guidance=1 + 1e-7)
    for name in MODALITIES:
        np.testing.assert_array_equal(alone[name], ignored[name])
        assert oracle.relative(almost[name], alone[name])[0] <= 1e-5


def test_reused_keys_and_values_equal_recomputing_the_und_tower():
    _, cfg, _ = tiny()
    _, (cond, uncond) = branches(cfg)
    once, every_step = sample(cond, uncond, 6), sample(cond, uncond, 6, reuse=False)
    for name in MODALITIES:
        np.testing.assert_array_equal(once[name], every_step[name])


def test_contradictions_are_named():
    _, cfg, _ = tiny()
    _, (cond, uncond) = branches(cfg)
    with pytest.raises(ValueError, match="guidance=6.0 needs"):
        sample(cond)
    with pytest.raises(ValueError, match="und_ids"):
        sample(cond, widen(uncond, 40))
    moved = uncond | {"vision_noisy": ~uncond["vision_noisy"]}
    with pytest.raises(ValueError, match="vision_noisy"):
        sample(cond, moved)


def test_framework_noise_restarts_for_every_modality():
    """Spec §7.1: the same integer seed for vision, action and sound, in latent layout, before patchifying."""
    _, cfg, _ = tiny()
    cond = branches(cfg)[1][0]
    noise = noise_of(cond, seed=5)
    flat = np.random.RandomState(5).standard_normal(8 * 3 * 5 * 6).astype(np.float32)
    np.testing.assert_array_equal(unpatchify(noise["vision"][0, :27], SHAPE, 2).ravel(), flat)
    np.testing.assert_array_equal(noise["action"][0, :4].ravel(), flat[:48])
    np.testing.assert_array_equal(noise["sound"][0, :7].T.ravel(), flat[:42])
    with pytest.raises(ValueError, match="every vision item"):
        generate.framework_buffers(cond, {(0, 0): (5, [(8, 1, 5, 6)])}, 2)
