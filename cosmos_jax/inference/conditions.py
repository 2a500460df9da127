"""What a request shows the model: its media read, brought to the model's size, and encoded.

In: a `Resolved` request. Out: `Conditions`, arrays on the host; then the `Sample` whose clean tokens they are. Only the
frames that clean latents depend on are read and encoded: the video VAE is causal (spec reference_parity.md §6, I4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cosmos_jax import media
from data_pipelines import conditioning, embodiments, waveform
from data_pipelines.action import ActionStats
from data_pipelines.request_resolve import Resolved
from data_pipelines.sample import Sample
from data_pipelines.tasks import ALL, task

Encode = Callable[[np.ndarray], np.ndarray]  # pixels −1 … 1 [1+4k,H,W,3] → latents [C,1+k,h,w]; or a wave


@dataclass(frozen=True)
class Conditions:
    """float32, on the host; None or () where the task has none."""

    clip: np.ndarray | None = None  # [1+4k,H,W,3]: the leading latent frames of the target
    crop: tuple[int, int] | None = None  # rows and columns of latents that are no padding (actions)
    context: tuple[np.ndarray, ...] = ()  # the source of an edit, the controls of a transfer
    wave: np.ndarray | None = None  # [2,N]
    actions: np.ndarray | None = None  # [rows,width], normalised
    statistics: ActionStats | None = None  # of the actions; None: they are in the model's units
    record: dict = dataclasses.field(default_factory=dict)  # for run.json: what was done to them

    @property
    def encoded(self) -> bool:
        """Whether a codec has work to do."""
        return self.clip is not None or bool(self.context) or self.wave is not None

    def sample(self, blank: Sample, video: Encode, sound: Encode) -> Sample:
        """`blank` with the conditions encoded into it; what is to be made stays zero."""
        changed: dict = {}
        if self.clip is not None:
            changed["vision_latents"] = _beginning(blank.vision_latents, self._cut(video(self.clip)))
        if self.context:
            changed["context"] = tuple(video(x) for x in self.context)
        if self.wave is not None:
            changed["sound_latents"] = sound(self.wave)
        return dataclasses.replace(blank, **changed)

    def finish(self, actions: np.ndarray) -> np.ndarray:
        """Actions that the model made, in the units of the request."""
        return actions if self.statistics is None else self.statistics.denormalise(actions)

    def _cut(self, latents: np.ndarray) -> np.ndarray:
        return latents if self.crop is None else latents[:, :, : self.crop[0], : self.crop[1]]


def _beginning(whole: np.ndarray, known: np.ndarray) -> np.ndarray:
    """whole [C,T,h,w] with its leading frames replaced by those that are known."""
    out = whole.copy()
    out[:, : known.shape[1]] = known
    return out


def read(r: Resolved, convention: str, rate: int) -> Conditions:
    """Everything but the controls of a transfer, which come chunk by chunk (transfer.py).

    rate: samples per second of the sound tokeniser.
    ValueError, one sentence, for media that cannot be read or are not what the task takes.
    """
    row, request = task(r.task), r.request
    path, need = request.path("vision_path"), 1 + 4 * max(r.clean_frames, default=-1)
    if row.action != "none":
        need = r.frames if row.clean_frames == ALL else 1
        frames, _ = media.read_frames(path, need)
        seen = conditioning.observation(frames, request.image_size, need, convention=convention)
        actions, record, stats = _actions(r, convention)
        return Conditions(seen.pixels, seen.latents, actions=actions, statistics=stats, record=record)
    if row.context == "source":
        picture = media.read_frames(path, 1)[0][0]
        given = (r.height, r.width) if request.height or request.resolution else None
        return Conditions(context=(conditioning.edit_source(picture, given),))
    clip, wave = None, None
    if path is not None and r.clean_frames and row.context == "none":
        video = request.media["vision_path"].kind == "video"
        frames, _ = media.read_frames(path, None if video and request.condition_video_keep == "last" else need)
        if video:
            keep = request.condition_video_keep or "first"
            clip = conditioning.clip(frames, r.height, r.width, r.clean_frames, keep=keep, convention=convention)
        else:
            clip = conditioning.repeat_last(conditioning.image(frames[0], r.height, r.width), need)
    if row.sound == "clean":
        heard, own = media.read_wave(request.path("sound_path"))
        wave = waveform.condition(heard, own, frames=r.frames, fps=r.fps, target_rate=rate)
    return Conditions(clip, wave=wave)


def _actions(r: Resolved, convention: str) -> tuple[np.ndarray, dict, ActionStats | None]:
    """The model's actions [rows,width], zeros where they are to be made; what was done to them; their statistics."""
    q, rows = r.request, r.frames - 1
    body = embodiments.embodiment(q.domain_name)
    stats = None
    if (path := q.path("action_stats")) is not None:
        stats = embodiments.statistics(path, body, q.action_normalization)
    if task(r.task).action == "clean":
        raw = embodiments.read_actions(q.path("action_path"))
        return *embodiments.prepare(raw, body, rows, stats, convention=convention), stats
    blank = np.zeros((rows, embodiments.width(body, q.raw_action_dim)), np.float32)
    done = {"domain_name": body.name, "domain": body.domain, "width": blank.shape[1]}
    return blank, done | {"statistics": stats.record() if stats else None}, stats
