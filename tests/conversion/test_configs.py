"""A PyTorch config.json becomes our config, or one sentence."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from parity import oracle
from parity import reasoner_oracle as reasoners

from conversion import configs, export_configs, omni, reasoner, safetensors, tree
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


def unseen(cfg):
    """The config without what a reasoner's config.json does not say: how wide the generator's latents are."""
    return dataclasses.replace(cfg, latent_channels=48)


@pytest.mark.parametrize("kind", reasoners.KINDS)
def test_a_reasoners_config_gives_the_config_of_its_parity_test_and_back(kind):
    saved = json.loads(reasoners.theirs(kind).to_json_string())
    got = configs.reasoner(saved, "tiny")
    assert got == unseen(reasoners.ours(kind))
    written = export_configs.reasoner(got)
    assert configs.reasoner(written, "tiny") == got and not configs.tied_embeddings(written)
    again = transformers.AutoConfig.for_model(**written)
    assert configs.reasoner(json.loads(again.to_json_string()), "tiny") == got


@pytest.mark.parametrize("kind", ["cosmos3_omni", "cosmos3_edge"])
def test_a_vision_encoders_config_there_and_back(kind):
    cfg = reasoners.ours(kind)
    assert configs.vision_encoder(export_configs.vision_encoder(cfg), cfg.hidden) == cfg.vision


def test_the_default_edge_reasoner_is_ours():
    ours = from_dict(importlib.import_module("configs.edge").get_config()).model
    got = configs.reasoner(json.loads(transformers.Cosmos3EdgeConfig().to_json_string()), "edge")
    assert got == dataclasses.replace(ours, action_dim=0, remat=got.remat)


# Qwen3-VL 2B as its repository states it, in the form of transformers 4.57.
QWEN_2B = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 6144, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
    },
    "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl",
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653, "vision_start_token_id": 151652,
}  # fmt: skip
QWEN_4B = QWEN_2B | {
    "text_config": QWEN_2B["text_config"] | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36,
    },
    "vision_config": QWEN_2B["vision_config"] | {"out_hidden_size": 2560},
}  # fmt: skip


@pytest.mark.parametrize(("table", "layers"), [(QWEN_2B, 28), (QWEN_4B, 36)], ids=["2B", "4B"])
def test_the_small_qwen3_vl_fit_with_their_tied_embeddings(table, layers):
    """Names and shapes of transformers' own model of this config, on its meta device; no weight is allocated."""
    cfg = configs.reasoner(table)
    assert cfg.layers == layers and configs.tied_embeddings(table)
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig.from_dict(table))
    in_file = {k: tuple(v.shape) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    target = reasoner.part(cosmos.abstract(cfg))
    assert check(reasoner.entries(cfg, tied=True), in_file, target) == {}
    with pytest.raises(ConversionError, match="lacks 'lm_head.weight'"):
        check(reasoner.entries(cfg), in_file, target)


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


def changed(kind, table="", **fields):
    saved = json.loads(reasoners.theirs(kind).to_json_string())
    inner = saved[table] if table else saved
    inner.update(fields)
    return saved


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("qwen3_vl", model_type="qwen2_vl"), "model_type = 'qwen2_vl' is no reasoner known here"),
        (changed("qwen3_vl", "text_config", moe=3), "text_config: unknown field 'moe'"),
        (changed("qwen3_vl", "text_config", rope_parameters={"rope_type": "yarn"}), "rope_type = 'yarn' is not supp"),
        (changed("qwen3_vl", "text_config", rope_parameters={"factor": 2.0}), "lacks 'rope_theta'"),
        (changed("qwen3_vl", "text_config", rope_scaling={"factor": 2.0}), "rope_parameters and rope_scaling disagree"),
        (changed("cosmos3_omni", "vision_config", out_hidden_size=32), "out_hidden_size = 32 is not supported"),
        (changed("cosmos3_omni", "vision_config", num_position_embeddings=35), "= 35 is not a square grid"),
        (changed("cosmos3_omni", "vision_config", patch_size=[4, 2]), r"patch_size = \[4, 2\] is not supported"),
        (changed("cosmos3_edge", "vision_config", layer_norm_eps=1e-5), "layer_norm_eps = 1e-05 is not supported"),
        (changed("cosmos3_edge", "text_config", mlp_bias=True), "mlp_bias = True is not supported"),
        (changed("cosmos3_edge", projector_act="gelu"), "config.json: unknown field 'projector_act'"),
    ],
)
def test_a_reasoners_config_that_is_not_understood_is_refused(config, message):
    with pytest.raises(ConversionError, match=message):
        configs.reasoner(config)


def test_a_truncated_reasoner_config_is_refused():
    saved = changed("cosmos3_omni")
    with pytest.raises(ConversionError, match="lacks 'vision_config'"):
        configs.reasoner({k: v for k, v in saved.items() if k != "vision_config"})


def test_contradictions_about_tied_embeddings_are_refused():
    with pytest.raises(ConversionError, match="disagree on tie_word_embeddings"):
        configs.tied_embeddings(QWEN_2B | {"tie_word_embeddings": False})
    with pytest.raises(ConversionError, match="tie_word_embeddings = True is not supported"):
        configs.reasoner(changed("cosmos3_edge", tie_word_embeddings=True))


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
