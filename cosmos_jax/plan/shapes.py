"""Every parameter of a model, without jax: its path, its shape, which mesh axis divides which dimension.

In: `ModelConfig`, `OptimConfig`. Out: bytes by group. The fast estimate may not wait for jax and flax to be imported,
so the declarations of cosmos_jax/model are repeated here; tests/plan/test_estimate.py holds the two equal, path by
path, for every config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cosmos_jax import flops
from cosmos_jax.config import ModelConfig, OptimConfig, VisionConfig

STORED = ("fsdp", "cp")  # as in shard.py
AXES = {"embed": STORED} | dict.fromkeys(
    ("heads", "kv_heads", "mlp", "vocab"), ("tp",)
)  # as shard.RULES; others: whole


@dataclass(frozen=True)
class Parameter:
    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def local(self, mesh: Mapping[str, int], keep: tuple[str, ...] = (*STORED, "tp")) -> int:
        """Elements on one device; keep: mesh axes that stay divided (after the gather: tp alone)."""
        parts = (math.prod(mesh[x] for x in AXES.get(a, ()) if x in keep) for a in self.axes)
        return math.prod(-(-n // p) for n, p in zip(self.shape, parts, strict=True))


def parameters(cfg: ModelConfig) -> Iterator[Parameter]:
    """All of them."""
    d, n = cfg.hidden, cfg.layers
    yield Parameter("embed_tokens", (cfg.vocab, d), ("vocab_in", "embed"))
    yield Parameter("lm_head", (d, cfg.vocab), ("embed", "vocab"))
    for name in ("norm_und", "norm_gen"):
        yield Parameter(f"{name}/weight", (d,), ("hidden",))
    yield from _io(cfg)
    for tower in ("und", "gen"):
        for path, shape, axes in _tower(cfg, tower):
            yield Parameter(f"layers/{tower}/{path}", (n, *shape), ("layers", *axes))
    if cfg.vision:
        for path, shape, axes in _vision(cfg.vision, cfg.sequence.vit_patch_dim, d):
            yield Parameter(f"vit/{path}", shape, axes)


def _tower(cfg: ModelConfig, tower: str):
    d, h, kv, hd, f = cfg.hidden, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.mlp
    yield "attn/q", (d, h, hd), ("embed", "heads", "head_dim")
    yield "attn/k", (d, kv, hd), ("embed", "kv_heads", "head_dim")
    yield "attn/v", (d, kv, hd), ("embed", "kv_heads", "head_dim")
    yield "attn/o", (h, hd, d), ("heads", "head_dim", "embed")
    norms = ["q_norm", "k_norm"] if tower == "gen" or cfg.qk_norm_und else []
    norms += ["k_norm_for_gen"] if tower == "und" and cfg.k_norm_und_for_gen else []
    for name in norms:
        yield f"attn/{name}/weight", (hd,), ("head_dim",)
    for name in ("up", "gate") if cfg.mlp_act == "swiglu" else ("up",):
        yield f"mlp/{name}", (d, f), ("embed", "mlp")
    yield "mlp/down", (f, d), ("mlp", "embed")
    for name in ("norm_in", "norm_post"):
        yield f"{name}/weight", (d,), ("hidden",)


def _io(cfg: ModelConfig) -> Iterator[Parameter]:
    d, v, a, s = cfg.hidden, cfg.sequence.patch_dim, cfg.action_dim, cfg.sound_dim

    def dense(name, n_in, n_out, axes, lead=()):
        named = ("domains",) * len(lead)
        yield Parameter(f"io/{name}/kernel", (*lead, n_in, n_out), (*named, *axes))
        yield Parameter(f"io/{name}/bias", (*lead, n_out), (*named, axes[1]))

    yield from dense("time/linear_1", 256, d, ("feature", "hidden"))
    yield from dense("time/linear_2", d, d, ("embed", "hidden"))
    sizes = {"vision": (v, ()), "action": (a, (cfg.domains,)), "sound": (s, ())}
    for name, (width, lead) in sizes.items():
        if width:
            yield from dense(f"{name}_in", width, d, ("feature", "embed"), lead)
            yield from dense(f"{name}_out", d, width, ("embed", "feature"), lead)
            if name != "vision":
                yield Parameter(f"io/{name}_embed", (d,), ("hidden",))


def _vision(cfg: VisionConfig, patch: int, out: int):
    d, wide, n = cfg.hidden, 4 * cfg.hidden, cfg.layers

    def dense(name, shape, axes, lead=()):
        named = ("layers",) * len(lead)
        yield f"{name}/kernel", (*lead, *shape), (*named, *axes)
        yield f"{name}/bias", (*lead, shape[1]), (*named, axes[1])

    def norm(name, width, lead=()):
        named = ("layers",) * len(lead)
        for part in ("weight", "bias"):
            yield f"{name}/{part}", (*lead, width), (*named, "hidden")

    def merger(name, norm_width, inner, lead=()):
        yield from norm(f"{name}/norm", norm_width, lead)
        yield from dense(f"{name}/fc1", (wide, inner), ("embed", "hidden"), lead)
        yield from dense(f"{name}/fc2", (inner, out), ("embed", "hidden"), lead)

    yield "positions", (cfg.grid**2, d), ("feature", "embed")
    yield from dense("patch_in", (patch, d), ("feature", "embed"))
    for name in ("q", "k", "v", "proj"):
        yield from dense(f"layers/{name}", (d, d), ("embed", "hidden"), (n,))
    yield from dense("layers/fc1", (d, cfg.mlp), ("embed", "hidden"), (n,))
    yield from dense("layers/fc2", (cfg.mlp, d), ("hidden", "embed"), (n,))
    for name in ("layers/norm_1", "layers/norm_2"):
        yield from norm(name, d, (n,))
    yield from merger("merger", d, cfg.merger_width)
    if cfg.deepstack:
        yield from merger("deepstack", wide, cfg.merger_width, (len(cfg.deepstack),))
    if cfg.kind == "siglip2":
        yield from norm("norm", d)


def trained(optim: OptimConfig, every: list[Parameter]) -> list[Parameter]:
    """Those that the optimiser changes."""
    return [p for p in every if optim.trains(p.path)]


def trains_und(optim: OptimConfig, every: list[Parameter]) -> bool:
    """Does any gradient flow into the und tower?"""
    return flops.reaches_und(p.path for p in trained(optim, every))
