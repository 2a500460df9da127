"""The fast estimate: what a step keeps in memory, term by term, and what it sends, without a compiler.

In: `Config`, topology, what. Out: an answer like `program.run`'s, from formulas. Imports no jax; well under a second.

Of one device, for training:

* parameters, moments, average, batch: exact, from the shapes and how the mesh divides them (`shapes.py`); with
  optim.offload moments and average are on the host, and XLA brings them over piece by piece;
* gradients: float32, one for each trained parameter that it holds (two while micro-batches are summed);
* saved: what the forward pass keeps for the backward pass, every layer (`Widths.saved`): the stream itself under
  `full`; under `attn` the attention's output and log-sum-exp too; under `dots` every matmul's result; under `none` all;
* copy: across slices libtpu copies the stream that the forward loop saved for gen before the backward loop reads it
  (found in its HLO, at 8 and at 36 layers; not on one slice);
* layer: what one layer's backward pass holds at once (`Widths.layer`), and with cp the keys and values of everybody;
* weights: the bfloat16 weights of the layer at work and of the next, gathered, and the embedding table;
* ends: a chunk of logits in float32.

They are added up as if all were alive together. By the mathematics table and logits are not alive in the backward pass
of a layer; the compilers keep the table, and leave holes of that order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cosmos_jax import mesh as meshes
from cosmos_jax.config import Config, ModelConfig
from cosmos_jax.plan import packing, sent, shapes
from pallas_kernels.check.topology import Topology

FLOAT, BF16 = 4, 2
CHUNK = 1024  # und positions whose logits exist at once (loss.LOGIT_CHUNK)
FUSED = {"tpu": "mosaic_tpu", "h100": "mosaic_gpu", "h200": "mosaic_gpu"}
KINDS = {
    "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x",
    "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200",
}  # fmt: skip


def estimate(cfg: Config, t: Topology, what: str = "train", size: str = "") -> dict:
    """As `program.run` answers. ConfigError for a mesh that does not divide the model or the batch."""
    mesh = meshes.sizes(cfg.mesh, t.devices)
    laid: Any = _Sizes(mesh)
    meshes.check_model(cfg.model, laid)
    if what == "train":
        meshes.check(cfg, laid)
    compute = "bfloat16" if cfg.precision.compute == "auto" else cfg.precision.compute
    kernel = FUSED.get(t.platform, FUSED.get(t.family, "xla")) if cfg.model.attention == "auto" else cfg.model.attention
    said = f"auto on {KINDS[t.family]}" if cfg.model.attention == "auto" else "asked for"
    slices = t.copies if t.platform == "tpu" else 1
    parts = train(cfg, mesh, kernel, slices) if what == "train" else generate(cfg.model, mesh, size, kernel)
    before = {"prefill": int(prefill(cfg.model, mesh))} if what == "generate" else {}
    held = {k: v for k, v in parts.items() if k in ("parameters", "optimiser", "average", "batch")}
    inner = {k: int(v) for k, v in parts.items() if k not in held}
    return {
        "kind": KINDS[t.family], "mesh": mesh, "compute": compute, "attention": (kernel, said),
        "memory": {k: int(v) for k, v in held.items()} | {"temporaries": sum(inner.values())},
        "estimate": inner, "devices": t.devices, "samples": mesh["data"] * mesh["fsdp"],
        **sent.estimate(cfg, t, mesh, what, size), **before,
    }  # fmt: skip


class _Sizes:
    """What `mesh.check` looks at of a mesh."""

    def __init__(self, shape: Mapping[str, int]):
        self.shape = shape


class Widths:
    """Elements that one token has on one device, in a layer: the stream, queries, keys with values, the MLP's inside.

    tp divides heads and the MLP's inside; it divides the stream too where tokens are at rest (residuals), not where
    they are at work (around a matmul).
    """

    def __init__(self, m: ModelConfig, mesh: Mapping[str, int]):
        tp = mesh["tp"]
        self.work = m.hidden
        self.rest = m.hidden / tp
        self.q = m.heads * m.head_dim / tp
        self.kv = 2 * m.kv_heads * m.head_dim / tp
        self.inner = m.mlp / tp
        self.ups = 2 if m.mlp_act == "swiglu" else 1
        self.lse = m.heads / tp

    def saved(self, remat: str) -> float:
        """Kept for the backward pass, in elements of the compute dtype (a float32 counts as two)."""
        w = {"full": 0.0, "attn": self.q + 2 * self.lse}
        w["dots"] = self.q + self.kv + 2 * self.rest + self.ups * self.inner
        inside = 3 * self.q + 2 * self.kv + (self.ups + 1) * self.inner + 2 * self.lse
        w["none"] = 2 * self.rest + 2 * self.work + inside
        return self.rest + w[remat]

    def layer(self) -> float:
        """Alive at once in the backward pass of one layer.

        The stream seven times: at rest what came in, what attention left, the gradient and its sum; at work what both
        parts of the layer read, and a gradient before it is added up. The MLP: each input matmul's result and its
        gradient. Queries: before and after norm and rotation, the attention's output, a gradient; keys, values twice.
        """
        return 4 * self.rest + 3 * self.work + 2 * self.ups * self.inner + 4 * self.q + 2 * self.kv


def train(cfg: Config, mesh: Mapping[str, int], kernel: str, slices: int = 1) -> dict[str, float]:
    """Bytes of one device by cause."""
    m, b, every = cfg.model, cfg.data.bucket, list(shapes.parameters(cfg.model))
    learned = shapes.trained(cfg.optim, every)
    und_learns = shapes.trains_und(cfg.optim, every)
    shards, cp = mesh["data"] * mesh["fsdp"], mesh["cp"]
    rows = b.rows / cfg.optim.accumulate / shards
    gen, und = b.gen / cp, b.und / (cp if m.und_tokens == "spread" else 1)
    words, w = BF16 if cfg.precision.compute != "float32" else FLOAT, Widths(m, mesh)
    changed = sum(p.local(mesh) for p in learned)
    matrices = sum(p.local(mesh) for p in learned if p.path.startswith("layers/") and len(p.shape) > 2)
    moments = 2 * changed - (matrices if cfg.optim.name == "muon" else 0)
    kept = m.layers * (gen * w.saved(m.remat) + und * (w.saved(m.remat) if und_learns else w.rest))
    at_work = 2 * words * max(_layer(every, tower, mesh) for tower in ("und", "gen"))
    chunk = min(und, CHUNK / cp) * m.vocab * FLOAT
    met = 2 * w.kv * b.gen if cp > 1 else 0
    return {
        "parameters": FLOAT * sum(p.local(mesh) for p in every),
        "optimiser": 0 if cfg.optim.offload else FLOAT * moments,
        "average": FLOAT * changed if cfg.optim.ema and not cfg.optim.offload else 0,
        "batch": batch(cfg) / shards,
        "gradients": FLOAT * changed * (2 if cfg.optim.accumulate > 1 else 1),
        "saved for the backward pass": rows * words * kept,
        "its copy across slices": rows * words * m.layers * gen * w.rest if slices > 1 else 0,
        "one layer's backward pass": rows * words * gen * w.layer(),
        "keys and values of all of cp": rows * words * met,
        "gathered weights, two layers": at_work,
        "gathered embedding table": words * m.vocab * m.hidden,
        "a chunk of logits": rows * chunk / mesh["tp"],
        "scores": _scores(m, mesh, rows, gen, b.und + b.gen, kernel),
    }


def _layer(every: list[shapes.Parameter], tower: str, mesh: Mapping[str, int]) -> float:
    """Elements of one layer's weights, gathered."""
    mine = [p for p in every if p.path.startswith(f"layers/{tower}")]
    return sum(p.local(mesh, ("tp",)) / p.shape[0] for p in mine)


def _scores(m: ModelConfig, mesh: Mapping[str, int], rows: float, queries: float, keys: float, kernel: str) -> float:
    """Without a fused kernel: float32 scores, their exponentials and a gradient, at most 2²⁵ of each at once."""
    if kernel != "xla":
        return 0.0
    return 3 * FLOAT * min(rows * m.heads / mesh["tp"] * queries * keys, 2**25)


def batch(cfg: Config) -> int:
    """Bytes of a whole packed batch."""
    from data_pipelines.schema import FIELDS, field_shape

    spec, bucket = cfg.model.sequence, cfg.data.bucket
    return sum(math.prod(field_shape(n, bucket, spec)) * f.dtype().itemsize for n, f in FIELDS.items())


def generate(m: ModelConfig, mesh: Mapping[str, int], size: str, kernel: str) -> dict[str, float]:
    """One denoising step of one sample (two guidance branches) for every data × fsdp group.

    Of a layer's forward pass the residual, what is at work on it, and the larger of attention and MLP are alive.
    """
    every, w = list(shapes.parameters(m)), Widths(m, mesh)
    n = 2 * packing.tokens(size, m.patch) / mesh["cp"] / mesh.get("cfg", 1)
    mine = [p for p in every if p.path.startswith(("layers/gen", "io/", "norm_gen"))]
    texts = 2 * packing.NEGATIVE / mesh.get("cfg", 1)
    forward = w.rest + w.work + max(3 * w.q + 2 * w.kv, (w.ups + 1) * w.inner)
    latents = packing.tokens(size, m.patch) * m.sequence.patch_dim * FLOAT
    return {
        "parameters": BF16 * sum(p.local(mesh) for p in mine),
        "batch": BF16 * m.layers * texts * w.kv + 6 * latents,
        "one layer's forward pass": BF16 * n * forward,
        "gathered weights, two layers": 2 * BF16 * _layer(every, "gen", mesh) if mesh["fsdp"] * mesh["cp"] > 1 else 0,
        "latents and velocities": 8 * latents,
        "scores": _scores(m, mesh, 2, n // 2, packing.NEGATIVE + n // 2, kernel),
    }


def prefill(m: ModelConfig, mesh: Mapping[str, int]) -> float:
    """Bytes of the captions' program, which runs before: its tower and table, the cache, one layer's activations."""
    every, w = list(shapes.parameters(m)), Widths(m, mesh)
    tokens = 2 * packing.NEGATIVE / mesh.get("cfg", 1)
    mine = [p for p in every if p.path.startswith(("layers/und", "embed_tokens", "norm_und"))]
    gathered = m.vocab * m.hidden if mesh["fsdp"] * mesh["cp"] > 1 else 0
    layer = 2 * w.work + max(3 * w.q + 2 * w.kv, (w.ups + 1) * w.inner)
    return BF16 * (sum(p.local(mesh) for p in mine) + gathered + tokens * (m.layers * w.kv + layer))
