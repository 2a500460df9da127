"""What must hold of the reasoners beside being transformers' (test_report.py compares them, layer by layer)."""

import numpy as np
import pytest
from parity import reasoner_oracle as oracle
from parity.oracle import relative

from cosmos_jax.config import ConfigError, VisionConfig


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
