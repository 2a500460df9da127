"""Names of the reasoner: the und tower and the vision encoder, of Qwen3-VL and Cosmos 3 (Nano, Super, Edge).

In: `ModelConfig` with `vision`. Out: entries. `entries` has the names of transformers' modules, which are those of
Qwen3-VL's files too; `entries_saved` those of the files that transformers writes for Cosmos 3; `vision_entries` those
of the `vision_encoder/` folder. Spec model.md §1.5, §3.1, §3.3; training.md §3.4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

from conversion import configs
from conversion.names import Entry, rename
from conversion.omni import MLP, dense, tower_layer
from cosmos_jax.config import ModelConfig

TEXT, VISUAL = "model.language_model", "model.visual"


def entries(cfg: ModelConfig, tied: bool = False) -> list[Entry]:
    """Every tensor of the reasoner of this config, exactly once, under the names of transformers' modules.

    tied: the checkpoint has no lm_head; its embed_tokens is both (Qwen3-VL 2B and 4B; `configs.tied_embeddings`).
    ValueError without a vision encoder.
    """
    embed = f"{TEXT}.embed_tokens.weight"
    out = [
        Entry(embed, ("embed_tokens",)),
        Entry(embed if tied else "lm_head.weight", ("lm_head",), axes=(1, 0), tied=tied),
        Entry(f"{TEXT}.norm.weight", ("norm_und", "weight")),
    ]
    attention = {n: f"{n}_proj" for n in "qkvo"}
    if cfg.qk_norm_und:
        attention |= {"q_norm": "q_norm", "k_norm": "k_norm"}
    mlp = MLP if cfg.mlp_act == "swiglu" else {"up": "fc1", "down": "fc2"}
    for layer in range(cfg.layers):
        out += tower_layer(cfg, "und", layer, f"{TEXT}.layers.{layer}", attention, mlp=mlp)
    bare = "" if _eye(cfg).kind == "siglip2" else f"{VISUAL}."
    return out + [dataclasses.replace(e, source=bare + e.source) for e in vision_entries(cfg)]


def entries_saved(cfg: ModelConfig) -> list[Entry]:
    """The same tensors as `save_pretrained` of transformers 5.23 names them for `cosmos3_omni` and `cosmos3_edge`.

    Text as in diffusers, Qwen3-VL's vision encoder without a prefix. For Edge the text's patterns match inside of the
    vision encoder too, so that its files say `to_q` and `up_proj` there.
    """
    rules = [(rf"^{TEXT}\.", ""), (r"\.self_attn\.([qkv])_proj\.", r".self_attn.to_\1.")]
    rules += [(r"\.self_attn\.o_proj\.", ".self_attn.to_out."), (r"\.self_attn\.([qk])_norm\.", r".self_attn.norm_\1.")]
    if _eye(cfg).kind == "siglip2":
        rules += [(r"\.mlp\.fc1\.", ".mlp.up_proj."), (r"\.mlp\.fc2\.", ".mlp.down_proj.")]
    else:
        rules += [(rf"^{VISUAL}\.", "")]

    return [dataclasses.replace(e, source=rename(e.source, rules)) for e in entries(cfg)]


NAMINGS: dict[str, Callable[[ModelConfig], list[Entry]]] = {
    "modules": entries, "tied": functools.partial(entries, tied=True), "saved": entries_saved,
}  # fmt: skip


def naming(config: Mapping, tensors: Iterable[str]) -> str:
    """Which of NAMINGS the files of a reasoner follow, by their config.json and names."""
    if configs.tied_embeddings(config):
        return "tied"
    return "modules" if any(name.startswith(f"{TEXT}.") for name in tensors) else "saved"


def vision_entries(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of a `vision_encoder/` folder: bare (Nano, Super), `model.visual.`, `model.projector.` (Edge)."""
    return _siglip2(cfg) if _eye(cfg).kind == "siglip2" else _qwen3vl(cfg)


def part(tree: dict) -> dict:
    """What of a whole tree of parameters this layout holds: nothing of the generator, nor Edge's key norm for it."""
    und = tree["layers"]["und"]
    attention = {k: v for k, v in und["attn"].items() if k != "k_norm_for_gen"}
    rest = {k: v for k, v in tree.items() if k not in ("io", "norm_gen", "layers")}
    return rest | {"layers": {"und": und | {"attn": attention}}}


def vision_part(tree: dict) -> dict:
    """What of a whole tree of parameters a `vision_encoder/` folder holds."""
    return {"vit": tree["vit"]}


def _eye(cfg: ModelConfig):
    if cfg.vision is None:
        raise ValueError(f"model {cfg.name!r} has no vision encoder; set model.vision to read a reasoner's checkpoint.")
    return cfg.vision


def _qwen3vl(cfg: ModelConfig) -> list[Entry]:
    v = _eye(cfg)
    kernel, flat = (3, v.temporal, v.patch, v.patch), (v.hidden, cfg.sequence.vit_patch_dim)
    out = [  # a convolution whose kernel is as large as its stride
        Entry("patch_embed.proj.weight", ("vit", "patch_in", "kernel"), flat, (v.hidden, *kernel), (1, 0)),
        Entry("patch_embed.proj.bias", ("vit", "patch_in", "bias")),
        Entry("pos_embed.weight", ("vit", "positions")),
        *_merger("merger", ("vit", "merger")),
    ]
    for i in range(len(v.deepstack)):
        out += _merger(f"deepstack_merger_list.{i}", ("vit", "deepstack"), i)
    at = ("vit", "layers")
    for layer in range(v.layers):
        block = f"blocks.{layer}"
        for piece, ours in enumerate("qkv"):
            for name, leaf, axes in (("weight", "kernel", (1, 0)), ("bias", "bias", None)):
                path = (*at, ours, leaf)
                out.append(Entry(f"{block}.attn.qkv.{name}", path, axes=axes, layer=layer, part=piece, parts=3))
        for theirs, ours in (("attn.proj", "proj"), ("mlp.linear_fc1", "fc1"), ("mlp.linear_fc2", "fc2")):
            out += dense(f"{block}.{theirs}", (*at, ours), layer)
        for i in (1, 2):
            out += _norm(f"{block}.norm{i}", (*at, f"norm_{i}"), layer)
    return out


def _siglip2(cfg: ModelConfig) -> list[Entry]:
    out = [
        *dense(f"{VISUAL}.embeddings.patch_embedding", ("vit", "patch_in")),
        Entry(f"{VISUAL}.embeddings.position_embedding.weight", ("vit", "positions")),
        *_norm(f"{VISUAL}.post_layernorm", ("vit", "norm")),
        *_merger("model.projector", ("vit", "merger")),
    ]
    linear = {f"self_attn.{n}_proj": n for n in "qkv"}
    linear |= {"self_attn.out_proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    at = ("vit", "layers")
    for layer in range(_eye(cfg).layers):
        block = f"{VISUAL}.encoder.layers.{layer}"
        for theirs, ours in linear.items():
            out += dense(f"{block}.{theirs}", (*at, ours), layer)
        for i in (1, 2):
            out += _norm(f"{block}.layer_norm{i}", (*at, f"norm_{i}"), layer)
    return out


def _norm(source: str, path: tuple[str, ...], layer: int | None = None) -> list[Entry]:
    return [Entry(f"{source}.{leaf}", (*path, leaf), layer=layer) for leaf in ("weight", "bias")]


def _merger(source: str, path: tuple[str, ...], layer: int | None = None) -> list[Entry]:
    out = _norm(f"{source}.norm", (*path, "norm"), layer)
    for i in (1, 2):
        out += dense(f"{source}.linear_fc{i}", (*path, f"fc{i}"), layer)
    return out
