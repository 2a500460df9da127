"""A picture or a clip as a real reasoner sees it: fitted to the patch grid, resampled, normalised, cut into patches.

In: a PIL image, a uint8 array, or a `Clip`. Out: `Pixels`, equal to what the processors of transformers 5.23 make
(`Qwen2VLImageProcessor`, `Qwen3VLVideoProcessor`, `Cosmos3Edge…`; spec model.md §3.1, §3.3). The numbers come from
`Eyes`, which preprocessor.py reads from a checkpoint's folder. The toy, whose frames fit already, uses video.py alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image

from data_pipelines.patch_grid import MERGE
from data_pipelines.resample import bicubic
from data_pipelines.video import Pixels, patchify

HALF = (0.5, 0.5, 0.5)
MOST_STRETCHED = 200  # the longest side over the shortest that the reference takes


@dataclass(frozen=True)
class PictureSettings:
    """What decides the numbers of a picture's patches (preprocessor_config.json)."""

    min_pixels: int  # area after resizing: of an image, or of all frames of a clip together
    max_pixels: int
    patch: int = 16  # pixels per side
    temporal: int = 2  # frames per patch; an image is repeated to fill it
    kind: str = "qwen3vl"  # which encoder, hence the order of a patch's numbers (video.FEATURES)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    rescale: float = 1 / 255
    widen_first: bool = False  # pictures narrower than one token are scaled up before anything is measured

    @property
    def side(self) -> int:
        """Pixels per side of one und token."""
        return self.patch * MERGE

    def limits(self, frames: int) -> tuple[int, int]:
        """Least and most pixels after resizing."""
        return self.min_pixels, self.max_pixels


@dataclass(frozen=True)
class ClipSettings(PictureSettings):
    """… and which frames of a clip are seen (video_preprocessor_config.json)."""

    widen_first: bool = True
    fps: float = 2.0  # frames looked at per second, within the two limits
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False  # limit each frame too, as qwen-vl-utils does
    max_video_tokens: int = 768  # that limit, in und tokens per frame

    def limits(self, frames: int) -> tuple[int, int]:
        if not self.cap_pixels_per_frame:
            return super().limits(frames)
        each = min(self.max_video_tokens * self.side**2, self.max_pixels // frames)
        return self.min_pixels, max(each, int(self.min_pixels * 1.05)) * frames


@dataclass(frozen=True)
class Eyes:
    """The preprocessing of one model: of images and of clips."""

    image: PictureSettings
    video: ClipSettings


# As released. Qwen3-VL's files also serve the Cosmos 3 reasoners (Nano, Super).
QWEN3_VL = Eyes(PictureSettings(256**2, 4096**2), ClipSettings(64**2, 24 * 1024**2))
EDGE = Eyes(
    PictureSettings(256**2, 4096**2, temporal=1, kind="siglip2", widen_first=True),
    ClipSettings(64**2, 24 * 1024**2, temporal=1, kind="siglip2"),
)


class Clip(NamedTuple):
    """A video in memory. `indices`: these frames were already chosen, and were so numbered in a source of `fps`."""

    frames: np.ndarray  # [F, H, W, 3] uint8
    fps: float
    indices: tuple[int, ...] | None = None


def see_image(image: PIL.Image.Image | np.ndarray, settings: PictureSettings) -> Pixels:
    """A PIL image of any mode, or uint8 [H,W,3] → patches [rows·cols, F], grid (1, rows, cols). ValueError else."""
    x = to_rgb(image)
    h, w = fitted(x.shape[0], x.shape[1], settings)
    return _cut(np.repeat(bicubic(x, h, w)[None], settings.temporal, 0), settings)


def see_clip(clip: Clip, settings: ClipSettings) -> Pixels:
    """The frames to look at, as patches [t·rows·cols, F], and the time of each temporal patch. ValueError as said."""
    x = clip.frames
    if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != np.uint8:
        raise ValueError(f"a video must be uint8 [frames, height, width, 3], got {x.dtype} {list(x.shape)}.")
    if clip.indices is None:
        chosen = sample_frames(len(x), clip.fps, settings)
        x = x[chosen]
    elif len(clip.indices) != len(x):
        raise ValueError(f"a video of {len(x)} chosen frames has {len(clip.indices)} indices; give one per frame.")
    else:
        chosen = np.asarray(clip.indices)
    h, w = fitted(x.shape[1], x.shape[2], settings, len(x))
    return _cut(bicubic(x, h, w), settings)._replace(times=timestamps(chosen, clip.fps, settings.temporal))


def to_rgb(image: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [H,W,3]; what is transparent shows white."""
    if isinstance(image, PIL.Image.Image):
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    x = np.asarray(image)
    if x.ndim != 3 or x.shape[-1] != 3 or x.dtype != np.uint8:
        raise ValueError(
            f"an image must be uint8 [height, width, 3], got {x.dtype} {list(x.shape)}; pass grey or transparent "
            "pictures as PIL images, which know their mode."
        )
    return x


def fitted(height: int, width: int, settings: PictureSettings, frames: int = 0) -> tuple[int, int]:
    """Height and width after resizing: multiples of `side`, the area within the limits, the shape nearly kept.

    frames: of a clip, whose limits count the pixels of all frames; 0 for an image.
    """
    if min(height, width) < 1:
        raise ValueError(f"a picture of {height}×{width} pixels holds nothing to look at.")
    side = settings.side
    low, high = settings.limits(frames)
    if frames and frames < settings.temporal:
        raise ValueError(f"a video of {frames} frame is too short ({settings.temporal} make a patch); pass an image.")
    if settings.widen_first and min(height, width) < side:
        grow = max(side / height, side / width)
        height, width = int(height * grow), int(width * grow)
    if max(height, width) > MOST_STRETCHED * min(height, width):
        raise ValueError(f"a picture of {height}×{width} pixels is more than {MOST_STRETCHED} times as long as wide.")
    h, w = round(height / side) * side, round(width / side) * side
    groups = round(frames / settings.temporal) * settings.temporal if frames else 1
    area = max(frames, 1) * height * width
    if groups * h * w > high:
        shrink = math.sqrt(area / high)
        h, w = (max(side, math.floor(n / shrink / side) * side) for n in (height, width))
    elif groups * h * w < low:
        grow = math.sqrt(low / area)
        h, w = (math.ceil(n * grow / side) * side for n in (height, width))
    return h, w


def sample_frames(total: int, fps: float, settings: ClipSettings) -> np.ndarray:
    """Indices of the frames looked at: evenly spread, the first and the last among them. [n] int64."""
    if not (total > 0 and fps > 0):
        raise ValueError(f"a video of {total} frames at {fps} frames per second cannot be sampled; give both.")
    n = min(max(int(total / fps * settings.fps), settings.min_frames), settings.max_frames, total)
    return np.linspace(0, total - 1, n).round().astype(int)


def timestamps(indices: np.ndarray, fps: float, temporal: int) -> tuple[float, ...]:
    """Seconds of each temporal patch: midway from its first to its last frame. The last frame fills the last patch."""
    at = [i / fps for i in (*indices, *[indices[-1]] * (-len(indices) % temporal))]
    return tuple(float((at[i] + at[i + temporal - 1]) / 2) for i in range(0, len(at), temporal))


def _cut(frames: np.ndarray, settings: PictureSettings) -> Pixels:
    """uint8 [F,H,W,3] → normalised patches. (x − 255·mean) / (255·std), each constant rounded to float32 first."""
    mean, std = (np.asarray(v, np.float32) * np.float32(1 / settings.rescale) for v in (settings.mean, settings.std))
    return patchify((frames.astype(np.float32) - mean) / std, settings.patch, settings.temporal, settings.kind)
