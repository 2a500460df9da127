"""Analytic floating-point operations: what a step must compute, counted from the real tokens of its batch.

In: `ModelConfig` and a packed batch. Out: FLOPs (2 per multiply-add). XLA's own count is of no use here: it counts the
body of a scan once. The numbers agree with the published tables of Nano, Super and Edge (tests/unit/test_metrics.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cosmos_jax.config import ModelConfig

TRAIN = 3  # forward once, backward twice (gradients of inputs and of weights)
# What rematerialisation adds: is the forward of (matmuls, attention) run a second time?
RECOMPUTED = {"none": (0, 0), "full": (1, 1), "attn": (1, 1), "dots": (0, 1)}


@dataclass(frozen=True)
class Counts:
    """Real (unpadded) tokens of a batch, and attended query-key pairs."""

    und: int = 0
    gen: int = 0
    vision: int = 0
    action: int = 0
    sound: int = 0
    text: int = 0  # supervised und positions: those that need logits
    segments: int = 0  # timestep embeddings
    vit: int = 0
    und_pairs: int = 0  # causal: n(n+1)/2 per segment
    gen_pairs: int = 0  # n_gen · (n_und + n_gen) per segment, for each attention it takes part in
    vit_pairs: int = 0  # n² per frame


def count(batch: dict[str, np.ndarray]) -> Counts:
    """Counts of a host batch (numpy, data_pipelines/schema.py)."""
    und, gen = (_lengths(batch[f"{s}_segment_ids"], batch["segment_task"].shape[1]) for s in ("und", "gen"))
    weight, parts = batch["control_weight"], [gen]
    if weight.shape[1]:  # one attention per weighted control
        ids = np.where(weight > 0, batch["gen_segment_ids"][:, None], -1)
        parts = [_lengths(ids[:, c], gen.shape[1]) for c in range(weight.shape[1])]
    vit_ids = batch["vit_segment_ids"]
    vit = _lengths(vit_ids, int(vit_ids.max(initial=-1)) + 1)
    modalities = {name: int((batch[f"{name}_index"] >= 0).sum()) for name in ("vision", "action", "sound")}
    return Counts(
        und=int(und.sum()),
        gen=int(gen.sum()),
        text=int((batch["und_targets"] >= 0).sum()),
        segments=int((gen > 0).sum()),
        vit=int(vit.sum()),
        und_pairs=int((und * (und + 1) // 2).sum()),
        gen_pairs=int(sum((n * (und + n)).sum() for n in parts)),
        vit_pairs=int((vit**2).sum()),
        **modalities,
    )


def reaches_und(trained: Iterable[str]) -> bool:
    """Does any gradient flow into the und tower, when the parameters of these paths are trained?"""
    return any(path.startswith(("embed_tokens", "vit/", "norm_und", "lm_head", "layers/und")) for path in trained)


def _lengths(ids: np.ndarray, segments: int) -> np.ndarray:
    """[B, T] segment ids → [B, segments] tokens per segment."""
    return (ids[..., None] == np.arange(segments)).sum(1).astype(np.int64)


def matmul_parameters(cfg: ModelConfig) -> int:
    """Weights that every token of one tower multiplies, all layers."""
    heads = 2 * (cfg.heads + cfg.kv_heads) * cfg.head_dim * cfg.hidden
    return cfg.layers * (heads + (3 if cfg.mlp_act == "swiglu" else 2) * cfg.mlp * cfg.hidden)


def forward(cfg: ModelConfig, n: Counts) -> dict[str, int]:
    """FLOPs of one forward pass by part: matmuls of each tower, attention of each, everything else."""
    d, tower, attention = cfg.hidden, matmul_parameters(cfg), 4 * cfg.layers * cfg.heads * cfg.head_dim
    per_action, per_sound = 2 * cfg.action_dim * d, 2 * cfg.sound_dim * d
    edges = n.vision * 2 * cfg.sequence.patch_dim * d + n.action * per_action + n.sound * per_sound
    parts = {
        "und": 2 * tower * n.und,
        "gen": 2 * tower * n.gen,
        "und_attention": attention * n.und_pairs,
        "gen_attention": attention * n.gen_pairs,
        "edges": 2 * edges,  # into and out of the gen stream
        "time": 2 * (256 * d + d * d) * n.segments,
        "logits": 2 * d * cfg.vocab * n.text,
        "vit": 0,
        "vit_attention": 0,
    }
    if v := cfg.vision:
        merger = (1 + len(v.deepstack)) * v.merger_width * (4 * v.hidden + d) // 4
        layers = v.layers * (4 * v.hidden**2 + 2 * v.hidden * v.mlp)
        parts["vit"] = 2 * n.vit * (cfg.sequence.vit_patch_dim * v.hidden + layers + merger)
        parts["vit_attention"] = 4 * v.layers * v.hidden * n.vit_pairs
    return parts


def denoising(cfg: ModelConfig, texts: Sequence[int], tokens: int) -> tuple[dict[str, int], dict[str, int]]:
    """(reading the captions, once per sample; one denoising step), FLOPs by part, all guidance branches together.

    texts: text tokens of each branch. tokens: noisy vision tokens, the same in every branch.
    """
    branches = len(texts)
    read = Counts(und=sum(texts), und_pairs=sum(n * (n + 1) // 2 for n in texts))
    vision, pairs = branches * tokens, tokens * sum(n + tokens for n in texts)
    return forward(cfg, read), forward(cfg, Counts(gen=vision, vision=vision, segments=branches, gen_pairs=pairs))


def train_step(cfg: ModelConfig, n: Counts, train_und: bool = True, remat: bool = False) -> int:
    """FLOPs of one training step.

    train_und=False: nothing upstream of the und tower is trained, so it runs forward only. remat=False counts the
    model's own work (the number behind "model TFLOP/s"); True adds what cfg.remat recomputes.
    """
    matmul, attention = RECOMPUTED[cfg.remat] if remat else (0, 0)
    total = 0
    for part, flops in forward(cfg, n).items():
        again = attention if part.endswith("attention") else matmul if part in ("und", "gen") else 0
        once = not train_und and part in ("und", "und_attention", "vit", "vit_attention")
        total += flops * (1 if once else TRAIN + again)
    return total
