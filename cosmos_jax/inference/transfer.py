"""Clips that follow controls, in chunks: each chunk begins with the last frames of the one before.

In: a request of the task transfer. Out: `Controls`: the frames of every control, read, computed and sized; and what
each chunk is generated from. Every chunk is a job of the same shapes and captions, so programs and the captions' keys
and values serve all of them. (The rules are data_pipelines/transfer.py.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cosmos_jax import media
from data_pipelines import transfer
from data_pipelines.request_resolve import Resolved
from data_pipelines.transfer import Chunks


@dataclass(frozen=True)
class Controls:
    """uint8 [T,H,W,3] at the size of the result: one clip for each control, and the input if there is one."""

    plan: Chunks
    frames: dict[str, np.ndarray] = field(repr=False)
    given: np.ndarray | None = field(repr=False)
    convention: str

    def chunk(self, i: int) -> tuple[np.ndarray, ...]:
        """Chunk i of each control: float32 in −1 … 1, [plan.frames,H,W,3]."""
        return tuple(transfer.pixels(transfer.window(x, self.plan, i), self.convention) for x in self.frames.values())


def read(r: Resolved, convention: str) -> Controls:
    """ValueError, one sentence, for a control that can neither be read nor computed."""
    q = r.request
    given = None
    if (path := q.path("vision_path")) is not None:
        given = transfer.resize(media.read_frames(path, q.max_frames)[0], r.height, r.width, convention)
    frames = {}
    for name, hint in q.hints.items():
        path = q.path(f"{name}.control_path")
        if path is not None:
            frames[name] = transfer.resize(media.read_frames(path, q.max_frames)[0], r.height, r.width, convention)
        else:
            frames[name] = transfer.compute(name, given, hint.preset)
    plan = transfer.chunks(r.frames, q.num_video_frames_per_chunk, q.num_conditional_frames)
    return Controls(plan, frames, given, convention)


def join(parts: list[tuple[np.ndarray, int]], total: int) -> np.ndarray:
    """(frames of a chunk, how many of them the chunk before has shown already) → the clip."""
    return np.concatenate([x[n:] for x, n in parts])[:total]


def beside(video: np.ndarray, controls: Controls, r: Resolved) -> np.ndarray:
    """The clip with its controls, or its input, at the left, if the request shows them."""
    shown = list(controls.frames.values()) if r.request.show_control_condition else []
    if r.request.show_input and controls.given is not None:
        shown = [controls.given, *shown]
    return np.concatenate([*(transfer.reflect(x, len(video))[: len(video)] for x in shown), video], 2)
