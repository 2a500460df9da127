"""Ask a real reasoner (Qwen3-VL, the Cosmos 3 reasoners, Edge): messages and media → samples and batches.

In: messages as dicts `{"role", "content"}` in Hugging Face's form, a checkpoint's folder. Out: `Sample`s that
packing.py plans like any other, or a whole batch. docs/reasoner.md shows it in use.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import PIL.Image
import PIL.ImageOps

from data_pipelines import packing, preprocessor
from data_pipelines.sample import Sample, Turn, validate
from data_pipelines.schema import SequenceSpec
from data_pipelines.tokenizer import ChatTokenizer
from data_pipelines.video import Pixels
from data_pipelines.vision import Clip, ClipSettings, Eyes, sample_frames, see_clip, see_image


@dataclass(frozen=True)
class Frontend:
    """All that stands between a user and the reasoner: how it reads, and how it sees."""

    tokenizer: ChatTokenizer
    eyes: Eyes | None = None  # None: for words alone

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Frontend:
        """From a checkpoint's folder: tokenizer files, chat template, preprocessor files. ValueError as they say."""
        return cls(ChatTokenizer.load(folder), preprocessor.load(folder))

    def sample(self, messages: Sequence[Mapping[str, Any]], spec: SequenceSpec, sample_id: int = 0) -> Sample:
        """A conversation → `Sample` of the task reason: to be learnt if the assistant ends it, else to be answered.

        content: a string, or a list of {"type": "text", "text"}, {"type": "image", "image": PIL image, uint8 [H,W,3] or
        path}, {"type": "video", "video": `Clip` or path}.
        """
        if not messages:
            raise ValueError("a conversation without messages; give at least one.")
        s = Sample("reason", "", sample_id, turns=tuple(self._turn(m) for m in messages))
        validate(s, spec)
        return s

    def batch(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], spec: SequenceSpec, rows: int | None = None
    ) -> dict[str, np.ndarray]:
        """One conversation per row, in a bucket that just holds them (schema.py)."""
        samples = [self.sample(c, spec, i) for i, c in enumerate(conversations)]
        return packing.one_per_row([packing.plan(s, self.tokenizer, spec) for s in samples], spec, rows)

    def _turn(self, message: Mapping[str, Any]) -> Turn:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return Turn(message["role"], tuple(self._part(p) for p in parts))

    def _part(self, part: Mapping[str, Any]) -> str | Pixels:
        kind = part.get("type")
        if kind == "text":
            return part["text"]
        if kind == "image":
            x = part["image"]
            return see_image(open_image(x) if isinstance(x, str | os.PathLike) else x, self._seeing.image)
        if kind == "video":
            x, settings = part["video"], self._seeing.video
            return see_clip(open_clip(x, settings) if isinstance(x, str | os.PathLike) else x, settings)
        raise ValueError(f"a part of type {kind!r}; the parts of a message are text, image and video.")

    @property
    def _seeing(self) -> Eyes:
        if self.eyes is None:
            raise ValueError("a picture, but this frontend has no eyes; give the preprocessor files, or words alone.")
        return self.eyes


def open_image(path: str | os.PathLike) -> PIL.Image.Image:
    """The picture of a file, upright (its EXIF orientation applied)."""
    try:
        return PIL.ImageOps.exif_transpose(PIL.Image.open(path))
    except OSError as e:
        raise ValueError(f"{path} cannot be read as an image ({e}).") from e


def open_clip(path: str | os.PathLike, settings: ClipSettings) -> Clip:
    """The frames of a file that are looked at, and no others: a long video is decoded once and never held whole."""
    try:
        with av.open(os.fspath(path)) as f:
            stream = f.streams.video[0]
            total = stream.frames or sum(1 for _ in f.decode(stream))  # some containers do not count their frames
            fps = float(stream.average_rate or stream.guessed_rate or 0)  # .ts files state no average
            chosen = sample_frames(total, fps, settings).tolist()
            f.seek(0)
            wanted, frames = set(chosen), []
            for i, frame in enumerate(f.decode(stream)):
                if i in wanted:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if i >= chosen[-1]:
                    break
    except (av.FFmpegError, IndexError) as e:
        raise ValueError(f"{path} cannot be read as a video ({e}).") from e
    if len(frames) != len(chosen):
        raise ValueError(f"{path} promises {total} frames but holds fewer; the file may be cut off.")
    return Clip(np.stack(frames), fps, tuple(chosen))
