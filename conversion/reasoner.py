"""Names of the reasoner in the transformers layout (`Qwen3VLForConditionalGeneration`, `Cosmos3Omni…`).

In: `ModelConfig` with `vision`. Out: entries of the und tower and the vision encoder. Spec model.md §1.5, §3.1.
"""

from __future__ import annotations

from conversion.names import Entry
from conversion.omni import dense, tower_layer
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos

ATTENTION = {n: f"{n}_proj" for n in "qkvo"} | {"q_norm": "q_norm", "k_norm": "k_norm"}
TEXT, VISUAL = "model.language_model", "model.visual"


def entries(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of the Qwen3-VL model of this config, exactly once. ValueError without a vision encoder."""
    if cfg.vision is None:
        raise ValueError(f"model {cfg.name!r} has no vision encoder; set model.vision to read a Qwen3-VL checkpoint.")
    out = [
        Entry(f"{TEXT}.embed_tokens.weight", ("embed_tokens",)),
        Entry("lm_head.weight", ("lm_head",), axes=(1, 0)),
        Entry(f"{TEXT}.norm.weight", ("norm_und", "weight")),
    ]
    for layer in range(cfg.layers):
        out += tower_layer(cfg, "und", layer, f"{TEXT}.layers.{layer}", ATTENTION, "")
    v = cfg.vision
    patch = f"{VISUAL}.patch_embed.proj"  # a convolution whose kernel is as large as its stride
    kernel, flat = (3, v.temporal, v.patch, v.patch), (v.hidden, 3 * v.temporal * v.patch**2)
    out += [
        Entry(f"{patch}.weight", ("vit", "patch_in", "kernel"), flat, (v.hidden, *kernel), (1, 0)),
        Entry(f"{patch}.bias", ("vit", "patch_in", "bias")),
        Entry(f"{VISUAL}.pos_embed.weight", ("vit", "positions")),
        *_merger(f"{VISUAL}.merger", ("vit", "merger")),
    ]
    for i in range(len(v.deepstack)):
        out += _merger(f"{VISUAL}.deepstack_merger_list.{i}", ("vit", "deepstack"), i)
    for layer in range(v.layers):
        block, at = f"{VISUAL}.blocks.{layer}", ("vit", "layers")
        for part, ours in enumerate("qkv"):
            for name, leaf, axes in (("weight", "kernel", (1, 0)), ("bias", "bias", None)):
                path = (*at, ours, leaf)
                out.append(Entry(f"{block}.attn.qkv.{name}", path, axes=axes, layer=layer, part=part, parts=3))
        pairs = (("attn.proj", "proj"), ("mlp.linear_fc1", "fc1"), ("mlp.linear_fc2", "fc2"))
        for theirs, ours in pairs:
            out += dense(f"{block}.{theirs}", (*at, ours), layer)
        for i in (1, 2):
            out += _norm(f"{block}.norm{i}", (*at, f"norm_{i}"), layer)
    return out


def part(tree: dict) -> dict:
    """What of a whole tree of parameters this layout holds."""
    return cosmos.part(tree, "reasoner")


def _norm(source: str, path: tuple[str, ...], layer: int | None = None) -> list[Entry]:
    return [Entry(f"{source}.{leaf}", (*path, leaf), layer=layer) for leaf in ("weight", "bias")]


def _merger(source: str, path: tuple[str, ...], layer: int | None = None) -> list[Entry]:
    out = _norm(f"{source}.norm", (*path, "norm"), layer)
    for i in (1, 2):
        out += dense(f"{source}.linear_fc{i}", (*path, f"fc{i}"), layer)
    return out
