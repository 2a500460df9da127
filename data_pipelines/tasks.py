"""THE table of tasks: which streams a task has, and which tokens are clean conditions or noisy targets.

In: a task's name. Out: its row. Planning, sampling, evaluation and the docs all read this table and nothing else
(spec model.md §4.2, defaults §7.6).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

ALL = -1  # every latent frame is clean


@dataclass(frozen=True)
class Task:
    name: str
    vision: str  # none | image (one frame) | video
    clean_frames: int  # leading latent frames that are conditions; ALL = every one
    action: str  # none | clean | noisy
    sound: str  # none | clean | noisy | optional (noisy when the sample has it)
    prompt: str  # question | caption | instruction
    steps: int = 0  # sampling defaults; 0 = the task denoises nothing
    guidance: float = 1.0
    shift: float = 1.0
    summary: str = ""
    context: str = "none"  # clean vision items before the target: none | source (one image) | controls (its own shape)

    @property
    def generates(self) -> bool:
        return self.vision != "none"

    @property
    def usually_sounds(self) -> bool:
        """True when sound belongs to a sample that can have it. A still has some only where that is asked for."""
        return self.sound in ("clean", "noisy") or (self.sound == "optional" and self.vision == "video")

    @property
    def makes_video(self) -> bool:
        """True when some vision tokens are noisy."""
        return self.generates and self.clean_frames != ALL


TABLE: tuple[Task, ...] = (
    Task("reason", "none", 0, "none", "none", "question", summary="text from video: captions and answers"),
    Task("text2image", "image", 0, "none", "optional", "caption", 50, 4.0, 3.0, "one frame from text"),
    Task("text2video", "video", 0, "none", "none", "caption", 35, 6.0, 10.0, "a clip from text"),
    Task("text2video_sound", "video", 0, "none", "noisy", "caption", 35, 6.0, 10.0, "a clip with sound from text"),
    Task("image2video", "video", 1, "none", "optional", "caption", 35, 6.0, 10.0, "a clip from its first frame"),
    Task("video2video", "video", 2, "none", "optional", "caption", 35, 6.0, 10.0, "a clip from its first 5 frames"),
    Task("forward_dynamics", "video", 1, "clean", "none", "caption", 30, 1.0, 10.0, "what these actions will do"),
    Task("inverse_dynamics", "video", ALL, "noisy", "none", "caption", 30, 1.0, 10.0, "the actions behind a clip"),
    Task("policy", "video", 1, "noisy", "none", "instruction", 30, 1.0, 10.0, "act, and imagine the outcome"),
    Task("image2image", "image", 0, "none", "none", "instruction", 35, 6.0, 5.0, "an image, edited", "source"),
    Task("transfer", "video", 0, "none", "none", "caption", 35, 3.0, 10.0, "a clip that follows controls", "controls"),
    Task("sound2video", "video", 0, "none", "clean", "caption", 35, 6.0, 10.0, "a clip that goes with a sound"),
    Task("video2sound", "video", ALL, "none", "noisy", "caption", 35, 6.0, 10.0, "the sound of a clip"),
)
INDEX = {t.name: i for i, t in enumerate(TABLE)}


def task(name: str) -> Task:
    """The row of a task. ValueError, with the nearest name, if there is none."""
    if name not in INDEX:
        close = difflib.get_close_matches(str(name), list(INDEX), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown task {name!r}{hint}; the tasks are {', '.join(INDEX)}.")
    return TABLE[INDEX[name]]


def describe() -> str:
    """The table in plain text: one line per task."""
    frames = {0: "all noisy", ALL: "all clean"}
    streams = f"{'context':9} {'vision':7} {'video latents':16} {'action':7} {'sound':9}"
    lines = [f"{'task':18} {streams} {'prompt':12} what it does"]
    for t in TABLE:
        clean = frames.get(t.clean_frames, f"first {t.clean_frames} clean") if t.generates else "-"
        streams = f"{t.context:9} {t.vision:7} {clean:16} {t.action:7} {t.sound:9}"
        lines.append(f"{t.name:18} {streams} {t.prompt:12} {t.summary}")
    return "\n".join(lines)
