"""transformer/config.json of a diffusers checkpoint ↔ `ModelConfig`.

In: the parsed JSON, or `ModelConfig`. Out: the other. Reasoners: conversion/reasoner_configs.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from conversion.check import ConversionError
from conversion.fields import Fields
from cosmos_jax.config import ModelConfig


def diffusers_transformer(config: Mapping[str, Any], name: str = "imported") -> ModelConfig:
    """transformer/config.json (`Cosmos3OmniTransformer`). Absent fields take that class's defaults."""
    f = Fields(config, "transformer/config.json")
    f.expect("_class_name", "Cosmos3OmniTransformer")
    f.expect("attention_bias", False)
    f.expect("enable_fps_modulation", True)
    f.expect("unified_3d_mrope_reset_spatial_ids", True)
    act = f.take("hidden_act", "silu")
    if act not in ("silu", "relu2"):
        raise ConversionError(f"transformer/config.json: hidden_act = {act!r} is not supported; only silu or relu2 is.")
    scaling = f.take("rope_scaling", None) or {}
    sections = f.take("rope_axes_dim", None) or scaling.get("mrope_section") or (24, 20, 20)
    width, patch = f.take("latent_channel", 48), f.take("latent_patch_size", 2)
    f.expect("patch_latent_dim", width * patch**2)
    action_dim, action = f.take("action_dim", None), f.take("action_gen", False)
    sound_dim, sound = f.take("sound_dim", None), f.take("sound_gen", False)
    for what, on, dim in (("action", action, action_dim), ("sound", sound, sound_dim)):
        if on and not dim:
            raise ConversionError(f"transformer/config.json: {what}_gen is true but {what}_dim is {dim!r}; set it.")
    cfg = ModelConfig(
        name=name, layers=f.take("num_hidden_layers", 36), hidden=f.take("hidden_size", 4096),
        heads=f.take("num_attention_heads", 32), kv_heads=f.take("num_key_value_heads", 8),
        head_dim=f.take("head_dim", 128), mlp=f.take("intermediate_size", 12288),
        mlp_act="swiglu" if act == "silu" else "relu2", norm_eps=f.take("rms_norm_eps", 1e-6),
        norm_cast="before_weight" if act == "silu" else "after_weight",
        qk_norm_und=f.take("qk_norm_for_text", True), k_norm_und_for_gen=f.take("use_und_k_norm_for_gen", False),
        rope_theta=float(f.take("rope_theta", 5e6)), rope_sections=tuple(sections), vocab=f.take("vocab_size", 151936),
        latent_channels=width, patch=patch, action_dim=action_dim if action else 0,
        domains=f.take("num_embodiment_domains", 32), sound_dim=sound_dim if sound else 0,
        timestep_scale=f.take("timestep_scale", 1e-3), base_fps=float(f.take("base_fps", 24)),
        sound_latent_fps=float(f.take("sound_latent_fps", 25.0)),
        temporal_margin=float(f.take("unified_3d_mrope_temporal_modality_margin", 15000)),
    )  # fmt: skip
    f.done()
    return cfg


def to_diffusers(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `diffusers_transformer`: a complete transformer/config.json."""
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
    back = diffusers_transformer(table, cfg.name)
    how = {k: getattr(cfg, k) for k in ("scan", "remat", "init_std", "vision")}
    if dataclasses.replace(back, **how) != cfg:
        raise ConversionError(f"model {cfg.name!r} has settings that a diffusers config.json cannot state.")
    return table
