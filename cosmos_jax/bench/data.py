"""`bench data`: the loader alone, no model and no device: how fast it packs, how full, how evenly.

In: names of mixtures, numbers of worker processes. Out: a row for each pair: rates of one host, and, counted over all
rows of the global batch, how full they are, how much dearer than the mean the dearest row of a step is (all hosts wait
for it), the same when every row draws its samples by itself, and for how long a sample waited.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cosmos_jax import flops
from cosmos_jax.config import DataConfig, ModelConfig, from_dict
from data_pipelines import loader as loaders
from data_pipelines import rehearsal
from data_pipelines.job import Prepare
from data_pipelines.loader import Loader
from data_pipelines.order import Order
from data_pipelines.packing import Filled
from data_pipelines.row import Row
from data_pipelines.toy_world.samples import ToyAssets
from data_pipelines.toy_world.stream import StreamSource

Stream = Callable[[bool], tuple[Prepare, Order]]  # of rows in step or not


class Mixture(NamedTuple):
    """What is measured."""

    model: ModelConfig  # whose operations are the cost of a row
    timed: Stream
    counted: Stream  # samples of the same sizes, perhaps of fewer channels
    rows: tuple[int, ...]  # one host's, which are timed
    look_ahead: int
    batches: int  # of a timed turn
    steps: int  # counted


def toy() -> Mixture:
    """Model and data of configs/toy.py. Episodes are simulated, rendered and encoded when they are first met."""
    config, assets = from_dict(importlib.import_module("configs.toy").get_config()), ToyAssets.fit()

    def stream(in_step: bool) -> tuple[Prepare, Order]:
        data = dataclasses.replace(config.data, in_step=in_step)
        return loaders.toy(StreamSource(data.episodes), data, config.model.sequence, assets, 1.0, 1.0)

    rows = tuple(range(config.data.bucket.rows))
    return Mixture(config.model, stream, stream, rows, config.data.look_ahead, batches=20, steps=80)


def labs() -> Mixture:
    """Nano and `rehearsal`. A host with two of the sixteen rows is timed."""
    nano = ModelConfig(action_dim=0, sound_dim=0)
    thin = dataclasses.replace(nano, latent_channels=1)
    timed, counted = (lambda in_step, m=m: rehearsal.stream(m.sequence, in_step=in_step) for m in (nano, thin))
    return Mixture(nano, timed, counted, (0, 1), DataConfig().look_ahead, batches=2, steps=40)


MIXTURES = {"toy": toy, "lab": labs}


def run(names: Sequence[str], workers: Sequence[int], repeat: int = 3, say: Callable[[str], None] = print) -> dict:
    """{"machine": …, "rows": [one for each mixture and number of workers]}."""
    rows = []
    for name in names:
        mixture = MIXTURES[name]()
        counts = count(mixture)
        say(f"{name}: {counts['efficiency']:.1%} filled, the dearest row costs {counts['balance']:.3f} × the mean")
        for n in workers:
            rows.append({"shape": name, "workers": n} | rates(mixture, n, repeat) | counts)
            say(f"{name}, {n} workers: {rows[-1]['batches_s']:.3g} batches/s")
    return {"machine": {"cores": os.cpu_count(), "repeat": repeat}, "rows": rows}


def rates(m: Mixture, workers: int, repeat: int) -> dict:
    """Of one host, per second, medians of `repeat` turns. The first batch, which fills the look-ahead, is by itself."""
    loader = Loader(*m.timed(True), m.look_ahead, m.rows, workers, ahead=2)
    turns = []
    try:
        begin = time.perf_counter()
        next(loader)
        first = time.perf_counter() - begin
        for _ in range(repeat):
            begin, samples, tokens = time.perf_counter(), 0, 0
            for _ in range(m.batches):
                batch = next(loader)
                samples += int((batch["segment_sample_id"] >= 0).sum())
                tokens += sum(int((batch[f"{s}_segment_ids"] >= 0).sum()) for s in ("und", "gen"))
            turns.append(np.array([m.batches, samples, tokens]) / (time.perf_counter() - begin))
        waiting = max(sum(p.nbytes for p in row.waiting) for row in loader.streams)
    finally:
        loader.close()
    rate = dict(zip(("batches_s", "samples_s", "tokens_s"), np.median(turns, 0).tolist(), strict=True))
    return {"host_rows": len(m.rows), "first_s": first, "waiting_bytes": waiting} | rate


def count(m: Mixture) -> dict:
    """Over the rows of the global batch; means over the steps after the first quarter, in which a run settles."""
    together, alone = (Loader(*m.counted(in_step), m.look_ahead) for in_step in (True, False))
    bucket = together.bucket
    costs: dict[str, list[float]] = {"balance": [], "balance_alone": []}
    filled, since, longest = Filled(), dict[int, int](), 0
    for step in range(m.steps):
        for name, loader in zip(costs, (together, alone), strict=True):
            packs = [row.pack(step) for row in loader.streams]
            each = [cost(m.model, bucket.und, bucket.gen, [(p.size["und"], p.size["gen"]) for p in x]) for x in packs]
            if step >= m.steps // 4:
                costs[name].append(max(each) * len(each) / sum(each))
            if name == "balance":
                longest = max(longest, _waited(since, step, together.streams, packs))
                if step >= m.steps // 4:
                    filled.count(packs, bucket)
    means = {name: float(np.mean(x)) for name, x in costs.items()}
    return means | {
        "rows": bucket.rows, "look_ahead": m.look_ahead, "efficiency": filled.efficiency, "longest_wait": longest
    }  # fmt: skip


def _waited(since: dict[int, int], step: int, rows: Sequence[Row], packs) -> int:
    """Steps that the sample of this step which was taken up first has waited."""
    waited = max(step - since.pop(p.sample.sample_id, step) for pack in packs for p in pack)
    for row in rows:
        for p in row.waiting:
            since.setdefault(p.sample.sample_id, step)
    return waited


def cost(cfg: ModelConfig, und: int, gen: int, samples: Sequence[tuple[int, int]]) -> int:
    """Operations of a training step on a row of und + gen slots, filled or not: only attention looks at its samples.

    samples: (und, gen) tokens of each.
    """
    pairs = {"und_pairs": sum(u * (u + 1) // 2 for u, _ in samples), "gen_pairs": sum(g * (u + g) for u, g in samples)}
    return flops.train_step(cfg, flops.Counts(und=und, gen=gen, segments=len(samples), **pairs))
