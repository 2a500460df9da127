"""Requests that are answered in words.

In: a `Resolved` request of the task reason. Out: `Question`, whose conversation is read and tokenised; and its answer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from cosmos_jax import shard
from cosmos_jax.config import SampleConfig
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import text
from data_pipelines.packing import Planned, one_per_row, plan
from data_pipelines.request_resolve import Resolved


@dataclass(frozen=True)
class Question:
    resolved: Resolved
    bundle: Bundle = field(repr=False)
    planned: Planned = field(repr=False)
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
        return self.planned.vit is not None

    def tokens(self, params: dict) -> np.ndarray:
        """The answer [n] int32, up to what ends it. On a mesh the rows beside it are empty."""
        cfg = self.bundle.config
        batch = one_per_row([self.planned], cfg.sequence, rows=shard.row_parts())
        if not shard.no_mesh():
            batch = jax.device_put(batch, shard.batch_sharding(jax.sharding.get_mesh()))
        ids = text.generate_text(params, cfg, batch, self.how, eos=self.bundle.ends, precision=self.precision)
        answer = jax.device_get(ids)[0]
        return answer[answer != text.PAD]

    def answer(self, params: dict) -> str:
        return self.bundle.frontend.tokenizer.decode(self.tokens(params).tolist()).strip()

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return self.resolved.record() | {
            "seed": self.seed, "precision": self.precision.compute, "tokens": len(self.planned.ids),
            "ends": list(self.bundle.ends),
        }  # fmt: skip


def ask(r: Resolved, bundle: Bundle, precision: Precision, seed: int) -> Question:
    """ValueError, one sentence, for pictures that cannot be read and for a folder that cannot reason."""
    frontend, messages, spec = bundle.frontend, r.messages, bundle.config.sequence
    if any(part["type"] != "text" for m in messages for part in m["content"]):
        eyes = bundle.eyes
        clips = dataclasses.replace(eyes.video, fps=r.request.video_fps)
        frontend = dataclasses.replace(frontend, eyes=dataclasses.replace(eyes, video=clips))
    planned = plan(frontend.sample(messages, spec), frontend.tokenizer, spec)
    return Question(r, bundle, planned, SampleConfig(seed=seed, **r.decoding), precision, seed)
