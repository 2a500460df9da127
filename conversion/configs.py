"""config.json of a PyTorch checkpoint → `ModelConfig`. Every field is understood, known to be harmless, or an error.

In: the parsed JSON. Out: `ModelConfig`. A field that this reader does not know could change numbers, so it is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from conversion.check import ConversionError
from cosmos_jax.config import ModelConfig, VisionConfig

# Fields that change no number of a forward pass with dropout off.
HARMLESS = {
    "_class_name", "_diffusers_version", "_name_or_path", "architectures", "attention_dropout", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "image_token_id", "initializer_range",
    "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache", "video_token_id", "vision_end_token_id", "vision_start_token_id",
}  # fmt: skip


class _Fields:
    """A table whose fields are taken one by one; what is left must be harmless."""

    def __init__(self, table: Mapping[str, Any], where: str):
        self.left, self.where = dict(table), where

    def take(self, name: str, default: Any = ...) -> Any:
        if name not in self.left and default is ...:
            raise ConversionError(f"{self.where} lacks {name!r}; is it the configuration of another model?")
        return self.left.pop(name, default)

    def expect(self, name: str, *values: Any) -> None:
        """The field, if there, has one of these values; the implementation knows no other."""
        x = self.left.pop(name, values[0])
        if x not in values:
            raise ConversionError(f"{self.where}: {name} = {x!r} is not supported; only {_or(values)} is.")

    def done(self) -> None:
        unknown = sorted(set(self.left) - HARMLESS)
        if unknown:
            raise ConversionError(
                f"{self.where}: unknown field {unknown[0]!r}; it could change numbers, so it is refused."
            )


def diffusers_transformer(config: Mapping[str, Any], name: str = "imported") -> ModelConfig:
    """transformer/config.json (`Cosmos3OmniTransformer`). Absent fields take that class's defaults."""
    f = _Fields(config, "transformer/config.json")
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


def qwen3_vl(config: Mapping[str, Any], name: str = "imported") -> ModelConfig:
    """config.json of Qwen3-VL (2B … 32B) or of a Cosmos 3 reasoner: the und tower and the vision encoder."""
    outer, text = _Fields(config, "config.json"), _Fields(config.get("text_config", {}), "config.json: text_config")
    vision = _Fields(config.get("vision_config", {}), "config.json: vision_config")
    for table in ("text_config", "vision_config"):
        outer.take(table)
    tied = outer.take("tie_word_embeddings", False) or text.take("tie_word_embeddings", False)
    if tied:
        raise ConversionError("config.json: tie_word_embeddings is true; only models with their own lm_head are read.")
    outer.done()
    text.expect("hidden_act", "silu")
    text.expect("attention_bias", False)
    rope = text.take("rope_parameters", None) or text.take("rope_scaling", None) or {}
    for spent in ("rope_scaling", "rope_parameters"):
        text.take(spent, None)
    theta = rope.get("rope_theta", text.take("rope_theta", None))
    text.take("rope_theta", None)
    if theta is None:
        raise ConversionError("config.json: text_config lacks 'rope_theta'; is it the configuration of another model?")
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    vision.expect("in_channels", 3)
    vision.expect("spatial_merge_size", 2)
    hidden = text.take("hidden_size")
    vision.expect("out_hidden_size", hidden)
    eye_rope = vision.take("rope_parameters", None) or {}
    positions = vision.take("num_position_embeddings")
    grid = round(positions**0.5)
    if grid**2 != positions:
        raise ConversionError(f"config.json: num_position_embeddings = {positions} is not a square grid.")
    eye = VisionConfig(
        layers=vision.take("depth"), hidden=vision.take("hidden_size"), heads=vision.take("num_heads"),
        mlp=vision.take("intermediate_size"), patch=vision.take("patch_size"),
        temporal=vision.take("temporal_patch_size"), grid=grid,
        deepstack=tuple(vision.take("deepstack_visual_indexes")), rope_theta=float(eye_rope.get("rope_theta", 1e4)),
    )  # fmt: skip
    vision.done()
    cfg = ModelConfig(
        name=name, layers=text.take("num_hidden_layers"), hidden=hidden, heads=text.take("num_attention_heads"),
        kv_heads=text.take("num_key_value_heads"), head_dim=text.take("head_dim"), mlp=text.take("intermediate_size"),
        norm_eps=text.take("rms_norm_eps"), rope_theta=float(theta),
        rope_sections=tuple(rope.get("mrope_section", (24, 20, 20))), vocab=text.take("vocab_size"), vision=eye,
        action_dim=0, sound_dim=0,
    )  # fmt: skip
    text.done()
    return cfg


def _or(values: tuple) -> str:
    return " or ".join(map(repr, values))
