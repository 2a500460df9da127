"""What is timed: published sizes of media, models, and the packed jobs that they make.

In: a size's name, a `ModelConfig`, numbers of text tokens. Out: a `generate.Job` with random noise, made by the packer
that real requests go through.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import pallas_kernels.attention as kernels
from cosmos_jax.config import ModelConfig
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import schedules
from cosmos_jax.sampling.generate import Job, framework_buffers
from cosmos_jax.sampling.guidance import Guidance
from data_pipelines.packing import fill, plan, tight_bucket
from data_pipelines.sample import Sample
from data_pipelines.tasks import task

# Tokens of the prompts that the model cards recommend (JSON; the negative one is longer). Together as the published
# operation counts have them: 2 × 2,676.
TEXTS = (1902, 3450)


@dataclasses.dataclass(frozen=True)
class Size:
    """One kind of output: its task and the latents [C,t,h,w]."""

    task: str
    t: int
    h: int
    w: int
    says: str

    def tokens(self, cfg: ModelConfig) -> int:
        return self.t * -(-self.h // cfg.patch) * -(-self.w // cfg.patch)


SIZES = {
    "256p": Size("text2video", 48, 12, 20, "189 frames of 320×192"),
    "480p": Size("text2video", 48, 30, 52, "189 frames of 832×480"),
    "720p": Size("text2video", 48, 45, 80, "189 frames of 1280×720"),
    "t2i": Size("text2image", 1, 45, 80, "one image of 1280×720"),
}
# Widths in the proportions of Nano (grouped queries 4:1, MLP 3 ×, heads of 128), as large as two CPU cores can take.
VERSUS = ModelConfig(
    name="scaled-nano", layers=4, hidden=1024, heads=8, kv_heads=2, mlp=3072, vocab=4096, action_dim=0, sound_dim=0
)
SCALING = dataclasses.replace(VERSUS, name="scaled-nano-2", layers=2, hidden=512, heads=4, kv_heads=1, mlp=1536)


def attention(cfg: ModelConfig, size: Size, precision: Precision, texts: tuple[int, int] = TEXTS) -> str:
    """Which form the generator's attention takes, for a log."""
    queries = size.tokens(cfg)
    return kernels.describe(
        len(texts), cfg.heads, queries, max(texts) + queries, impl=cfg.attention, dtype=precision.dtype
    )


class Length:
    """A tokenizer whose prompts are their own lengths: "7" is seven tokens."""

    vocab = 4096

    def generation_ids(self, prompt: str, system: str | None = None) -> np.ndarray:
        return np.arange(int(prompt)) * 37 % min(int(prompt), self.vocab)


def job(cfg: ModelConfig, size: Size, texts: tuple[int, int] = TEXTS, steps: int | None = None) -> Job:
    """One sample with both guidance branches; schedule and scale are the task's defaults.

    texts: tokens of the caption and of the negative one; ids go up to 4095, or to their number if that is less.
    """
    row, shape = task(size.task), (cfg.latent_channels, size.t, size.h, size.w)
    empty = np.zeros(shape, np.float32)
    samples = [Sample(task=size.task, prompt=str(n), vision_latents=empty, shift=row.shift) for n in texts]
    plans: list[Any] = [plan(s, Length(), cfg.sequence) for s in samples]
    bucket = tight_bucket(plans, rows=1)
    batch, uncond = (fill([[p]], bucket, cfg.sequence) for p in plans)
    noise: dict[str, Any] = framework_buffers(batch, {(0, 0): (0, [shape])}, cfg.patch)
    schedule = schedules.unipc(row.steps if steps is None else steps, row.shift)
    return Job(batch, noise, schedule, Guidance(text=row.guidance), uncond)
