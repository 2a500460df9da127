"""`ModelConfig` → config.json of a PyTorch checkpoint: the inverse of conversion/configs.py, and proven to be.

In: `ModelConfig`. Out: a JSON table that reads back as the same model, or ConversionError.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from conversion import configs
from conversion.check import ConversionError
from cosmos_jax.config import ModelConfig

EXECUTION = ("name", "scan", "remat", "attention", "init_std")  # how it runs and began, not what it is
GENERATOR = (
    "k_norm_und_for_gen", "norm_cast", "latent_channels", "patch", "action_dim", "domains", "sound_dim",
    "timestep_scale", "base_fps", "temporal_factor", "sound_latent_fps", "temporal_margin",
)  # fmt: skip


def diffusers_transformer(cfg: ModelConfig) -> dict[str, Any]:
    """A complete transformer/config.json."""
    table = {
        "_class_name": "Cosmos3OmniTransformer", "attention_bias": False, "enable_fps_modulation": True,
        "unified_3d_mrope_reset_spatial_ids": True, "hidden_act": "silu" if cfg.mlp_act == "swiglu" else "relu2",
        "num_hidden_layers": cfg.layers, "hidden_size": cfg.hidden, "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "intermediate_size": cfg.mlp,
        "rms_norm_eps": cfg.norm_eps, "qk_norm_for_text": cfg.qk_norm_und,
        "use_und_k_norm_for_gen": cfg.k_norm_und_for_gen, "rope_theta": cfg.rope_theta,
        "rope_axes_dim": list(cfg.rope_sections), "vocab_size": cfg.vocab, "latent_channel": cfg.latent_channels,
        "latent_patch_size": cfg.patch, "patch_latent_dim": cfg.latent_channels * cfg.patch**2,
        "action_gen": bool(cfg.action_dim), "action_dim": cfg.action_dim or None, "num_embodiment_domains": cfg.domains,
        "sound_gen": bool(cfg.sound_dim), "sound_dim": cfg.sound_dim or None, "sound_latent_fps": cfg.sound_latent_fps,
        "timestep_scale": cfg.timestep_scale, "base_fps": cfg.base_fps,
        "unified_3d_mrope_temporal_modality_margin": cfg.temporal_margin,
    }  # fmt: skip
    return _proven(table, configs.diffusers_transformer(table), cfg, "vision")


def reasoner(cfg: ModelConfig) -> dict[str, Any]:
    """A complete config.json for transformers: `cosmos3_omni` or `cosmos3_edge`, with the released token ids."""
    qwen = cfg.vision.kind == "qwen3vl"
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, "mrope_section": list(cfg.rope_sections)}
    text = {
        "num_hidden_layers": cfg.layers, "hidden_size": cfg.hidden, "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "intermediate_size": cfg.mlp,
        "rms_norm_eps": cfg.norm_eps, "vocab_size": cfg.vocab, "hidden_act": "silu" if qwen else "relu2",
        "rope_parameters": rope | {"mrope_interleaved": True}, "tie_word_embeddings": False, "attention_bias": False,
    }  # fmt: skip
    table: dict[str, Any] = {"tie_word_embeddings": False, "vision_config": vision_encoder(cfg), "text_config": text}
    if qwen:
        named = {"model_type": "cosmos3_omni", "architectures": ["Cosmos3OmniForConditionalGeneration"]}
    else:
        table["projector_hidden_size"] = table["vision_config"].pop("projector_hidden_size")
        named = {"model_type": "cosmos3_edge", "architectures": ["Cosmos3EdgeForConditionalGeneration"]}
    return _proven(named | table, configs.reasoner(named | table), cfg, *GENERATOR)


def vision_encoder(cfg: ModelConfig) -> dict[str, Any]:
    """A complete vision_encoder/config.json."""
    v = cfg.vision
    table: dict[str, Any] = {
        "hidden_size": v.hidden, "intermediate_size": v.mlp, "patch_size": v.patch, "spatial_merge_size": 2,
        "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    if v.kind == "qwen3vl":
        table |= {
            "depth": v.layers, "num_heads": v.heads, "temporal_patch_size": v.temporal, "in_channels": 3,
            "num_position_embeddings": v.grid**2, "deepstack_visual_indexes": list(v.deepstack),
            "out_hidden_size": cfg.hidden, "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
        }  # fmt: skip
    else:
        table |= {
            "num_hidden_layers": v.layers, "num_attention_heads": v.heads, "num_channels": 3, "num_patches": v.grid**2,
            "layer_norm_eps": v.norm_eps, "projector_hidden_size": v.merger,
        }  # fmt: skip
    back = configs.vision_encoder(table, cfg.hidden)
    if dataclasses.replace(back, init_std=v.init_std) != v:
        raise ConversionError(f"model {cfg.name!r} has a vision encoder that no config.json here can state.")
    return table


def _proven(table: dict, back: ModelConfig, cfg: ModelConfig, *unstated: str) -> dict:
    """The table, once it reads back as `cfg` in all that it states."""
    same = {k: getattr(cfg, k) for k in (*EXECUTION, *unstated)}
    if back.vision and cfg.vision:
        same["vision"] = dataclasses.replace(back.vision, init_std=cfg.vision.init_std)
    if dataclasses.replace(back, **same) != cfg:
        raise ConversionError(f"model {cfg.name!r} has settings that this layout's config.json cannot state.")
    return table
