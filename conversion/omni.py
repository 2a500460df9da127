"""Names of the whole model, both towers, projections and heads, in the diffusers layout.

In: `ModelConfig`. Out: entries, one per tensor of the source. The reasoner's vision encoder is not part of them
(conversion/reasoner.py). Spec model.md §1.5.
"""

from __future__ import annotations

from conversion.names import Entry
from cosmos_jax.config import ModelConfig

NORMS = {"norm_in": "input_layernorm", "norm_post": "post_attention_layernorm"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# our attention parameter → the name in the und tower, and in the gen tower
ATTENTION = {
    "q": ("to_q", "add_q_proj"), "k": ("to_k", "add_k_proj"), "v": ("to_v", "add_v_proj"),
    "o": ("to_out", "to_add_out"), "q_norm": ("norm_q", "norm_added_q"), "k_norm": ("norm_k", "norm_added_k"),
}  # fmt: skip


def entries(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of the diffusers transformer of this config, exactly once."""
    out = [
        Entry("embed_tokens.weight", ("embed_tokens",)),
        Entry("lm_head.weight", ("lm_head",), axes=(1, 0)),
        Entry("norm.weight", ("norm_und", "weight")),
        Entry("norm_moe_gen.weight", ("norm_gen", "weight")),
        *dense("time_embedder.linear_1", ("io", "time", "linear_1")),
        *dense("time_embedder.linear_2", ("io", "time", "linear_2")),
        *dense("proj_in", ("io", "vision_in")),
        *dense("proj_out", ("io", "vision_out")),
    ]
    if cfg.action_dim:
        out += [
            *_domain("action_proj_in", "action_in", cfg.domains, cfg.action_dim, cfg.hidden),
            *_domain("action_proj_out", "action_out", cfg.domains, cfg.hidden, cfg.action_dim),
            Entry("action_modality_embed", ("io", "action_embed")),
        ]
    if cfg.sound_dim:
        out += [
            *dense("audio_proj_in", ("io", "sound_in")),
            *dense("audio_proj_out", ("io", "sound_out")),
            Entry("audio_modality_embed", ("io", "sound_embed")),
        ]
    for layer in range(cfg.layers):
        for column, (tower, suffix, normed) in enumerate((("und", "", cfg.qk_norm_und), ("gen", "_moe_gen", True))):
            names = {ours: theirs[column] for ours, theirs in ATTENTION.items() if normed or "norm" not in ours}
            if tower == "und" and cfg.k_norm_und_for_gen:
                names["k_norm_for_gen"] = "k_norm_und_for_gen"
            out += tower_layer(cfg, tower, layer, f"layers.{layer}", names, suffix)
    return out


def part(tree: dict) -> dict:
    """What of a whole tree of parameters this layout holds."""
    return {k: v for k, v in tree.items() if k != "vit"}


def tower_layer(
    cfg: ModelConfig, tower: str, layer: int, prefix: str, attention: dict, suffix: str = "", mlp: dict = MLP
) -> list[Entry]:
    """One layer of one tower. attention, mlp: our name → name under `<prefix>.self_attn`, `<prefix>.mlp<suffix>`."""
    at, out = ("layers", tower), []
    for ours, theirs in attention.items():
        name = f"{prefix}.self_attn.{theirs}.weight"
        if "norm" in ours:
            out.append(Entry(name, (*at, "attn", ours, "weight"), layer=layer))
        elif ours == "o":  # [D, heads·d] → [heads, d, D]
            view = (cfg.hidden, cfg.heads, cfg.head_dim)
            shape = (cfg.hidden, cfg.heads * cfg.head_dim)
            out.append(Entry(name, (*at, "attn", ours), view, shape, (1, 2, 0), layer))
        else:  # [heads·d, D] → [D, heads, d]
            heads = cfg.heads if ours == "q" else cfg.kv_heads
            view, shape = (heads, cfg.head_dim, cfg.hidden), (heads * cfg.head_dim, cfg.hidden)
            out.append(Entry(name, (*at, "attn", ours), view, shape, (2, 0, 1), layer))
    for ours, theirs in mlp.items():
        if ours != "gate" or cfg.mlp_act == "swiglu":
            out.append(Entry(f"{prefix}.mlp{suffix}.{theirs}.weight", (*at, "mlp", ours), axes=(1, 0), layer=layer))
    for ours, theirs in NORMS.items():
        out.append(Entry(f"{prefix}.{theirs}{suffix}.weight", (*at, ours, "weight"), layer=layer))
    return out


def dense(source: str, path: tuple[str, ...], layer: int | None = None) -> list[Entry]:
    """A linear layer with bias: weight [out, in] → kernel [in, out]."""
    return [
        Entry(f"{source}.weight", (*path, "kernel"), axes=(1, 0), layer=layer),
        Entry(f"{source}.bias", (*path, "bias"), layer=layer),
    ]


def _domain(source: str, ours: str, domains: int, n_in: int, n_out: int) -> list[Entry]:
    """A linear layer per embodiment: row d of fc is that domain's matrix, [in, out] and not [out, in]."""
    return [
        Entry(f"{source}.fc.weight", ("io", ours, "kernel"), (domains, n_in, n_out), (domains, n_in * n_out)),
        Entry(f"{source}.bias.weight", ("io", ours, "bias")),
    ]
