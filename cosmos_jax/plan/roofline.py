"""The least time that a step can take: three clocks, from stated rates.

In: `Config`, packing, mesh sizes, chip, what the collectives take. Out: `Roofline`: seconds of compute, of the memory
and of the interconnect on one device, each as if it were alone. Imports no jax.

FLOPs are those of `flops.py`: what the hardware computes (padding and rematerialisation included) for the time, what
the model needs (real tokens only) for MFU. Bytes of the memory are counted by term in `traffic`. No efficiency is
assumed anywhere: the largest of the three clocks is a bound that nobody beats, their sum is what a step takes if
nothing overlaps and everything else is perfect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cosmos_jax import flops
from cosmos_jax.chips import Chip
from cosmos_jax.config import Config, ModelConfig
from cosmos_jax.flops import Counts
from cosmos_jax.plan import shapes
from cosmos_jax.plan.packing import Packing

TILE = 1024  # queries that read the same keys once, in a fused kernel


@dataclass(frozen=True)
class Roofline:
    """One step on one device."""

    model: float  # FLOPs that the model needs
    executed: float  # FLOPs that the hardware does
    bytes: float  # to and from the memory
    compute: float  # seconds …
    memory: float
    interconnect: float
    peak: float  # FLOP/s

    @property
    def least(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def alone(self) -> float:
        return self.compute + self.memory + self.interconnect

    @property
    def limit(self) -> str:
        return max(("compute", "memory", "interconnect"), key=lambda n: getattr(self, n))

    def mfu(self, seconds: float) -> float:
        return self.model / seconds / self.peak


def train(
    cfg: Config, packing: Packing, mesh: Mapping[str, int], chip: Chip, interconnect: float, fused: bool
) -> Roofline:
    """fused: the attention kernel skips what nobody sees and keeps scores on the chip."""
    m, rows, devices = cfg.model, cfg.data.bucket.rows, _devices(mesh)
    und = shapes.trains_und(cfg.optim, list(shapes.parameters(m)))
    computed = packing.computed(fused)
    model = flops.train_step(m, packing.real, und) * rows / devices
    executed = flops.train_step(m, computed, und, remat=True) * rows / devices
    moved = sum(traffic(cfg, computed, mesh, fused).values())
    return Roofline(
        model, executed, moved, executed / chip.flops, moved / chip.bandwidth, interconnect, chip.flops
    )  # fmt: skip


def generate(
    m: ModelConfig, texts: tuple[int, ...], tokens: int, mesh: Mapping[str, int], chip: Chip, interconnect: float,
    fused: bool,
) -> Roofline:  # fmt: skip
    """One denoising step of one sample for every group of data × fsdp devices, all guidance branches."""
    groups = _devices(mesh) // (mesh["data"] * mesh["fsdp"])  # devices that share a sample
    work = sum(flops.denoising(m, texts, tokens)[1].values()) / groups
    weights = sum(2 * p.local(mesh, ("tp",)) for p in shapes.parameters(m) if p.path.startswith("layers/gen"))
    all_tokens = len(texts) * tokens
    pairs = tokens * sum(n + tokens for n in texts)
    moved = 2 * weights + _activations(m, all_tokens, mesh, 1) + _attention(m, pairs, mesh, 1, fused)
    return Roofline(work, work, moved, work / chip.flops, moved / chip.bandwidth, interconnect, chip.flops)


def traffic(cfg: Config, n: Counts, mesh: Mapping[str, int], fused: bool) -> dict[str, float]:
    """Bytes that one device moves in one step, by cause. n: what the hardware computes for one pack."""
    m, every = cfg.model, list(shapes.parameters(cfg.model))
    rows = cfg.data.bucket.rows / (mesh["data"] * mesh["fsdp"])  # packs of one device
    learned = shapes.trained(cfg.optim, every)
    changed = 4 * sum(p.local(mesh) for p in learned)
    again, attention_again = flops.RECOMPUTED[m.remat]
    und = shapes.trains_und(cfg.optim, every)
    weights, activations = 0.0, 0.0
    for tower, tokens, backward in (("und", n.und, und), ("gen", n.gen, True)):
        whole = 2 * sum(p.local(mesh, ("tp",)) for p in every if p.path.startswith(f"layers/{tower}"))
        passes = 1 + (again + 2 if backward else again)
        weights += (
            (passes + 1 + again + backward) * whole * cfg.optim.accumulate
        )  # read in each, written by each gather
        activations += _activations(m, tokens, mesh, passes) * rows
    passes = 3 + attention_again
    logits = 3 * 4 * n.text * m.vocab / mesh["tp"] * (2 if n.text else 0)
    return {
        "optimiser": (9 if cfg.optim.ema else 7) * changed,  # gradient, parameter, two moments (average): read, written
        "weights": weights,
        "activations": activations,
        "attention": _attention(m, n.gen_pairs + n.und_pairs, mesh, passes, fused) * rows,
        "logits": logits * rows,
    }


def _activations(m: ModelConfig, tokens: int, mesh: Mapping[str, int], passes: int) -> float:
    """Each matmul reads its input and writes its output once; norms and residuals touch the stream six times."""
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    inner = (5 if m.mlp_act == "swiglu" else 3) * m.mlp  # results written; results and product read
    split = (2 * q + 2 * kv + 2 * q + inner) / mesh["tp"]
    return passes * 2 * tokens * m.layers * (split + (4 + 6) * m.hidden) / (mesh.get("cp", 1))


def _attention(m: ModelConfig, pairs: int, mesh: Mapping[str, int], passes: int, fused: bool) -> float:
    """Fused: every tile of queries reads the keys and values that it sees. Else: float32 scores, twice each way."""
    heads = m.heads / mesh["tp"] / mesh.get("cp", 1)
    per_pair = 2 * 2 * m.head_dim / TILE if fused else 4 * 4
    return passes * m.layers * heads * pairs * per_pair


def _devices(mesh: Mapping[str, int]) -> int:
    product = 1
    for n in mesh.values():
        product *= n
    return product
