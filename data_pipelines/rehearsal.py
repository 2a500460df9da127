"""A mixture like a lab's, without its data: clips and images of the published sizes, to rehearse a run.

In: a bucket. Out: an `Order` and a `Prepare` for the loader (`data.source=rehearsal`). Latents are a view of fixed
noise in place of a store of encoded clips, so nothing is learnt; shapes, packing, hosts, memory and time are those of a
real run. Shares and lengths are assumptions, written down here; nobody has published a lab's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_pipelines.job import Job, Prepare
from data_pipelines.sample import Sample
from data_pipelines.schema import Bucket, SequenceSpec

if TYPE_CHECKING:
    from data_pipelines.order import Order

BUCKET = Bucket(rows=16, und=8192, gen=65536, vision=65536, action=0, sound=0, segments=32)  # that of configs/nano.py
RECORDS = 1_000_000  # of every kind
FRAME = {"256p": (12, 20), "480p": (30, 52), "720p": (45, 80)}  # latents of a frame: 60, 390, 920 tokens
LENGTHS = ((24, 32), (33, 40), (41, 48))  # latent frames of a clip, from and to: 93 … 189 frames, in three buckets
TEXT = (6.0, 0.5, 40)  # tokens of a caption: log-normal (median 403), least; most is a quarter of a row, or 2,000


class Clip(NamedTuple):
    """A bucket of length and resolution; images have one frame."""

    share: float  # of the samples
    frame: tuple[int, int]
    least: int
    most: int


def kinds() -> dict[str, Clip]:
    """Half the samples are images; a clip of 720p is a third as frequent as one of 256p and 13 times as long."""
    out = {f"image {r}": Clip(share, FRAME[r], 1, 1) for r, share in (("256p", 15), ("480p", 15), ("720p", 20))}
    for r, share in (("256p", 25), ("480p", 17), ("720p", 8)):
        for least, most in LENGTHS:
            out[f"clip {r}, {least}–{most}"] = Clip(share / len(LENGTHS), FRAME[r], least, most)
    return out


class Length:
    """A tokenizer whose prompts are their own lengths: "7" is seven tokens. Ids are below 256, in any vocabulary."""

    def generation_ids(self, prompt: str, system: str | None = None) -> np.ndarray:
        return np.arange(int(prompt)) % 256


@dataclass(frozen=True)
class Lab:
    """Job → Sample of `channels` latent channels."""

    clips: tuple[Clip, ...]
    channels: int
    words: int  # most tokens of a caption

    def __call__(self, job: Job) -> Sample:
        rng, clip = np.random.RandomState([job.kind, job.record]), self.clips[job.kind]
        t = rng.randint(clip.least, clip.most + 1)
        mu, sigma, least = TEXT
        words = min(max(int(rng.lognormal(mu, sigma)), least), self.words)
        size = self.channels * t * clip.frame[0] * clip.frame[1]
        latents = store(self.channels)[:size].reshape(self.channels, t, *clip.frame)
        task = "text2image" if t == 1 else "text2video"
        return Sample(task, str(words), job.sample_id, vision_latents=latents, shift=10.0)


@functools.cache
def store(channels: int) -> np.ndarray:
    """Noise for the largest clip; every process has its own."""
    h, w = FRAME["720p"]
    return np.random.default_rng(0).standard_normal(channels * LENGTHS[-1][1] * h * w, np.float32)


def stream(spec: SequenceSpec, bucket: Bucket = BUCKET, seed: int = 0, in_step: bool = True) -> tuple[Prepare, Order]:
    """What `Loader` takes. Sizes that do not fit a row of the bucket are left out; ValueError if none fits."""
    from data_pipelines.order import Kind, Order  # brings grain, which worker processes do without

    p, room = spec.patch, min(bucket.gen, bucket.vision)
    found = {
        name: clip for name, clip in kinds().items()
        if clip.most * -(-clip.frame[0] // p) * -(-clip.frame[1] // p) <= room
    }  # fmt: skip
    if not found:
        raise ValueError(
            f"data.source=rehearsal: no published size fits data.bucket.gen={bucket.gen} and vision={bucket.vision}; "
            "the smallest image has 60 tokens."
        )
    order = Order({name: Kind(clip.share, RECORDS) for name, clip in found.items()}, seed, in_step)
    make = Lab(tuple(found.values()), spec.latent_channels, min(2000, bucket.und // 4))
    return Prepare(make, Length(), spec, bucket), order
