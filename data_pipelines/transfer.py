"""Control videos of `transfer`: sized, computed, cut into chunks (cosmos-framework, inference/transfer.py; diffusers,
modular_pipelines/cosmos/before_encoder.py; spec model.md §7.9).

In: frames uint8 [T,H,W,3] of a control, or of the video that a control is computed from. Out: uint8 frames of the
canvas, and the windows of them that each chunk is generated from, which
begin with the last frames of the chunk before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.canny import canny
from data_pipelines.canvas import check_convention, frames_up
from data_pipelines.conditioning import FACTOR, checked, cover, stretch, unit

HINTS = ("edge", "blur", "depth", "seg", "wsm")  # the order of controls in a sequence, whatever the request's
THRESHOLDS = {  # of the edge preset: gradients below the first are no edge, above the second always one
    "very_low": (20, 50), "low": (50, 100), "medium": (100, 200), "high": (200, 300), "very_high": (300, 400),
}  # fmt: skip


@dataclass(frozen=True)
class Chunks:
    """How a long clip is generated piece by piece."""

    total: int  # frames of the result
    frames: int  # of one chunk: 1 + 4k
    overlap: int  # frames that a chunk takes over from the one before

    @property
    def starts(self) -> tuple[int, ...]:
        """The first frame of each chunk."""
        return (0, *range(self.stride, self.total - self.overlap, self.stride)) if self.total > self.frames else (0,)

    @property
    def stride(self) -> int:
        return self.frames - self.overlap


def chunks(total: int, per_chunk: int = 93, overlap: int = 1) -> Chunks:
    """The chunks of a clip of `total` frames; per_chunk is rounded up to 1 + 4k. ValueError if they cannot advance."""
    if total < 1 or overlap < 0:
        raise ValueError(f"a transfer of {total} frames with {overlap} conditional frames is not possible.")
    plan = Chunks(total, 1 if total == 1 else frames_up(per_chunk, FACTOR), overlap)
    if total > plan.frames and plan.stride < 1:
        raise ValueError(
            f"num_conditional_frames={overlap} must be smaller than num_video_frames_per_chunk={plan.frames}."
        )
    return plan


def resize(frames: np.ndarray, height: int, width: int, convention: str = "framework") -> np.ndarray:
    """A control, or the video behind one: uint8 [T,H,W,3] → uint8 [T,height,width,3].

    framework: scaled to cover, cut in the middle, rounded; diffusers: stretched.
    """
    check_convention(convention)
    return (cover if convention == "framework" else stretch)(checked(frames), height, width)


def compute(hint: str, video: np.ndarray, preset: str = "medium") -> np.ndarray:
    """A control from the video itself, uint8 [T,h,w,3] that `resize` has sized → the same shape.

    ValueError unless the hint is edge, or blur with the preset none (which changes nothing): for the others a file is
    needed. (The framework blurs with OpenCV's bilateral filter, which is not reproduced here.)
    """
    if hint == "edge":
        if preset not in THRESHOLDS:
            raise ValueError(f"preset_edge_threshold {preset!r} is not known; it is {', '.join(THRESHOLDS)}.")
        return np.stack([np.repeat(canny(f, *THRESHOLDS[preset])[..., None], 3, -1) for f in checked(video)])
    if hint == "blur" and preset == "none":
        return checked(video)
    raise ValueError(f"the control {hint} cannot be computed from vision_path here; give its control_path.")


def window(control: np.ndarray, plan: Chunks, chunk: int) -> np.ndarray:
    """The frames of a control that chunk number `chunk` is generated from: [plan.frames, h, w, 3], uint8 as it came."""
    start = plan.starts[chunk]
    whole = reflect(control, max(plan.total, plan.frames))
    return reflect(whole[start : min(start + plan.frames, plan.total)], plan.frames)


def pixels(control: np.ndarray, convention: str = "framework", dtype: type = np.float32) -> np.ndarray:
    """uint8 → float32 in −1 … 1.

    dtype: what the framework computes in. Its own choice is bfloat16 (ml_dtypes.bfloat16), whose two roundings cost up
    to half a grey level. diffusers computes in float32.
    """
    if convention == "diffusers":
        return unit(control)
    middle, one = np.asarray([127.5, 1.0], dtype)
    return (control.astype(dtype) / middle - one).astype(np.float32)


def seed(frames: np.ndarray, count: int, keep: str = "last") -> np.ndarray:
    """The pixels that make the beginning of a chunk clean, from its predecessor ("last") or the input video ("first").

    Of the `count` frames taken over (fewer if there are fewer) 1 + 4k reach the tokenizer and make 1 + k latent frames
    clean; [1 + 4k, h, w, 3] of the dtype given, nothing for count 0.
    """
    count = min(count, len(frames))
    taken = frames[len(frames) - count :] if keep == "last" else frames[:count]
    return taken[: 1 + FACTOR * ((count - 1) // FACTOR)] if count else taken


def reflect(frames: np.ndarray, count: int) -> np.ndarray:
    """[T, …] → at least [count, …]: played backwards from the end (the last frame twice) as often as needed."""
    if not len(frames):
        raise ValueError("a control video without frames cannot be continued.")
    while len(frames) < count:
        more = min(len(frames) - 1, count - len(frames))
        if not more:
            return np.repeat(frames, count, 0)
        frames = np.concatenate([frames, frames[::-1][:more]])
    return frames
