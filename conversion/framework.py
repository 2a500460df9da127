"""cosmos-framework's own names of the whole model: both towers, projections, heads, and the eye of a Qwen3-VL reasoner.

In: `ModelConfig`. Out: entries, the same tensors as in diffusers' and transformers' layouts under other names. Spec
training.md §3.2.
"""

from __future__ import annotations

import dataclasses
import re

from conversion import omni, reasoner
from conversion.names import Entry, rename
from cosmos_jax.config import ModelConfig

PREFIXES = ("model.net_ema.", "net_ema.", "model.net.", "net.")  # of all names; an average comes first
VISUAL = "language_model.visual."
RULES = [  # diffusers → framework; one of them matches each name
    (r"^(layers\.\d+\.self_attn)\.add_([qkv])_proj\.", r"language_model.model.\1.\2_proj_moe_gen."),
    (r"^(layers\.\d+\.self_attn)\.to_add_out\.", r"language_model.model.\1.o_proj_moe_gen."),
    (r"^(layers\.\d+\.self_attn)\.norm_added_([qk])\.", r"language_model.model.\1.\2_norm_moe_gen."),
    (r"^(layers\.\d+\.self_attn)\.to_([qkv])\.", r"language_model.model.\1.\2_proj."),
    (r"^(layers\.\d+\.self_attn)\.to_out\.", r"language_model.model.\1.o_proj."),
    (r"^(layers\.\d+\.self_attn)\.norm_([qk])\.", r"language_model.model.\1.\2_norm."),
    (r"^(layers|embed_tokens|norm|norm_moe_gen)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^proj_in\.", "vae2llm."),
    (r"^proj_out\.", "llm2vae."),
    (r"^time_embedder\.linear_1\.", "time_embedder.mlp.0."),
    (r"^time_embedder\.linear_2\.", "time_embedder.mlp.2."),
    (r"^action_proj_in\.", "action2llm."),
    (r"^action_proj_out\.", "llm2action."),
    (r"^audio_proj_in\.", "sound2llm."),
    (r"^audio_proj_out\.", "llm2sound."),
    (r"^audio_modality_embed$", "sound_modality_embed"),
    (r"^action_modality_embed$", "action_modality_embed"),
]


def entries(cfg: ModelConfig, prefix: str = "net.") -> list[Entry]:
    """Every tensor, exactly once. prefix: `net.`, or `net_ema.` for the average; exported files say `model.` first."""
    out = [dataclasses.replace(e, source=prefix + _rename(e.source)) for e in omni.entries(cfg)]
    eye = reasoner.vision_entries(cfg) if cfg.vision else []
    return out + [dataclasses.replace(e, source=prefix + VISUAL + e.source) for e in eye]


def _rename(name: str) -> str:
    if not any(re.match(pattern, name) for pattern, _ in RULES):
        raise KeyError(f"{name!r} has no name in the framework's layout; add it to RULES.")
    return rename(name, RULES)
