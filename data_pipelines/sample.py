"""One training example or one request, before it becomes tokens.

In: text, pictures, latents, actions. Out: a `Sample` that `validate` has found coherent; a request differs from a
training sample only in that its noisy streams hold zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipelines.schema import SequenceSpec
from data_pipelines.tasks import ALL, Task, task
from data_pipelines.video import Pixels

ROLES = ("system", "user", "assistant")
ACTION_LIMIT = 5.0  # normalised actions beyond this were not normalised


class Turn(NamedTuple):
    """What one side of a conversation says and shows."""

    role: str  # one of ROLES
    parts: tuple[str | Pixels, ...]


@dataclass(frozen=True)
class Sample:
    """Optional streams of one example. Which of them must be there follows from `task` (data_pipelines/tasks.py)."""

    task: str
    prompt: str  # caption, instruction or question; "" is the unconditional prompt
    sample_id: int = 0  # seeds noise and sigma; names the sample in errors
    answer: str | None = None  # what `reason` is trained to say; None when it is asked
    vision_latents: np.ndarray | None = None  # [C, T, h, w] float32, normalised
    sound_latents: np.ndarray | None = None  # [Ds, Ts] float32, normalised
    actions: np.ndarray | None = None  # [rows, width] float32, normalised
    domain: int = 0  # embodiment
    fps: float = 24.0  # of the pixels
    shift: float = 1.0  # flow shift of the sigma law
    frames: np.ndarray | None = None  # [F, H, W, 3] uint8 for the vision encoder (`reason`)
    frame_times: tuple[float, ...] = ()  # seconds, one per group of frames the encoder merges
    turns: tuple[Turn, ...] = ()  # a whole conversation, instead of prompt, answer and frames (`reason`)
    system: str | None = None  # system turn before the prompt of a sample that generates
    clean_frames: tuple[int, ...] | None = None  # latent frames that are conditions; None = the task's leading ones
    clean_sound: int | None = None  # leading sound latents that are conditions; None = what the task says
    context: tuple[np.ndarray, ...] = ()  # clean vision items [C, T, h, w] before the target: controls, or the source
    weights: tuple[float, ...] = ()  # of the controls: one attention per control, averaged; () = one over all of them
    clean_actions: int = 0  # leading action rows that are conditions: history, the current state
    action_start: int = 1  # row j ends video interval j + action_start; 1 − (rows before the first frame's step)


def vision_items(s: Sample) -> tuple[np.ndarray, ...]:
    """The vision latents of a sample in the order of its tokens; the last is the target, the others are clean."""
    return (*s.context, s.vision_latents)


def clean_frames(s: Sample) -> tuple[int, ...]:
    """The latent frames of the target that are conditions."""
    if s.clean_frames is not None:
        return s.clean_frames
    frames, row = s.vision_latents.shape[1], task(s.task)
    return tuple(range(frames if row.clean_frames == ALL else row.clean_frames))


def validate(s: Sample, spec: SequenceSpec) -> None:
    """Raise ValueError with one sentence that names the fault and the remedy."""
    row = task(s.task)
    who = f"sample {s.sample_id} ({s.task})"
    if not s.fps > 0:
        raise ValueError(f"{who}: fps={s.fps} must be positive; give the frame rate of the video.")
    if row.vision == "none":
        if s.vision_latents is not None or s.actions is not None or s.sound_latents is not None:
            raise ValueError(f"{who}: takes no latents; pass pixels as `frames`.")
        if s.system is not None:
            raise ValueError(f"{who}: takes no `system`; put a system turn into `turns`.")
        if s.context or s.weights or s.clean_frames is not None or s.clean_actions or s.action_start != 1:
            raise ValueError(
                f"{who}: denoises nothing; leave context, weights, clean_frames and the action rows alone."
            )
        if s.turns:
            _check_turns(s, spec, who)
        if s.frames is not None:
            _check_frames(s, spec, who)
        return
    if s.turns:
        raise ValueError(f"{who}: takes a prompt, not a conversation; leave `turns` to the task reason.")
    if s.vision_latents is None:
        raise ValueError(f"{who}: needs vision latents.")
    for x in vision_items(s):
        _check_vision(x, spec, who)
    _check_context(s, row, who)
    frames = s.vision_latents.shape[1]
    if row.vision == "image" and frames != 1:
        raise ValueError(f"{who}: makes one frame, but the video has {frames} latent frames; pass a single image.")
    if row.vision == "video" and frames < 2 and row.context != "controls":  # a control may be a picture
        raise ValueError(f"{who}: needs a video of at least {1 + spec.temporal_factor} frames, got one latent frame.")
    if s.clean_frames is not None:
        _check_clean_frames(s, row, who)
    elif row.clean_frames != ALL and row.clean_frames >= frames and row.vision == "video":
        need = 1 + spec.temporal_factor * row.clean_frames
        raise ValueError(f"{who}: conditions on {row.clean_frames} latent frames, so it needs at least {need} frames.")
    if (row.action == "none") != (s.actions is None):
        raise ValueError(f"{who}: {'takes no' if s.actions is not None else 'needs'} actions.")
    if s.actions is not None:
        _check_actions(s, spec, row, who)
    elif s.clean_actions or s.action_start != 1:
        raise ValueError(f"{who}: has no actions; leave clean_actions and action_start as they are.")
    given = 0 if s.sound_latents is None else s.sound_latents.shape[-1]
    if s.clean_sound is not None and (row.sound != "clean" or not 0 <= s.clean_sound <= given):
        raise ValueError(
            f"{who}: clean_sound={s.clean_sound} is for sound2video, at most the {given} latents of its sound."
        )
    if row.sound in ("clean", "noisy") and s.sound_latents is None:
        raise ValueError(f"{who}: needs sound latents.")
    if row.sound == "none" and s.sound_latents is not None:
        raise ValueError(f"{who}: takes no sound; use text2video_sound, image2video, video2video or sound2video.")
    if s.sound_latents is not None:
        x = s.sound_latents
        if not spec.sound_dim:
            raise ValueError(f"{who}: this model has no sound stream.")
        if x.ndim != 2 or x.shape[0] != spec.sound_dim:
            raise ValueError(f"{who}: sound latents of shape {x.shape}, expected ({spec.sound_dim}, frames).")
        _finite(x, who, "sound latents")


def _check_turns(s: Sample, spec: SequenceSpec, who: str) -> None:
    if s.prompt or s.answer is not None or s.frames is not None:
        raise ValueError(f"{who}: has turns and also a prompt, an answer or frames; put everything into the turns.")
    for turn in s.turns:
        if turn.role not in ROLES:
            raise ValueError(f"{who}: unknown role {turn.role!r}; the roles are {', '.join(ROLES)}.")
    pictures = [p for t in s.turns for p in t.parts if isinstance(p, Pixels)]
    if pictures and not spec.vit_patch:
        raise ValueError(f"{who}: this model has no vision encoder (model.vision is not set).")
    for p in pictures:
        if p.patches.shape[1] != spec.vit_patch_dim:
            raise ValueError(
                f"{who}: patches of {p.patches.shape[1]} numbers, but this model's have {spec.vit_patch_dim}; prepare "
                "the pictures with the settings of its own folder."
            )


def _check_frames(s: Sample, spec: SequenceSpec, who: str) -> None:
    x = s.frames
    if not spec.vit_patch:
        raise ValueError(f"{who}: this model has no vision encoder (model.vision is not set).")
    if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != np.uint8:
        raise ValueError(f"{who}: frames must be uint8 [F, H, W, 3], got {x.dtype} {x.shape}.")
    groups = -(-len(x) // spec.vit_temporal)
    if len(s.frame_times) != groups:
        raise ValueError(f"{who}: {len(x)} frames need {groups} frame_times, got {len(s.frame_times)}.")


def _check_vision(x: np.ndarray, spec: SequenceSpec, who: str) -> None:
    if x.ndim != 4 or x.shape[0] != spec.latent_channels:
        raise ValueError(f"{who}: vision latents of shape {x.shape}, expected ({spec.latent_channels}, T, h, w).")
    _finite(x, who, "vision latents")


def _check_context(s: Sample, row: Task, who: str) -> None:
    shapes, target = [x.shape for x in s.context], s.vision_latents.shape
    if row.context == "none" and shapes:
        raise ValueError(f"{who}: takes no context; use image2image for a source image, transfer for controls.")
    if row.context == "source" and [shape[1] for shape in shapes] != [1]:
        raise ValueError(f"{who}: edits one image; give it as the only item of `context`, [C, 1, h, w].")
    if row.context == "controls" and not shapes:
        raise ValueError(f"{who}: needs at least one control in `context`.")
    if row.context == "controls" and set(shapes) != {target}:
        other = next(shape for shape in shapes if shape != target)
        raise ValueError(f"{who}: a control of shape {other}, but the target's is {target}; they must be the same.")
    if not s.weights:
        return
    if row.context != "controls" or len(s.weights) != len(shapes):
        raise ValueError(f"{who}: {len(s.weights)} weights, but {len(shapes)} controls; give one for each, or none.")
    if not (np.isfinite(s.weights).all() and min(s.weights) >= 0 < sum(s.weights)):
        raise ValueError(f"{who}: weights {s.weights} must not be negative, and one of them must be positive.")


def _check_clean_frames(s: Sample, row: Task, who: str) -> None:
    frames, clean = s.vision_latents.shape[1], s.clean_frames
    if list(clean) != sorted({k for k in clean if 0 <= k < frames}):
        raise ValueError(f"{who}: clean_frames={clean} must be latent frames 0 … {frames - 1}, each once, in order.")
    others = row.action == "noisy" or (row.sound in ("noisy", "optional") and s.sound_latents is not None)
    if len(clean) == frames and not others:
        raise ValueError(f"{who}: clean_frames names every latent frame, so nothing is left to make; leave one out.")


def _check_actions(s: Sample, spec: SequenceSpec, row: Task, who: str) -> None:
    x = s.actions
    if not spec.action_dim:
        raise ValueError(f"{who}: this model has no action stream.")
    if x.ndim != 2 or not 0 < x.shape[1] <= spec.action_dim:
        raise ValueError(f"{who}: actions of shape {x.shape}, expected (rows, at most {spec.action_dim}).")
    want = spec.temporal_factor * (s.vision_latents.shape[1] - 1)
    before = 1 - s.action_start  # rows of history, or of the state the first frame shows (spec model.md §4.2)
    if before < 0:
        raise ValueError(f"{who}: action_start={s.action_start} leaves the first step without a row; give 1 or less.")
    if len(x) != want + before:
        more = f", and action_start={s.action_start} puts {before} before them" if before else ""
        raise ValueError(f"{who}: {len(x)} action rows, but {want + 1} frames have {want} steps between them{more}.")
    least, most = (before, len(x) - 1) if row.action == "noisy" else (0, len(x))
    if not least <= s.clean_actions <= most:
        raise ValueError(f"{who}: clean_actions={s.clean_actions} of {len(x)} rows; give {least} … {most}.")
    _finite(x, who, "actions")
    if np.abs(x).max() > ACTION_LIMIT:
        raise ValueError(
            f"{who}: an action of {np.abs(x).max():.1f} is not in normalised units (about −1 … 1); "
            "normalise with the dataset's statistics (data_pipelines/action.py)."
        )


def _finite(x: np.ndarray, who: str, what: str) -> None:
    if not np.isfinite(x).all():
        raise ValueError(f"{who}: {what} hold NaN or infinity; drop the sample or repair its source.")
