"""Pictures that condition a generation: from what a file holds to what the video tokenizer encodes.

In: frames uint8 [T,H,W,3] of any size (an image is one frame). Out: float32 [T,h,w,3] in −1 … 1, only as many frames
as the clean latents depend on: the tokenizer is causal, so the rest of the clip need not be encoded. The conventions
are cosmos-framework's (inference/vision.py; data/generator/action/utils/transforms.py) and diffusers'
(`_preprocess_conditioning_image`, `VideoProcessor`, `_prepare_action_video_conditioning`); spec reference_parity.md
§1.3, model.md §8.6. For a bfloat16 tokenizer round the result once: so does the framework, except for the controls of
`transfer` (transfer.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from data_pipelines import canvas
from data_pipelines.canvas import check_convention
from data_pipelines.resample import smooth

FACTOR = 4  # frames per latent frame, after the first


@dataclass(frozen=True)
class Observation:
    """What an action model sees. The padding of `pixels`, right and below, is encoded and then cut off."""

    pixels: np.ndarray  # [T, h, w, 3] float32: the canvas
    content: tuple[int, int]  # height, width of the scene in it

    @property
    def canvas(self) -> tuple[int, int]:
        """height, width: what the caption tells."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def latents(self) -> tuple[int, int]:
        """Rows and columns of the latents that are kept."""
        return canvas.latent_crop(*self.content)


def image(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3] → float32 [1,height,width,3]: scaled to cover the canvas, cut in the middle, whole grey levels.

    Both conventions agree (diffusers ≥ 0.42.1). ValueError for another shape or dtype.
    """
    return normalise(cover(checked(picture[None] if picture.ndim == 3 else picture), height, width))


def clip(
    frames: np.ndarray,
    height: int,
    width: int,
    latents: Sequence[int] = (0, 1),
    *,
    keep: str = "first",
    convention: str = "framework",
) -> np.ndarray:
    """uint8 [T,H,W,3] → float32 [1 + 4·max(latents), height, width, 3], which encode to max(latents) + 1 latent frames.

    latents: the clean latent frames. keep: take the "first" or the "last" frames of a longer video; a shorter one
    repeats its last frame. framework: cover and cut as an image, but not rounded; diffusers: stretched, 8 bits.
    ValueError for another shape or dtype, a bad `keep`, latent frames that are none or negative.
    """
    check_convention(convention)
    frames = checked(frames)
    if keep not in ("first", "last"):
        raise ValueError(f"condition_video_keep {keep!r} is not known; it is first or last.")
    if not len(latents) or min(latents) < 0:
        raise ValueError(f"condition_frame_indexes_vision {list(latents)} must name latent frames, 0 and up.")
    need = 1 + FACTOR * max(latents)
    seen = frames[:need] if keep == "first" else frames[-need:]
    if convention == "framework":
        x = np.stack([_covering(f, height, width) for f in seen]) / np.float32(127.5) - np.float32(1)
    else:
        x = unit(stretch(seen, height, width))
    return repeat_last(x, need)


def observation(frames: np.ndarray, tier: int | str, need: int, *, convention: str = "framework") -> Observation:
    """uint8 [T,H,W,3] → the first `need` frames on the nearest canvas of a tier; a shorter clip repeats its last.

    need: 1 where only the first frame is a condition (policy, forward dynamics), action rows + 1 where all are
    (inverse dynamics). The scene is shrunk, never enlarged, then continued to the right and below by reflection (by its
    edge where it is too small to reflect). framework: 8 bits throughout. diffusers: the source is first stretched down
    to multiples of 16, then floats, which may exceed ±1 a little. ValueError as `clip`, and for an unknown tier.
    """
    check_convention(convention)
    x = checked(frames)[:need]
    if convention == "diffusers":
        h, w = (n - n % canvas.SPATIAL for n in x.shape[1:3])
        if not h or not w:
            raise ValueError(f"an observation of {x.shape[1]}×{x.shape[2]} pixels is smaller than one latent (16×16).")
        x = unit(stretch(x, h, w))
    h, w = x.shape[1:3]
    target = canvas.action_canvas(h, w, tier, convention)
    scale = min(target[1] / w, target[0] / h, 1.0)
    content = max(1, int(scale * h + 0.5)), max(1, int(scale * w + 0.5))
    if content != (h, w):
        shrunk = (smooth(f.astype(np.float32), *content, "bicubic") for f in x)
        x = np.stack([_grey(f) for f in shrunk] if convention == "framework" else list(shrunk))
    below, right = target[0] - content[0], target[1] - content[1]
    small = right >= content[1] or below >= content[0]
    x = np.pad(x, ((0, 0), (0, below), (0, right), (0, 0)), "edge" if small else "reflect")
    return Observation(repeat_last(normalise(x) if convention == "framework" else x, need), content)


def edit_source(picture: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H,W,3] → float32 [1,h,w,3], the source of image2image (framework).

    size: (height, width) if the request gives resolution and aspect: covered as any image. None: the picture's own
    shape, its longest side 512, by Lanczos.
    """
    if size is not None:
        return image(picture, *size)
    x = checked(picture[None])
    h, w = canvas.edit_size(*x.shape[1:3])
    return normalise(np.asarray(PIL.Image.fromarray(x[0]).resize((w, h), PIL.Image.Resampling.LANCZOS))[None])


def cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [T,H,W,3] → uint8 [T,height,width,3]: scaled to cover, rounded, cut in the middle."""
    return np.stack([_grey(_covering(f, height, width)) for f in frames])


def normalise(frames: np.ndarray) -> np.ndarray:
    """uint8 → float32 in −1 … 1."""
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


def repeat_last(frames: np.ndarray, count: int) -> np.ndarray:
    """[T, …] → [count, …]: cut, or the last frame repeated."""
    missing = count - len(frames)
    return frames[:count] if missing <= 0 else np.concatenate([frames, np.repeat(frames[-1:], missing, 0)])


def _covering(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3] → float32 grey levels [height,width,3]: the least size that covers the canvas, its middle."""
    h, w = frame.shape[:2]
    scale = max(width / w, height / h)
    x = smooth(frame.astype(np.float32), math.ceil(scale * h), math.ceil(scale * w), "bilinear")
    top, left = round((x.shape[0] - height) / 2), round((x.shape[1] - width) / 2)  # half to even
    return x[top : top + height, left : left + width]


def _grey(x: np.ndarray) -> np.ndarray:
    """Whole grey levels."""
    return x.round().clip(0, 255).astype(np.uint8)


def stretch(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 frames → uint8 of another size, Pillow's bilinear: the shape is not kept."""
    if frames.shape[1:3] == (height, width):
        return frames
    bilinear = PIL.Image.Resampling.BILINEAR
    return np.stack([np.asarray(PIL.Image.fromarray(f).resize((width, height), bilinear)) for f in frames])


def unit(frames: np.ndarray) -> np.ndarray:
    """uint8 → float32 in −1 … 1, in diffusers' two steps."""
    return np.float32(2) * (frames.astype(np.float32) / np.float32(255)) - np.float32(1)


def checked(frames: np.ndarray) -> np.ndarray:
    """The frames, if they are some: uint8 [T,H,W,3]. ValueError else."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(
            f"conditioning frames must be uint8 [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}."
        )
    return frames
