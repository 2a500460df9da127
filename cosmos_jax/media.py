"""Files in and out: PNG, MP4 with sound, WAV, JSON actions.

In: arrays. Out: files any player opens; and back. Pictures through Pillow, video and sound through PyAV.
"""

from __future__ import annotations

import collections
import io
import json
import wave
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipelines import embodiments
from data_pipelines.request_media import KINDS

Target = str | Path | io.BytesIO
SOUND_RATE = 48_000  # of muxed AAC
CRF = 16  # of H.264: 0 is lossless, 51 is worst


class MediaError(ValueError):
    """A file that is missing or is not what it should be."""


def _existing(path: str | Path, what: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{what} file {path} does not exist; check the path.")
    return path


def enlarge(video: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [..., H, W, 3] with every pixel repeated scale×scale times."""
    return video.repeat(scale, -3).repeat(scale, -2)


def fit(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [..., H, W, 3] → [..., height, width, 3]: scaled to cover it, centre-cropped (spec model.md §7.6)."""
    h, w = pictures.shape[-3:-1]
    if (h, w) == (height, width):
        return pictures
    f = max(height / h, width / w)
    box = ((w - width / f) / 2, (h - height / f) / 2, (w + width / f) / 2, (h + height / f) / 2)
    flat = pictures.reshape(-1, h, w, 3)
    out = [np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BOX, box)) for x in flat]
    return np.stack(out).reshape(*pictures.shape[:-3], height, width, 3)


def write_png(path: Target, image: np.ndarray, scale: int = 1) -> None:
    """uint8 [H,W,3] → PNG."""
    Image.fromarray(enlarge(image, scale)).save(path, format="PNG")


def write_mp4(
    path: Target, video: np.ndarray, fps: float, sound: np.ndarray | None = None, rate: int = 8000, scale: int = 1,
    crf: int = CRF,
) -> None:  # fmt: skip
    """uint8 [T,H,W,3] and float32 [2,N] at `rate` Hz → MP4 (H.264, AAC at 48 kHz). Sides are padded to even pixels."""
    video = enlarge(video, scale)
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    target = str(path) if isinstance(path, str | Path) else path
    with av.open(target, "w", format="mp4") as out:
        picture = cast(av.VideoStream, out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001)))
        picture.height, picture.width, picture.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        # x264's macroblock tree reads memory that nobody wrote if frames are small: other bytes for the same frames
        picture.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        track = out.add_stream("aac", rate=SOUND_RATE, layout="stereo") if sound is not None else None
        for frame in video:
            out.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(picture.encode())
        if track is not None and sound is not None:
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SOUND_RATE)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound, np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                out.mux(track.encode(piece))
            out.mux(track.encode())


def write_wav(path: str | Path, sound: np.ndarray, rate: int) -> None:
    """float32 [2,N] in −1 … 1 → 16-bit WAV."""
    with wave.open(str(path), "wb") as f:
        f.setnchannels(len(sound))
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((np.clip(sound, -1, 1).T * 32767).round().astype("<i2").tobytes())


def write_actions(path: str | Path, actions: np.ndarray, fps: float, units: str = "raw") -> None:
    """Actions [rows,width] → JSON with their frame rate and units."""
    Path(path).write_text(json.dumps({"fps": fps, "units": units, "actions": np.asarray(actions, float).tolist()}))


def read_image(path: str | Path) -> np.ndarray:
    """Any picture → uint8 [H,W,3]."""
    try:
        with Image.open(_existing(path, "image")) as f:
            return np.asarray(f.convert("RGB"))
    except UnidentifiedImageError:
        raise MediaError(f"{path} is not a picture that Pillow can read.") from None


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """A video file → (uint8 [T,H,W,3], frames per second)."""
    return _decoded(_existing(path, "video"), None, False)


def read_frames(path: str | Path, count: int | None = None, last: bool = False) -> tuple[np.ndarray, float]:
    """A video or a picture → (uint8 [T,H,W,3], frames per second; 0 for a picture).

    count: no more than so many frames, the first ones or the `last` ones; nothing more is held in memory.
    """
    path = _existing(path, "video")
    if KINDS.get(path.suffix.lower()) == "image":
        return read_image(path)[None], 0.0
    return _decoded(path, count, last)


def _decoded(path: Path, count: int | None, last: bool) -> tuple[np.ndarray, float]:
    kept: collections.deque[np.ndarray] = collections.deque(maxlen=count if last else None)
    try:
        with av.open(str(path)) as f:
            if not f.streams.video:
                raise MediaError(f"{path} has no video stream.")
            stream = f.streams.video[0]
            for frame in f.decode(stream):
                kept.append(frame.to_ndarray(format="rgb24"))
                if not last and len(kept) == count:
                    break
            return np.stack(kept), float(stream.average_rate or 0)
    except (av.error.FFmpegError, ValueError) as e:
        raise e if isinstance(e, MediaError) else MediaError(f"{path} is not a video that can be decoded.") from None


def read_wave(path: str | Path) -> tuple[np.ndarray, int]:
    """A sound (or video) file → (float32 [channels,N], samples per second), as recorded."""
    try:
        with av.open(str(_existing(path, "sound"))) as f:
            if not f.streams.audio:
                raise MediaError(f"{path} has no sound.")
            stream = f.streams.audio[0]
            planar = av.AudioResampler(format="fltp")
            pieces = [p.to_ndarray() for x in f.decode(stream) for p in planar.resample(x)]
            return np.concatenate(pieces, 1).astype(np.float32), stream.rate
    except (av.error.FFmpegError, ValueError) as e:
        raise e if isinstance(e, MediaError) else MediaError(f"{path} is not a sound that can be decoded.") from None


def read_sound(path: str | Path, rate: int) -> np.ndarray:
    """A sound (or video) file → float32 [2,N] at `rate` Hz."""
    try:
        with av.open(str(_existing(path, "sound"))) as f:
            if not f.streams.audio:
                raise MediaError(f"{path} has no sound.")
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
            pieces = [p for x in f.decode(f.streams.audio[0]) for p in resampler.resample(x)]
            pieces += resampler.resample(None)
            return np.concatenate([p.to_ndarray() for p in pieces], 1).astype(np.float32)
    except av.error.InvalidDataError:
        raise MediaError(f"{path} is not a sound file that can be decoded.") from None


def read_actions(path: str | Path) -> np.ndarray:
    """JSON {"actions": [[…], …]} or a bare list → float32 [rows,width]."""
    try:
        return embodiments.read_actions(_existing(path, "actions"))
    except ValueError as e:
        raise e if isinstance(e, MediaError) else MediaError(str(e)) from None
