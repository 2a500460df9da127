"""The reasoners (vision encoder, deep-stack, text tower, lm_head) equal transformers' on the CPU."""

import numpy as np
import pytest
import torch
from parity import reasoner_oracle as oracle
from parity.oracle import relative

from cosmos_jax.config import ConfigError, SampleConfig, VisionConfig
from cosmos_jax.precision import HIGHEST, Precision
from cosmos_jax.sampling import text

NEW = 32


@pytest.mark.parametrize("case", oracle.CASES)
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_logits_features_and_taps_equal_transformers(kind, case):
    model, cfg, params = oracle.pair(kind)
    p = oracle.prompt(case, cfg)
    found = oracle.errors(oracle.got(params, cfg, oracle.batch(p, cfg), p), oracle.want(model, p))
    assert len(found) == 1 + bool(p.pictures) * (1 + len(cfg.vision.deepstack))
    for name, (rel, peak) in found.items():
        assert rel <= oracle.REL and peak <= oracle.PEAK, f"{name}: relL2 {rel:.2e}, max/rms {peak:.2e}"


@pytest.mark.parametrize("case", [c for c in oracle.CASES if c != "text"])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_positions_equal_transformers(kind, case):
    model, cfg, _ = oracle.pair(kind)
    p = oracle.prompt(case, cfg)
    known = {k: v for k, v in oracle.torch_inputs(p).items() if not k.startswith("pixel")}
    ours = oracle.batch(p, cfg)["und_positions"][0, :, : len(p.ids)]
    np.testing.assert_array_equal(ours, model.model.get_rope_index(**known)[0][:, 0])


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_eps_probe(kind):
    """With tiny activations the eps of both towers' norms decides the result (by how much: test_reasoner_mutations)."""
    model, cfg, params = oracle.pair(kind, probe=True)
    p = oracle.prompt("images", cfg)
    found = oracle.errors(oracle.got(params, cfg, oracle.batch(p, cfg), p), oracle.want(model, p))
    assert max(rel for rel, _ in found.values()) <= 5e-6, found


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_greedy_tokens_equal_transformers(kind):
    """An answer of 32 tokens about two images, with transformers' own `generate` and its cache."""
    model, cfg, params = oracle.pair(kind)
    p = oracle.prompt("images", cfg)
    kw = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    want = model.generate(**oracle.torch_inputs(p), **kw)[0, len(p.ids) :].numpy()
    ours = text.generate_text(
        params, cfg, oracle.batch(p, cfg), SampleConfig(max_new_tokens=NEW), eos=(10**6,), precision=HIGHEST
    )
    np.testing.assert_array_equal(np.asarray(ours)[0], want)
    assert len(set(want.tolist())) > NEW // 4  # not a model that repeats one word


@pytest.mark.parametrize("kind", ["cosmos3_omni", "cosmos3_edge"])
def test_bf16_error_is_at_most_torch_s_own(kind):
    """bf16 against fp32 on the same rounded weights and patches: at most 1.25 times PyTorch's own error."""
    half, rounded = oracle.halves(kind)
    cfg = oracle.ours(kind)
    p = oracle.rounded(oracle.prompt("images", cfg))
    want = oracle.want(rounded, p)
    theirs = oracle.errors(oracle.want(half, p, torch.bfloat16), want)
    ours = oracle.got(oracle.params(rounded, cfg), cfg, oracle.batch(p, cfg), p, precision=Precision("bfloat16"))
    for name, (rel, _) in oracle.errors(ours, want).items():
        assert 1e-3 < rel <= 1.25 * theirs[name][0], f"{name}: {rel:.2e}, PyTorch {theirs[name][0]:.2e}"


def test_padding_is_not_seen():
    """Whatever stands in the padding of the patch buffer, the answer is the same to the bit."""
    _, cfg, params = oracle.pair("cosmos3_edge")
    p = oracle.prompt("images", cfg)
    b = oracle.batch(p, cfg)
    clean = oracle.got(params, cfg, b, p)
    empty = b["vit_segment_ids"] < 0
    assert empty.any()
    b["vit_patches"][empty], b["vit_interp_weight"][empty] = 3.0, 0.5
    for name, x in oracle.got(params, cfg, b, p).items():
        np.testing.assert_array_equal(x, clean[name])


def test_the_eyes_of_qwen3_vl_and_omni_are_one_model():
    """`cosmos3_omni` is Qwen3-VL under another name: equal weights, equal logits in PyTorch."""
    p = oracle.prompt("images", oracle.QWEN)
    a, b = (oracle.want(oracle.pair(kind)[0], p)["logits"] for kind in ("qwen3_vl", "cosmos3_omni"))
    assert relative(a, b) == (0.0, 0.0)


def test_an_impossible_eye_is_refused():
    with pytest.raises(ConfigError, match=r"siglip2' has no deep-stack and one frame per patch"):
        VisionConfig(kind="siglip2")
    with pytest.raises(ConfigError, match="model.vision.kind='siglip' is not one of qwen3vl, siglip2"):
        VisionConfig(kind="siglip")
