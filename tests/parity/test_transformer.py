"""The network equals diffusers' `Cosmos3OmniTransformer`, at the thresholds of the parity protocol (§4.3).

That these tests can fail: test_mutations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import oracle

from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST, Precision
from data_pipelines.packing import unpatchify

REL, PEAK = 2e-6, 2e-5
CASES = {
    "everything": {},
    "text_to_video": dict(cond=(), sound=0, action=0),
    "image_condition_odd": dict(T=2, H=7, W=5, cond=(0,), sound=0, action=0),
    "forward_dynamics": dict(cond=(0,), action=4, action_cond=(0, 1, 2, 3), sound=0),
    "inverse_dynamics": dict(cond=(0, 1, 2), action=8, action_cond=(0,), sound=0),
    "one_image": dict(T=1, cond=(), sound=0, action=0, fps=24.0),
}


@functools.lru_cache
def pair(variant: str, shrink: bool = False):
    ref = oracle.OMNI if variant == "omni" else oracle.EDGE
    model, cfg = oracle.reference(ref), oracle.model_config(ref)
    if shrink:  # the eps probe: make the mean squares small, so that eps matters
        with torch.no_grad():
            for name, p in model.named_parameters():
                small = ("embed_tokens", "proj_in", "linear_2", "modality_embed", "down_proj")
                attn = ("to_q", "to_k", "to_v", "to_out", "add_q", "add_k", "add_v", "to_add_out")
                if any(s in name for s in small + attn):
                    p.mul_(1e-2)
    return ref, model, cfg, oracle.params(model, cfg)


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def run(params, cfg, batch, timesteps, precision):
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    return cosmos.apply(params, cfg, batch, noised, timesteps, precision=precision)


def compare(ref, model, cfg, params, kw, precision=HIGHEST):
    """{modality: (ours, reference)} in the reference's own layouts, whole latents with zeros on clean frames."""
    batch = oracle.batch(kw, cfg)
    t = float(kw["vision_timesteps"][0]) if len(kw["vision_timesteps"]) else float(kw["action_timesteps"][0])
    out = run(params, cfg, batch, np.full((1, 2), t, np.float32), precision)
    with torch.no_grad():
        want = model(**kw)
    T, H, W = kw["vision_tokens"][0].shape[2:]
    tokens = np.asarray(out.velocity["vision"])[0, : np.prod(kw["vision_token_shapes"][0])]
    pairs = {"vision": (unpatchify(tokens, (cfg.latent_channels, T, H, W), cfg.patch), want.sample[0][0].numpy())}
    if "sound_tokens" in kw:
        ours = np.asarray(out.velocity["sound"])[0, : kw["sound_tokens"][0].shape[1]].T
        pairs["sound"] = (ours, want.sound[0].numpy())
    if "action_tokens" in kw:
        ours = np.asarray(out.velocity["action"])[0, : kw["action_tokens"][0].shape[0]]
        pairs["action"] = (ours, want.action[0].numpy())
    return pairs


@pytest.mark.parametrize("variant", ["omni", "edge"])
@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_diffusers(variant, case):
    ref, model, cfg, params = pair(variant)
    pairs = compare(ref, model, cfg, params, oracle.inputs(ref, **CASES[case]))
    for name, (ours, want) in pairs.items():
        if not want.any():
            assert not ours.any(), name
            continue
        rel, peak = oracle.relative(ours, want)
        assert rel <= REL and peak <= PEAK, f"{name}: relL2 {rel:.2e}, max/rms {peak:.2e}"
        np.testing.assert_array_equal(ours[want == 0], 0)


@pytest.mark.parametrize("variant", ["omni", "edge"])
def test_eps_probe(variant):
    """With tiny activations the norms' eps decides the result: a wrong eps is off by 1e-2 here."""
    ref, model, cfg, params = pair(variant, shrink=True)
    for name, (ours, want) in compare(ref, model, cfg, params, oracle.inputs(ref)).items():
        assert oracle.relative(ours, want)[0] <= 5e-6, name


def test_conditioned_outputs_are_exactly_zero():
    ref, model, cfg, params = pair("omni")
    kw = oracle.inputs(ref, cond=(0, 2), action_cond=(1,))
    pairs = compare(ref, model, cfg, params, kw)
    assert not pairs["vision"][0][:, [0, 2]].any() and pairs["vision"][0][:, 1].all()
    assert not pairs["action"][0][1].any()


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


def test_bf16_error_is_at_most_torch_s_own():
    """bf16 against fp32 on the same rounded weights: at most 1.25 times PyTorch's own error."""
    ref, model, cfg, params = pair("omni")
    rounded = oracle.reference(ref)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16().float())
    half = oracle.reference(ref)
    half.load_state_dict(rounded.state_dict())
    half = half.to(torch.bfloat16)
    half.time_embedder.to(torch.float32)
    kw = oracle.inputs(ref)
    cast = {
        k: [x.bfloat16() for x in v] if k in ("vision_tokens", "sound_tokens", "action_tokens") else v
        for k, v in kw.items()
    }
    ours = compare(ref, rounded, cfg, oracle.params(rounded, cfg), kw, Precision("bfloat16"))
    with torch.no_grad():
        out = half(**cast)
    torch_half = {"vision": out.sample[0][0], "sound": out.sound[0], "action": out.action[0]}
    for name, (bf16, want) in ours.items():
        limit = 1.25 * oracle.relative(torch_half[name].float().numpy(), want)[0]
        assert oracle.relative(bf16, want)[0] <= limit, name
