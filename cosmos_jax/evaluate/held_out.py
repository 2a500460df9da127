"""The training loss on episodes never trained on, against what can be had without looking at the input.

Baselines: for a modality the best constant velocity and the best element-wise linear denoiser, for text the entropy of
the token frequencies; all fitted to these very tokens, so that they are privileged.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import numpy as np

from cosmos_jax import flow
from cosmos_jax.evaluate.study import Study
from data_pipelines import loader as loaders
from data_pipelines.schema import MODALITIES
from data_pipelines.toy_world.stream import held_out

BATCHES, SEED = 6, 7


def losses(study: Study) -> None:
    """A few packed batches of the training mixture from held-out episodes, noised once for model and baseline."""
    batches = held_out_batches(study)
    got = study.pipeline.held_out_loss(batches, SEED)
    for name, tokens in noisy_tokens(study, batches).items():
        study.score(
            f"held-out loss, {name}", got[f"loss/{name}"], "mse", "lower",
            {"best constant velocity": constant(tokens), "linear denoiser": linear(tokens)},
            note=f"Flow-matching loss over {len(batches)} packed batches, in the units of training. The linear "
            "denoiser sees one latent number at a time and knows its mean and variance: the empty table, no object.",
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
    source = held_out(c.data.eval_episodes, c.data.eval_split)
    data = dataclasses.replace(c.data, caption_dropout=0.0, seed=SEED)
    what = loaders.toy(source, data, c.model.sequence, assets, c.flow.shift_image, c.flow.shift_video)
    loader = loaders.Loader(*what, data.look_ahead)
    return [next(loader) for _ in range(BATCHES)]


@dataclasses.dataclass
class Noisy:
    """The supervised tokens of one modality in all batches, one line each: [n, features], zero where invalid."""

    x0: np.ndarray
    target: np.ndarray  # velocity
    x_t: np.ndarray
    sigma: np.ndarray  # [n, 1]
    weight: np.ndarray  # [n, features]: what an element's squared error counts in the mean loss of the batches

    def loss(self, velocity: np.ndarray) -> float:
        return float((self.weight * (velocity - self.target) ** 2).sum())

    def mean(self, x: np.ndarray) -> np.ndarray:
        """Weighted mean per feature."""
        return (self.weight * x).sum(0) / np.maximum(self.weight.sum(0), 1e-12)


def noisy_tokens(study: Study, batches: list[dict[str, np.ndarray]]) -> dict[str, Noisy]:
    """Noise the batches exactly as the model's loss does, and gather what it is asked for."""
    c, key = study.config, jax.random.key(SEED)
    noise = jax.jit(lambda batch: flow.noise_batch(key, batch, c.flow, c.model.patch))
    found: dict[str, list[tuple]] = {}
    for b in batches:
        noised = jax.device_get(noise(b))
        for i, name in enumerate(MODALITIES):
            if name not in noised.velocity or not b[f"{name}_noisy"].any():
                continue
            pick, target = b[f"{name}_noisy"], noised.velocity[name]
            sigma = np.take_along_axis(noised.sigma, np.maximum(b[f"{name}_segment_ids"], 0), 1)
            share = b[f"{name}_weight"] / max(b["segment_items"][..., i].sum(), 1) / len(batches)
            weight = share[..., None] * (target != 0)  # the target is 0 exactly where nothing is supervised
            whole = (b[f"{name}_x0"], target, noised.x_t[name], sigma[..., None], weight)
            found.setdefault(name, []).append(tuple(x[pick] for x in whole))
    return {name: Noisy(*map(np.concatenate, zip(*parts, strict=True))) for name, parts in found.items()}


def constant(tokens: Noisy) -> float:
    """Loss of the best constant velocity per feature."""
    return tokens.loss(tokens.mean(tokens.target))


def linear(tokens: Noisy) -> float:
    """Loss of the best denoiser that looks at one number at a time and knows its mean, its variance and sigma."""
    mean = tokens.mean(tokens.x0)
    variance = tokens.mean((tokens.x0 - mean) ** 2)
    s = tokens.sigma
    gain = (1 - s) * variance / np.maximum(s**2 + (1 - s) ** 2 * variance, 1e-12)
    x0 = mean + gain * (tokens.x_t - (1 - s) * mean)
    return tokens.loss((tokens.x_t - x0) / np.maximum(s, 1e-6))
