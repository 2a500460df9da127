"""From an episode to a `Sample` of some task: the toy's only knowledge of what the tasks need.

In: an `Episode`, a task. Out: a `Sample` with codec latents, normalised actions, frames for the reasoner.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import numpy as np

from data_pipelines.action import ActionStats
from data_pipelines.job import Job
from data_pipelines.sample import Sample
from data_pipelines.tasks import TABLE, task
from data_pipelines.tokenizer import ChatTokenizer
from data_pipelines.toy_world import codecs
from data_pipelines.toy_world.episodes import CAPTION_REQUEST, Episode
from data_pipelines.toy_world.sound import RATE
from data_pipelines.toy_world.stream import StreamSource

TASKS = tuple(t for t in TABLE if t.context == "none")  # the toy draws no controls and edits no images
DOMAIN = 8  # the single-arm layout of DROID (spec model.md §8.1)
REASON_FRAMES = (0, 4, 8, 16)  # what the reasoner looks at: two pairs


@dataclass(frozen=True)
class Encoded:
    """An episode as the model sees it; what the loader caches."""

    video: np.ndarray  # [C,5,8,8]
    sound: np.ndarray  # [Ds,43]
    actions: np.ndarray  # [16,10] normalised
    frames: np.ndarray  # uint8 [4,48,48,3]
    caption: str
    instruction: str
    qa: tuple[tuple[str, str], ...]
    kind: str
    fps: float


@dataclass(frozen=True)
class ToyAssets:
    """Everything frozen that turns the toy's raw data into tokens and back. Saved with every run."""

    video: codecs.VideoCodec
    sound: codecs.SoundCodec
    stats: ActionStats
    tokenizer: ChatTokenizer
    sample_rate: int = RATE

    @classmethod
    def fit(cls) -> ToyAssets:
        """Fit codecs and statistics to their own episodes (a few seconds)."""
        video, sound = codecs.fit()
        source = StreamSource(codecs.FIT_EPISODES, codecs.FIT_SEED)
        raw = np.concatenate([source[i].actions for i in range(len(source))])
        return cls(video, sound, ActionStats.fit(raw), ChatTokenizer())

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> ToyAssets:
        d = pathlib.Path(directory)
        return cls(
            *codecs.load(d / "codecs.npz"), ActionStats.load(d / "actions.json"), ChatTokenizer(d / "tokenizer.json")
        )

    def save(self, directory: str | pathlib.Path) -> None:
        d = pathlib.Path(directory)
        d.mkdir(parents=True, exist_ok=True)
        codecs.save(d / "codecs.npz", self.video, self.sound)
        self.stats.save(d / "actions.json")
        self.tokenizer.save(d / "tokenizer.json")

    @property
    def fingerprint(self) -> str:
        return codecs.fingerprint(self.video, self.sound)

    def encode(self, e: Episode) -> Encoded:
        return Encoded(
            video=self.video.encode(e.video),
            sound=self.sound.encode(e.sound),
            actions=self.stats.normalise(e.actions),
            frames=e.video[list(REASON_FRAMES)],
            caption=e.caption,
            instruction=e.instruction,
            qa=e.qa,
            kind=e.kind,
            fps=e.fps,
        )


def reason_times(fps: float) -> tuple[float, ...]:
    """When each pair of frames was seen (s)."""
    return tuple((a + b) / 2 / fps for a, b in zip(REASON_FRAMES[::2], REASON_FRAMES[1::2], strict=True))


def make_sample(
    e: Encoded,
    name: str,
    *,
    sample_id: int = 0,
    prompt: str | None = None,
    question: tuple[str, str | None] | None = None,
    with_sound: bool = True,
    shift: float = 1.0,
) -> Sample:
    """The sample of task `name`. `prompt` overrides the caption or instruction; `question` is (question, answer)."""
    row = task(name)
    if row not in TASKS:
        raise ValueError(
            f"{name}: the toy world has no samples of it; choose among {', '.join(t.name for t in TASKS)}."
        )
    if not row.generates:
        q, a = question or (CAPTION_REQUEST, e.caption)
        return Sample(name, q, sample_id, answer=a, fps=e.fps, frames=e.frames, frame_times=reason_times(e.fps))
    text = e.instruction if row.prompt == "instruction" else e.caption
    sound = row.usually_sounds and (with_sound or row.sound != "optional")
    return Sample(
        name,
        text if prompt is None else prompt,
        sample_id,
        vision_latents=e.video[:, :1] if row.vision == "image" else e.video,
        sound_latents=e.sound if sound else None,
        actions=e.actions if row.action != "none" else None,
        domain=DOMAIN,
        fps=e.fps,
        shift=shift,
    )


class ToySamples:
    """Job → Sample, stateless: the task is the job's kind, episode and id the job's; the rest is drawn from the id."""

    def __init__(self, source, assets: ToyAssets, data, shift_image: float, shift_video: float):
        """source: random access to `Episode`s. data: DataConfig.

        Encoded episodes are kept in memory: making one costs far more than packing it.
        """
        self.source, self.assets, self.data = source, assets, data
        self.shift = {"image": shift_image, "video": shift_video}
        self.names = tuple(name for name, _ in data.mixture)
        for n in self.names:
            task(n)
        self._cache: dict[int, Encoded] = {}

    def __call__(self, job: Job) -> Sample:
        rng = np.random.RandomState((self.data.seed * 1_000_003 + job.sample_id * 2_654_435_761) % 2**32)
        e, name = self._encoded(job.record), self.names[job.kind]
        if name == "policy" and e.kind == "slide":  # nobody acts on purpose there
            name = "forward_dynamics"
        question = (CAPTION_REQUEST, e.caption) if rng.uniform() < 0.5 else e.qa[rng.randint(len(e.qa))]
        prompt = "" if rng.uniform() < self.data.caption_dropout else None
        return make_sample(
            e, name, sample_id=job.sample_id, prompt=prompt, question=question, with_sound=rng.uniform() < 0.25,
            shift=self.shift.get(task(name).vision, 1.0),
        )  # fmt: skip

    def _encoded(self, record: int) -> Encoded:
        if record not in self._cache:
            self._cache[record] = self.assets.encode(self.source[record])
        return self._cache[record]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cache": {}}  # a worker fills its own
