"""Requests that are answered in words.

In: a `Resolved` request of the task reason. Out: `Question`, whose conversation is read and tokenised; and its answer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cosmos_jax.config import SampleConfig
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import text
from data_pipelines.packing import one_per_row, plan
from data_pipelines.request_resolve import Resolved


@dataclass(frozen=True)
class Question:
    resolved: Resolved
    bundle: Bundle = field(repr=False)
    batch: dict = field(repr=False)
    how: SampleConfig
    precision: Precision
    seed: int

    @property
    def name(self) -> str:
        r = self.resolved
        return r.name if len(r.seeds) == 1 else f"{r.name}/{r.seeds.index(self.seed)}"

    @property
    def sees(self) -> bool:
        """Whether it shows a picture."""
        return self.batch["vit_patches"].shape[1] > 0

    def answer(self, params: dict) -> str:
        tokenizer = self.bundle.frontend.tokenizer
        ids = text.generate_text(
            params, self.bundle.config, self.batch, self.how, eos=(tokenizer.eos,), precision=self.precision
        )
        return tokenizer.decode(np.asarray(ids)[0]).strip()

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return self.resolved.record() | {
            "seed": self.seed, "precision": self.precision.compute,
            "tokens": int((self.batch["und_segment_ids"] >= 0).sum()),
        }  # fmt: skip


def ask(r: Resolved, bundle: Bundle, precision: Precision, seed: int) -> Question:
    """ValueError, one sentence, for pictures that cannot be read and for a folder that cannot reason."""
    q = r.request
    frontend = bundle.frontend
    if q.video_fps is not None:
        eyes = dataclasses.replace(frontend.eyes, video=dataclasses.replace(frontend.eyes.video, fps=q.video_fps))
        frontend = dataclasses.replace(frontend, eyes=eyes)
    sample = frontend.sample(r.messages, bundle.config.sequence)
    batch = one_per_row([plan(sample, frontend.tokenizer, bundle.config.sequence)], bundle.config.sequence)
    return Question(r, bundle, batch, SampleConfig(seed=seed, **r.decoding), precision, seed)
