"""A PyTorch config.json becomes our config, or one sentence."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
from parity import oracle
from parity import test_reasoner as qwen

from conversion import configs, omni, safetensors, tree
from conversion.check import ConversionError, check
from cosmos_jax.config import from_dict
from cosmos_jax.model import cosmos

NANO = {
    "_class_name": "Cosmos3OmniTransformer", "_diffusers_version": "0.42.1", "action_dim": 64, "action_gen": True,
    "sound_dim": 64, "sound_gen": True, "rope_scaling": {"mrope_section": [24, 20, 20]},
}  # fmt: skip
EDGE = NANO | {
    "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 9216,
    "hidden_act": "relu2", "qk_norm_for_text": False, "use_und_k_norm_for_gen": True, "rms_norm_eps": 1e-5,
    "rope_theta": 1e8, "vocab_size": 131072, "sound_gen": False, "sound_dim": None,
}  # fmt: skip


@pytest.mark.parametrize("which", ["OMNI", "EDGE"])
def test_the_reference_models_config_gives_the_config_of_its_parity_test(which):
    ref = getattr(oracle, which)
    saved = json.loads(oracle.reference(ref).to_json_string())
    assert configs.diffusers_transformer(saved, "tiny") == oracle.model_config(ref)


def test_qwen_config():
    saved = json.loads(qwen.reference().config.to_json_string())
    got = configs.qwen3_vl(saved, qwen.CFG.name)
    assert got == dataclasses.replace(qwen.CFG, latent_channels=got.latent_channels)


@pytest.mark.parametrize(("name", "table"), [("nano", NANO), ("edge", EDGE)])
def test_released_configs_give_our_configs(name, table):
    ours = from_dict(importlib.import_module(f"configs.{name}").get_config()).model
    got = configs.diffusers_transformer(table, name)
    assert got == dataclasses.replace(ours, vision=None, remat=got.remat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm_for_txt": True}, "unknown field 'qk_norm_for_txt'"),
        ({"attention_bias": True}, "attention_bias = True is not supported; only False is"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"enable_fps_modulation": False}, "enable_fps_modulation = False is not supported"),
        ({"patch_latent_dim": 96}, "patch_latent_dim = 96 is not supported; only 192 is"),
        ({"sound_dim": None}, "sound_gen is true but sound_dim is None"),
        ({"_class_name": "WanTransformer3DModel"}, "_class_name = 'WanTransformer3DModel' is not supported"),
    ],
)
def test_what_is_not_understood_is_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        configs.diffusers_transformer(NANO | change)


def test_a_tied_or_truncated_reasoner_config_is_refused():
    saved = json.loads(qwen.reference().config.to_json_string())
    with pytest.raises(ConversionError, match="tie_word_embeddings is true"):
        configs.qwen3_vl(saved | {"tie_word_embeddings": True})
    with pytest.raises(ConversionError, match="lacks 'vision_config'"):
        configs.qwen3_vl({k: v for k, v in saved.items() if k != "vision_config"})
    with pytest.raises(ConversionError, match="unknown field 'moe'"):
        configs.qwen3_vl(saved | {"text_config": saved["text_config"] | {"moe": 3}})


@pytest.mark.parametrize("which", ["OMNI", "EDGE"])
def test_a_saved_folder_becomes_parameters(which, tmp_path):
    """The example of docs/checkpoints.md, on a folder that diffusers wrote in several files."""
    model = oracle.reference(getattr(oracle, which))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = safetensors.open_folder(tmp_path)
    cfg = configs.diffusers_transformer(json.loads((tmp_path / "config.json").read_text()), "tiny")
    check(omni.entries(cfg), source.shapes, omni.part(cosmos.abstract(cfg)))
    params = tree.from_torch(omni.entries(cfg), source)
    jax.tree.map(np.testing.assert_array_equal, params, oracle.params(model, cfg))
