"""The training loss on episodes never trained on, against what can be had without looking at the input.

Baselines: for a modality the best constant velocity (the mean target of these very tokens: privileged), for text the
entropy of the token frequencies of these very answers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import numpy as np

from cosmos_jax import flow
from cosmos_jax.evaluate.study import Study
from data_pipelines.loader import Loader, episodes
from data_pipelines.schema import MODALITIES
from data_pipelines.toy_world.samples import ToySamples
from data_pipelines.toy_world.stream import EVAL_SEED, StreamSource

BATCHES, SEED = 6, 7


def losses(study: Study) -> None:
    """A few packed batches of the training mixture from held-out episodes, noised once for model and baseline."""
    batches = held_out_batches(study)
    got = study.pipeline.held_out_loss(batches, SEED)
    for name, constant in best_constants(study, batches).items():
        study.score(
            f"held-out loss, {name}", got[f"loss/{name}"], "mse", "lower", {"best constant velocity": constant},
            note=f"Flow-matching loss over {len(batches)} packed batches, in the units of training.",
        )  # fmt: skip
    counts = Counter(t for b in batches for t in b["und_targets"][b["und_targets"] >= 0].tolist())
    share = np.array(list(counts.values())) / sum(counts.values())
    study.score(
        "held-out loss, text", got["loss/text"], "nats per token", "lower",
        {"token frequencies": float(-(share * np.log(share)).sum())},
        note="Next-token cross-entropy of captions and answers, the true beginning given.",
    )  # fmt: skip


def held_out_batches(study: Study) -> list[dict[str, np.ndarray]]:
    """Batches packed by the training loader, captions never dropped."""
    c, assets = study.config, study.pipeline.assets
    source = episodes(StreamSource(c.data.eval_episodes, EVAL_SEED), seed=SEED)
    data = dataclasses.replace(c.data, caption_dropout=0.0)
    make = ToySamples(source, assets, data, c.flow.shift_image, c.flow.shift_video)
    loader = Loader(make, assets.tokenizer, c.model.sequence, c.data.bucket, c.data.look_ahead)
    return [next(loader) for _ in range(BATCHES)]


def best_constants(study: Study, batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The loss of the best constant velocity per feature, averaged over the batches like the model's."""
    c, key = study.config, jax.random.key(SEED)
    noise = jax.jit(lambda batch: flow.noise_batch(key, batch, c.flow, c.model.patch).velocity)
    targets = [jax.device_get(noise(b)) for b in batches]
    out = {}
    for i, name in enumerate(MODALITIES):
        if not any(name in v and b[f"{name}_noisy"].any() for v, b in zip(targets, batches, strict=True)):
            continue
        weight = [np.where(b[f"{name}_noisy"], b[f"{name}_weight"], 0)[..., None] for b in batches]
        valid = [v[name] != 0 for v in targets]  # the target is 0 exactly where nothing is supervised
        total = sum((w * ok).sum((0, 1)) for w, ok in zip(weight, valid, strict=True))
        mean = sum((w * v[name]).sum((0, 1)) for w, v in zip(weight, targets, strict=True)) / np.maximum(total, 1e-9)
        out[name] = float(np.mean([
            (w * ok * (v[name] - mean) ** 2).sum() / max(b["segment_items"][..., i].sum(), 1)
            for w, ok, v, b in zip(weight, valid, targets, batches, strict=True)
        ]))  # fmt: skip
    return out
