"""What a step sends between devices, by formula: the same list that `hlo` reads from a compiled program.

In: `Config`, topology, mesh sizes. Out: {"collectives", "joined"}. Imports no jax.

* fsdp and cp: every layer's weights are gathered in bfloat16: for the forward pass, for its repetition, and for the
  gradient of their input (libtpu still has those of the repetition then; XLA for GPU gathers once more); the table
  once, the head once for every chunk of logits; gradients of what is trained are reduce-scattered in float32 (or as
  precision.reduce says);
* tp: tokens are gathered before attention and before the MLP and reduce-scattered after each; the backward pass does
  the reverse; rematerialisation repeats all but the last;
* cp: keys and values of every layer are gathered, again where they are rematerialised; their gradients are
  reduce-scattered;
* data: gradients are added up, once a step, however many micro-batches it has.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

from cosmos_jax.chips import CHIPS
from cosmos_jax.config import Config
from cosmos_jax.plan import links, packing, shapes
from cosmos_jax.plan.hlo import Collective
from cosmos_jax.plan.shapes import STORED
from pallas_kernels.check.topology import Topology

BF16, FLOAT, CHUNK = 2, 4, 1024


def estimate(cfg: Config, t: Topology, mesh: Mapping[str, int], what: str, size: str) -> dict:
    """As `program.run` answers."""
    found = train(cfg, mesh, t.platform) if what == "train" else generate(cfg, mesh, size)
    chip, names = CHIPS[t.family], [a for a, n in mesh.items() if n > 1]
    sets = [c for r in range(1, len(names) + 1) for c in itertools.combinations(names, r)]
    joined = {",".join(s): dataclasses.asdict(links.guessed(t, mesh, s, chip)) for s in sets}
    return {"collectives": [dataclasses.asdict(c) for c in found if c.group > 1], "joined": joined}


def train(cfg: Config, mesh: Mapping[str, int], platform: str) -> list[Collective]:
    """Of one step on one device. platform: tpu | gpu."""
    m, b, every = cfg.model, cfg.data.bucket, list(shapes.parameters(cfg.model))
    n, times, tp, cp = m.layers, cfg.optim.accumulate, mesh["tp"], mesh["cp"]
    learned = shapes.trained(cfg.optim, every)
    und_learns = shapes.trains_und(cfg.optim, every)
    rows = b.rows / times / (mesh["data"] * mesh["fsdp"])
    again = m.remat != "none"
    for_input = platform == "gpu" or not again
    chunks = -(-b.und // CHUNK)
    und = b.und / (cp if m.und_tokens == "spread" else 1)
    found = []

    def add(kind: str, axes: str | tuple[str, ...], size: float, count: int, where: str) -> None:
        axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if mesh[a] > 1)
        found.append(Collective(kind, int(size), axes, math.prod(mesh[a] for a in axes), count, where))

    for tower, tokens, learns in (("und", und, und_learns), ("gen", b.gen / cp, True)):
        mine = [p for p in every if p.path.startswith(f"layers/{tower}")]
        layer = BF16 * sum(p.local(mesh, ("tp",)) / n for p in mine)
        add("all-gather", STORED, layer, n * times * (1 + (again + for_input) * learns), f"weights of {tower}")
        stream = rows * tokens * m.hidden * BF16
        gathers, scatters = 2 + (2 + 2 * again) * learns, 2 + (2 + again) * learns
        add("all-gather", "tp", stream, n * times * gathers, f"tokens of {tower}")
        add("reduce-scatter", "tp", stream, n * times * scatters, f"sums of {tower}")
    kv = rows * b.gen * 2 * m.kv_heads * m.head_dim / tp * BF16
    add("all-gather", "cp", kv, n * times * (1 + again), "keys and values")
    add("reduce-scatter", "cp", kv, n * times, "their gradients")
    ends = {p.path: BF16 * p.local(mesh, ("tp",)) for p in every if p.path in ("embed_tokens", "lm_head")}
    add("all-gather", STORED, ends["embed_tokens"], times, "the table")
    add("all-gather", STORED, ends["lm_head"], times * chunks * (1 + 2 * und_learns), "the head")
    words = BF16 if cfg.precision.reduce == "compute" else FLOAT
    gradients = words * sum(p.local(mesh, ("tp",)) for p in learned)
    add("reduce-scatter", STORED, gradients, times, "gradients")
    add("all-reduce", "data", gradients / mesh["fsdp"] / cp, 1, "gradients")
    return found


def generate(cfg: Config, mesh: Mapping[str, int], size: str) -> list[Collective]:
    """Of one denoising step on one device."""
    m, every = cfg.model, list(shapes.parameters(cfg.model))
    layer = BF16 * sum(p.local(mesh, ("tp",)) / m.layers for p in every if p.path.startswith("layers/gen"))
    tokens = 2 * packing.tokens(size, m.patch) / mesh.get("cfg", 1)
    stream, kv = tokens / mesh["cp"] * m.hidden * BF16, tokens * 2 * m.kv_heads * m.head_dim / mesh["tp"] * BF16
    stored = tuple(a for a in STORED if mesh[a] > 1)
    return [
        Collective("all-gather", int(layer), stored, math.prod(mesh[a] for a in stored), m.layers, "weights of gen"),
        Collective("all-gather", int(stream), ("tp",), mesh["tp"], 2 * m.layers, "tokens of gen"),
        Collective("reduce-scatter", int(stream), ("tp",), mesh["tp"], 2 * m.layers, "sums of gen"),
        Collective("all-gather", int(kv), ("cp",), mesh["cp"], m.layers, "keys and values"),
    ]
