"""config.json of a PyTorch checkpoint → `ModelConfig`. Every field is understood, known to be harmless, or an error.

In: the parsed JSON. Out: `ModelConfig`. A field that this reader does not know could change numbers, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conversion.check import ConversionError
from cosmos_jax.config import ModelConfig, VisionConfig

# Fields that change no number of a forward pass with dropout off.
HARMLESS = {
    "_class_name", "_diffusers_version", "_name_or_path", "architectures", "attention_dropout", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "image_token_id", "initializer_range",
    "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache", "video_token_id", "vision_end_token_id", "vision_start_token_id",
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

    def whole(self, name: str) -> int:
        """A number where transformers also allows one per axis."""
        x = self.take(name)
        if type(x) is not int:
            raise ConversionError(f"{self.where}: {name} = {x!r} is not supported; only one whole number is.")
        return x

    def root(self, name: str) -> int:
        """The side of a square grid of so many places."""
        n = self.take(name)
        side = math.isqrt(n)
        if side**2 != n:
            raise ConversionError(f"{self.where}: {name} = {n} is not a square grid.")
        return side

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
    f.expect("backbone_type", None, "cosmos3_edge_nemotron_dense")  # what the framework's exporter adds for Edge
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
        temporal_factor=f.take("temporal_compression_factor", 4),
        sound_latent_fps=float(f.take("sound_latent_fps", 25.0)),
        temporal_margin=float(f.take("unified_3d_mrope_temporal_modality_margin", 15000)),
    )  # fmt: skip
    f.done()
    return cfg


def reasoner(config: Mapping[str, Any], name: str = "imported") -> ModelConfig:
    """config.json of a reasoner, as transformers 5.23 writes it: Qwen3-VL, or Cosmos 3 Nano, Super, Edge.

    The generator in the result is the family's, without action and sound. Tied or not: `tied_embeddings`.
    """
    kind = config.get("model_type")
    if kind == "cosmos3_edge":
        return _cosmos3_edge(config, name)
    if kind in ("qwen3_vl", "cosmos3_omni"):
        return _qwen3_vl(config, name)
    raise ConversionError(
        f"config.json: model_type = {kind!r} is no reasoner known here; only qwen3_vl, cosmos3_omni, cosmos3_edge are."
    )


def tied_embeddings(config: Mapping[str, Any]) -> bool:
    """Has the checkpoint one tensor for embed_tokens and lm_head? True for Qwen3-VL 2B and 4B."""
    tables = (config, config.get("text_config", {}))
    said = {bool(t["tie_word_embeddings"]) for t in tables if "tie_word_embeddings" in t}
    if len(said) > 1:
        raise ConversionError("config.json and its text_config disagree on tie_word_embeddings; correct one of them.")
    return said == {True}


def _tables(config: Mapping[str, Any]) -> tuple[_Fields, _Fields, _Fields]:
    """The config, its text_config and its vision_config. What the framework adds to the outer one is dropped."""
    outer = _Fields(config, "config.json")
    text, vision = (_Fields(outer.take(t), f"config.json: {t}") for t in ("text_config", "vision_config"))
    for added in ("allow_patterns_overrides", "model"):  # which files to load, and the generator's own settings
        outer.take(added, None)
    return outer, text, vision


def _qwen3_vl(config: Mapping[str, Any], name: str) -> ModelConfig:
    outer, text, vision = _tables(config)
    for table in (outer, text):
        table.take("tie_word_embeddings", None)  # of the file, not of the network: `tied_embeddings`
    outer.done()
    text.expect("hidden_act", "silu")
    text.expect("attention_bias", False)
    theta, sections = _text_rope(text)
    hidden = text.take("hidden_size")
    eye = _qwen3_vl_eye(vision, hidden)
    cfg = ModelConfig(
        name=name, layers=text.take("num_hidden_layers"), hidden=hidden, heads=text.take("num_attention_heads"),
        kv_heads=text.take("num_key_value_heads"), head_dim=text.take("head_dim"), mlp=text.take("intermediate_size"),
        norm_eps=text.take("rms_norm_eps"), rope_theta=theta, rope_sections=sections, vocab=text.take("vocab_size"),
        vision=eye, action_dim=0, sound_dim=0,
    )  # fmt: skip
    text.done()
    return cfg


def _cosmos3_edge(config: Mapping[str, Any], name: str) -> ModelConfig:
    """norm_cast is that of diffusers and the framework; transformers rounds before the weight (spec DISC-14)."""
    outer, text, vision = _tables(config)
    for table in (outer, text):
        table.expect("tie_word_embeddings", False)
    projector = outer.take("projector_hidden_size")
    stated = _Fields(outer.take("projector_config", None) or {}, "config.json: projector_config")
    outer.done()
    text.expect("hidden_act", "relu2")
    for bias in ("attention_bias", "mlp_bias"):
        text.expect(bias, False)
    theta, sections = _text_rope(text)
    eye = _siglip2_eye(vision, projector)
    for field, value in (
        ("merger_intermediate_size", projector), ("input_hidden_size", eye.hidden), ("spatial_merge_size", 2),
        ("out_hidden_size", config["text_config"].get("hidden_size")), ("use_postshuffle_norm", False),
    ):  # fmt: skip
        stated.expect(field, value)
    stated.done()
    cfg = ModelConfig(
        name=name, layers=text.take("num_hidden_layers"), hidden=text.take("hidden_size"),
        heads=text.take("num_attention_heads"), kv_heads=text.take("num_key_value_heads"),
        head_dim=text.take("head_dim"), mlp=text.take("intermediate_size"), mlp_act="relu2",
        norm_eps=text.take("rms_norm_eps"), norm_cast="after_weight", qk_norm_und=False, k_norm_und_for_gen=True,
        rope_theta=theta, rope_sections=sections, vocab=text.take("vocab_size"), vision=eye, action_dim=0, sound_dim=0,
    )  # fmt: skip
    text.done()
    return cfg


def vision_encoder(config: Mapping[str, Any], hidden: int) -> VisionConfig:
    """vision_encoder/config.json of a diffusers folder. hidden: width of the und tower that it feeds."""
    vision = _Fields(config, "vision_encoder/config.json")
    if "depth" in config:
        return _qwen3_vl_eye(vision, hidden)
    return _siglip2_eye(vision, vision.take("projector_hidden_size"))


def _qwen3_vl_eye(vision: _Fields, hidden: int) -> VisionConfig:
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    vision.expect("in_channels", 3)
    vision.expect("spatial_merge_size", 2)
    vision.expect("out_hidden_size", hidden)
    rope = _Fields(vision.take("rope_parameters", None) or {}, f"{vision.where}: rope_parameters")
    rope.expect("rope_type", "axial")
    eye = VisionConfig(
        layers=vision.take("depth"), hidden=vision.take("hidden_size"), heads=vision.take("num_heads"),
        mlp=vision.take("intermediate_size"), patch=vision.whole("patch_size"),
        temporal=vision.whole("temporal_patch_size"), grid=vision.root("num_position_embeddings"),
        deepstack=tuple(vision.take("deepstack_visual_indexes")), rope_theta=float(rope.take("rope_theta", 1e4)),
    )  # fmt: skip
    rope.done()
    vision.done()
    return eye


def _siglip2_eye(vision: _Fields, projector: int) -> VisionConfig:
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    vision.expect("num_channels", 3)
    vision.expect("spatial_merge_size", 2)
    vision.expect("layer_norm_eps", 1e-6)  # the projector's is this, whatever the config says
    eye = VisionConfig(
        kind="siglip2", layers=vision.take("num_hidden_layers"), hidden=vision.take("hidden_size"),
        heads=vision.take("num_attention_heads"), mlp=vision.take("intermediate_size"),
        patch=vision.whole("patch_size"), temporal=1, grid=vision.root("num_patches"), deepstack=(), merger=projector,
    )  # fmt: skip
    vision.done()
    return eye


def _text_rope(text: _Fields) -> tuple[float, tuple[int, int, int]]:
    """(theta, sections) from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    tables = [t for t in (text.take("rope_parameters", None), text.take("rope_scaling", None)) if t]
    if len(tables) > 1 and tables[0] != tables[1]:
        raise ConversionError(f"{text.where}: rope_parameters and rope_scaling disagree; remove one of them.")
    rope = _Fields(tables[0] if tables else {}, f"{text.where}.rope_parameters")
    rope.expect("rope_type", "default")
    rope.expect("mrope_interleaved", True)
    theta = rope.take("rope_theta", text.take("rope_theta", None))
    if theta is None:
        raise ConversionError(f"{text.where} lacks 'rope_theta'; is it the configuration of another model?")
    t, h, w = rope.take("mrope_section", (24, 20, 20))
    rope.done()
    return float(theta), (t, h, w)


def _or(values: tuple) -> str:
    return " or ".join(map(repr, values))
