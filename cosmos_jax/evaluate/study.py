"""What every part of the evaluation shares: held-out and training episodes, requests, the score sheet, the examples.

In: a pipeline and a config. Out: `Study`, which the parts fill. No request carries its own answer: `blank` removes
every noisy stream before the pipeline sees the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_jax.config import Config
from data_pipelines.sample import Sample, clean_frames
from data_pipelines.tasks import task
from data_pipelines.toy_world.episodes import Episode
from data_pipelines.toy_world.samples import Encoded, make_sample
from data_pipelines.toy_world.stream import StreamSource, held_out

UPPER = "(upper reference)"  # ends the name of a baseline that nobody has to beat
EXAMPLES = 4  # per task, for the report
TRAIN_EPISODES = 400  # from which the baselines learn what is usual


def required(baseline: str) -> bool:
    """Must a row beat this baseline?"""
    return not baseline.endswith(UPPER)


def row(value, unit: str, better: str, baselines: dict[str, Any]) -> dict:
    """One score. Values are numbers, or one number per sample (their mean counts; NaN = the sample has none)."""
    mean, rivals = _mean(value), {k: _mean(v) for k, v in baselines.items()}
    sign = {"higher": 1, "lower": -1}[better]
    beats = np.isfinite(mean) and all(sign * mean > sign * v for k, v in rivals.items() if required(k))
    return {"value": mean, "unit": unit, "baselines": rivals, "better": better, "beats": bool(beats)}


def narrow(value, rival) -> bool:
    """Is the mean difference of two paired arrays within two of its standard errors? False where they do not pair."""
    a, b = np.asarray(value, float), np.asarray(rival, float)
    if a.ndim != 1 or a.shape != b.shape:
        return False
    d = (a - b)[np.isfinite(a) & np.isfinite(b)]
    return len(d) > 1 and bool(abs(d.mean()) < 2 * d.std() / np.sqrt(len(d)))


def _mean(value) -> float:
    x = np.asarray(value, float)
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else float("nan")


def blank(s: Sample) -> Sample:
    """The sample with zeros for everything that its task asks the model to make."""
    rule, x = task(s.task), np.zeros_like(s.vision_latents)
    clean = list(clean_frames(s))
    x[:, clean] = s.vision_latents[:, clean]
    actions = s.actions
    if rule.action == "noisy":
        actions = np.zeros_like(s.actions)
        actions[: s.clean_actions] = s.actions[: s.clean_actions]
    makes_sound = s.sound_latents is not None and rule.sound != "clean"
    return dataclasses.replace(
        s,
        vision_latents=x,
        sound_latents=np.zeros_like(s.sound_latents) if makes_sound else s.sound_latents,
        actions=actions,
    )


@dataclasses.dataclass
class Study:
    """The held-out set, raw and encoded; what training looked like; and the sheet that the parts fill in."""

    pipeline: Any
    config: Config
    out: Path  # examples go here
    raw: list[Episode]
    seen: list[Encoded]
    train: list[Episode]
    scores: dict[str, dict] = dataclasses.field(default_factory=dict)
    details: dict[str, dict] = dataclasses.field(default_factory=dict)  # row → n, standard error, note, and more

    @classmethod
    def prepare(cls, pipeline: Any, config: Config, out: Path) -> Study:
        """Make and encode the episodes. The held-out seeds are far from those of training."""
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("*.npz"):
            old.unlink()
        data = config.data
        raw = list(held_out(data.eval_episodes, data.eval_split))
        usual = min(TRAIN_EPISODES, data.episodes)
        train = list(StreamSource(usual))
        return cls(pipeline, config, out, raw, [pipeline.assets.encode(e) for e in raw], train)

    @property
    def samples(self) -> list[int]:
        """Numbers of the held-out episodes that a generation row uses."""
        return list(range(min(self.config.evaluate.samples, len(self.raw))))

    def generate(self, name: str, index: Sequence[int], **settings) -> list:
        """Let the pipeline do task `name` for held-out episodes; sample_id = the episode's number."""
        requests = [blank(make_sample(self.seen[i], name, sample_id=i)) for i in index]
        return self.pipeline.generate(requests, **settings)

    def through_codec(self, i: int) -> np.ndarray:
        """The true video after encoding and decoding: what perfect latents would show. uint8 [T,H,W,3]."""
        return self.pipeline.assets.video.decode(self.seen[i].video)

    def score(self, name: str, value, unit: str, better: str, baselines: dict[str, Any], note: str, **more) -> None:
        """Enter a row (see `row`); `note` says what exactly is measured. n and standard error go to the details."""
        self.scores[name] = row(value, unit, better, baselines)
        x = np.asarray(value, float).ravel()
        x = x[np.isfinite(x)]
        spread = {"n": len(x), "standard_error": float(x.std() / np.sqrt(len(x)))} if len(x) > 1 else {}
        close = [k for k, v in baselines.items() if required(k) and narrow(value, v)]
        self.details[name] = {"note": note, **spread, **({"narrow": close} if close else {}), **more}

    def keep(self, name: str, **arrays) -> None:
        """Save the first EXAMPLES of each array for the report."""
        first: dict[str, Any] = {k: np.asarray(x[:EXAMPLES]) for k, x in arrays.items()}
        np.savez_compressed(self.out / f"{name}.npz", **first)

    def keep_clips(self, name: str, index: Sequence[int], made: list, **more) -> None:
        """Generated clips (and sound) beside the truth."""
        first, index = made[:EXAMPLES], index[:EXAMPLES]
        true = [self.raw[i] for i in index]
        arrays: dict[str, Any] = {
            "prompt": [self.seen[i].instruction if task(name).prompt == "instruction" else e.caption
                       for i, e in zip(index, true, strict=True)],
            "video": [g.video for g in first],
            "true_video": [e.video[: len(first[0].video)] for e in true],
        }  # fmt: skip
        if first[0].sound is not None:
            arrays |= {"sound": [g.sound for g in first], "true_sound": [e.sound for e in true]}
        self.keep(name, **arrays, **more)
