"""config.json of a reasoner and of a vision encoder ↔ `ModelConfig`, `VisionConfig`.

In: the parsed JSON as transformers 5.23 writes it (Qwen3-VL's also in its older form), or ours. Out: the other.
`cosmos3_omni` (Nano, Super) is Qwen3-VL under another name; `cosmos3_edge` is a model of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversion.check import ConversionError
from conversion.fields import Fields
from cosmos_jax.config import ModelConfig, VisionConfig

CLASSES = {  # model_type → class
    "qwen3_vl": "Qwen3VLForConditionalGeneration", "cosmos3_omni": "Cosmos3OmniForConditionalGeneration",
    "cosmos3_edge": "Cosmos3EdgeForConditionalGeneration",
}  # fmt: skip
PROJECTOR = 11520  # `Cosmos3EdgeConfig.projector_hidden_size`
SECTIONS = (24, 20, 20)


def reasoner(config: Mapping[str, Any], name: str = "imported") -> ModelConfig:
    """The und tower and the vision encoder. The generator in the result is the family's, without action and sound.

    Whether the file has an lm_head: `tied`. Edge's `norm_cast` is that of diffusers and the framework; transformers
    rounds before the weight (spec DISC-14).
    """
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise ConversionError(
            f"config.json: model_type = {kind!r} is no known reasoner; only {', '.join(CLASSES)} are."
        )
    edge = kind == "cosmos3_edge"
    outer = Fields(config, "config.json")
    text = Fields(outer.take("text_config"), "config.json: text_config")
    eye_table = dict(outer.take("vision_config"))
    for added in ("allow_patterns_overrides", "model"):  # by the framework: which files to load, the generator's part
        outer.take(added, None)
    for table in (outer, text):  # of the file, not of the network
        table.take("tie_word_embeddings", None)
    for bias in ("attention_bias", "mlp_bias"):
        text.expect(bias, False)
    text.expect("hidden_act", "relu2" if edge else "silu")
    theta, sections = _text_rope(text)
    hidden = text.take("hidden_size")
    if edge:
        eye_table["projector_hidden_size"] = outer.take("projector_hidden_size")
    outer.done()
    cfg = ModelConfig(
        name=name, layers=text.take("num_hidden_layers"), hidden=hidden, heads=text.take("num_attention_heads"),
        kv_heads=text.take("num_key_value_heads"), head_dim=text.take("head_dim"), mlp=text.take("intermediate_size"),
        norm_eps=text.take("rms_norm_eps"), rope_theta=theta, rope_sections=sections, vocab=text.take("vocab_size"),
        vision=vision_encoder(eye_table, hidden, "config.json: vision_config"), action_dim=0, sound_dim=0,
        mlp_act="relu2" if edge else "swiglu", norm_cast="after_weight" if edge else "before_weight",
        qk_norm_und=not edge, k_norm_und_for_gen=edge,
    )  # fmt: skip
    text.done()
    return cfg


def tied(config: Mapping[str, Any]) -> bool:
    """Is embed_tokens the lm_head too, and the only one of the two in the file? True for Qwen3-VL 2B and 4B."""
    tables = (config, config.get("text_config", {}))
    said = {bool(t["tie_word_embeddings"]) for t in tables if "tie_word_embeddings" in t}
    if len(said) > 1:
        raise ConversionError("config.json and its text_config disagree on tie_word_embeddings; correct one of them.")
    if said == {True} and config.get("model_type") == "cosmos3_edge":
        raise ConversionError("config.json: tie_word_embeddings is true, but Edge has an lm_head of its own.")
    return said == {True}


def vision_encoder(config: Mapping[str, Any], hidden: int, where: str = "vision_encoder/config.json") -> VisionConfig:
    """vision_encoder/config.json, or the vision_config of a reasoner, for an und tower of this width."""
    f = Fields(config, where)
    f.expect("hidden_act", "gelu_pytorch_tanh")
    f.expect("spatial_merge_size", 2)
    if config.get("model_type") == "cosmos3_edge_vision":
        f.expect("num_channels", 3)
        f.expect("layer_norm_eps", 1e-6)  # the projector's is this, whatever is said here
        eye = VisionConfig(
            kind="siglip2", layers=f.take("num_hidden_layers"), hidden=f.take("hidden_size"),
            heads=f.take("num_attention_heads"), mlp=f.take("intermediate_size"), patch=f.whole("patch_size"),
            temporal=1, grid=f.root("num_patches"), deepstack=(), merger=f.take("projector_hidden_size", PROJECTOR),
        )  # fmt: skip
    else:
        f.expect("in_channels", 3)
        f.expect("out_hidden_size", hidden)
        rope = Fields(f.take("rope_parameters", None) or {}, f"{where}.rope_parameters")
        rope.expect("rope_type", "axial")
        eye = VisionConfig(
            layers=f.take("depth"), hidden=f.take("hidden_size"), heads=f.take("num_heads"),
            mlp=f.take("intermediate_size"), patch=f.whole("patch_size"), temporal=f.whole("temporal_patch_size"),
            grid=f.root("num_position_embeddings"), deepstack=tuple(f.take("deepstack_visual_indexes")),
            rope_theta=float(rope.take("rope_theta", 1e4)),
        )  # fmt: skip
        rope.done()
    f.done()
    return eye


def _text_rope(text: Fields) -> tuple[float, tuple[int, int, int]]:
    """(theta, sections) from rope_parameters (transformers 5), or from rope_theta and rope_scaling (before)."""
    tables = [t for t in (text.take("rope_parameters", None), text.take("rope_scaling", None)) if t]
    if len(tables) > 1 and tables[0] != tables[1]:
        raise ConversionError(f"{text.where}: rope_parameters and rope_scaling disagree; remove one of them.")
    rope = Fields(tables[0] if tables else {}, f"{text.where}.rope_parameters")
    rope.expect("rope_type", "default")
    rope.expect("mrope_interleaved", True)
    theta = rope.take("rope_theta", text.take("rope_theta", None))
    if theta is None:
        raise ConversionError(f"{text.where} lacks 'rope_theta'; is it the configuration of another model?")
    t, h, w = rope.take("mrope_section", SECTIONS)
    rope.done()
    return float(theta), (t, h, w)


def to_transformers(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `reasoner`: a complete config.json, with an lm_head of its own. Token ids are the class's own."""
    edge = cfg.mlp_act == "relu2"
    kind = "cosmos3_edge" if edge else "cosmos3_omni"
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta, "mrope_section": list(cfg.rope_sections)}
    text = {
        "model_type": "cosmos3_edge_text" if edge else "qwen3_vl_text", "attention_bias": False,
        "hidden_act": "relu2" if edge else "silu", "hidden_size": cfg.hidden, "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim,
        "intermediate_size": cfg.mlp, "rms_norm_eps": cfg.norm_eps, "vocab_size": cfg.vocab,
        "rope_parameters": rope if edge else rope | {"mrope_interleaved": True},
    }  # fmt: skip
    table: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, "tie_word_embeddings": False}
    eye = to_vision_encoder(cfg)
    if edge:
        table["projector_hidden_size"] = eye.pop("projector_hidden_size")
    table |= {"text_config": text, "vision_config": eye}
    same = (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp",
        "mlp_act",
        "norm_eps",
        "norm_cast",
        "qk_norm_und",
    )
    _stated(cfg.name, cfg, reasoner(table), (*same, "k_norm_und_for_gen", "rope_theta", "rope_sections", "vocab"))
    return table


def to_vision_encoder(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `vision_encoder`. ConversionError for settings that the file cannot state."""
    v = cfg.vision
    if v is None:
        raise ConversionError(f"model {cfg.name!r} has no vision encoder to describe; set model.vision.")
    table: dict[str, Any] = {
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": v.hidden, "intermediate_size": v.mlp,
        "patch_size": v.patch, "spatial_merge_size": 2,
    }  # fmt: skip
    if v.kind == "siglip2":
        table |= {
            "model_type": "cosmos3_edge_vision", "num_hidden_layers": v.layers, "num_attention_heads": v.heads,
            "num_channels": 3, "layer_norm_eps": 1e-6, "num_patches": v.grid**2,
            "projector_hidden_size": v.merger_width,
        }  # fmt: skip
    else:
        table |= {
            "model_type": "qwen3_vl_vision", "depth": v.layers, "num_heads": v.heads, "in_channels": 3,
            "temporal_patch_size": v.temporal, "out_hidden_size": cfg.hidden, "num_position_embeddings": v.grid**2,
            "deepstack_visual_indexes": list(v.deepstack),
            "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
        }  # fmt: skip
    same = (
        "kind",
        "layers",
        "hidden",
        "heads",
        "mlp",
        "patch",
        "temporal",
        "grid",
        "deepstack",
        "merger_width",
        "norm_eps",
    )
    _stated(cfg.name, v, vision_encoder(table, cfg.hidden), same if v.kind == "siglip2" else (*same, "rope_theta"))
    return table


def _stated(name: str, ours: Any, back: Any, fields: tuple[str, ...]) -> None:
    """Refuse a setting that was lost on the way into a config.json."""
    for field in fields:
        x = getattr(ours, field)
        if getattr(back, field) != x:
            raise ConversionError(f"model {name!r}: a config.json of its kind cannot state {field} = {x!r}.")
