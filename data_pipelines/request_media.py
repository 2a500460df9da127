"""Media files of a request: found, and looked at just enough to know that they can be used.

In: what a request says (a path beside it, or a URL whose file is already here). Out: `Media`: kind, size, frames. Never
downloads; decodes an image, but only one frame of a video or sound. A file that cannot be used is a `Wrong`.
"""

from __future__ import annotations

import json
import os
import urllib.parse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import PIL.Image

from data_pipelines.request_values import Wrong, show, tame

KINDS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), "image"),
    **dict.fromkeys((".mp4", ".mov", ".mkv", ".webm", ".avi"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a"), "sound"),
    ".json": "actions",
}
PICTURES = ("PNG", "JPEG", "WEBP")  # whatever the extension says, Pillow may read these and no others
DEMUXER = {".mkv": "matroska", ".webm": "matroska", ".m4a": "mp4"}  # FFmpeg's name, where it is not the extension
REMEDY = {"vision_path": "--image or --video", "action_path": "--actions", "sound_path": "--sound_file"}
MOST_PIXELS = 50_000_000  # of one picture; the largest canvas has one million
MOST_STRETCHED = 200
MOST_FRAMES = 5001  # counted; nothing needs more
MOST_ACTIONS = 8 << 20  # bytes


@dataclass(frozen=True)
class Media:
    """A file that can be read."""

    path: Path
    kind: str  # image | video | sound | actions
    frames: int  # of a video (counted up to MOST_FRAMES); rows of actions; 1 for an image
    height: int = 0
    width: int = 0  # in pixels; numbers per row of actions
    fps: float = 0.0  # of a video; samples per second of a sound


def is_url(said: str) -> bool:
    return "://" in said[:12]


def kind_of(said: str, kinds: tuple[str, ...]) -> str:
    """Which of the kinds (image, video, sound, actions) a file is, by its extension. `Wrong` if it is none of them."""
    suffix = Path(_file_name(said) if is_url(said) else said).suffix.lower()
    if KINDS.get(suffix) not in kinds:
        known = ", ".join(x for x, kind in KINDS.items() if kind in kinds)
        raise Wrong(f"is {show(said)}, not a file of {' or '.join(kinds)} ({known}); name such a file")
    return KINDS[suffix]


def find(said: str, key: str, folder: Path, media: Path | None) -> Path:
    """The file: below `folder` for a path, anywhere below `media` for a URL (by its file name). `Wrong` otherwise.

    key: who asks, for the remedy.
    """
    option = f", or give {REMEDY[key]}" if key in REMEDY else ""
    try:
        if is_url(said):
            return _find_url(said, option, media)
        path = folder / Path(said).expanduser()
        if path.is_dir():
            raise Wrong(f"is {show(said)}, a folder; name a file in it")
        if not path.exists():
            start = "where you are" if folder == Path() else "at the request's folder"
            raise Wrong(f"names {show(said)}, which does not exist; check it (paths start {start}){option}")
        if not path.is_file():
            raise Wrong(f"is {show(said)}, which is not a regular file; copy its content into one")
        return path.absolute()
    except (OSError, RuntimeError) as e:  # names too long, folders that may not be read, no home for '~'
        raise Wrong(f"names {show(said)}, which cannot be opened ({_reason(e)}); check the path{option}") from None


def _file_name(url: str) -> str:
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]
    except ValueError:  # such as an unclosed [ in the host
        raise Wrong(f"is {show(url)}, which is not a URL; write a path or https://…") from None


def _find_url(url: str, option: str, media: Path | None) -> Path:
    want = _file_name(url)
    if not want:
        raise Wrong(f"is {show(url)}, a URL without a file name; write a path instead")
    if media is None:
        remedy = f"download {want} and give its folder as --media{option}"
        raise Wrong(f"is a URL, and nothing is downloaded here; {remedy}")
    if not media.is_dir():
        raise Wrong(f"is looked up in --media={media}, which is not a folder; name the folder with {want}")
    found = _names(media.absolute()).get(want, ())
    if not found:
        raise Wrong(f"needs {want}, which is nowhere below --media={media}; download it to there{option}")
    if len({p.stat().st_size for p in found}) > 1:
        raise Wrong(f"needs {want}, but --media={media} has different files of that name; keep one")
    return found[0]


@lru_cache(maxsize=4)
def _names(media: Path) -> dict[str, list[Path]]:
    """File name → the files below `media` that have it."""
    names: dict[str, list[Path]] = {}
    for folder, _, files in os.walk(media):
        for f in sorted(files):
            names.setdefault(f, []).append(Path(folder, f))
    return names


def forget() -> None:
    """Look into the folders anew: a file may have been downloaded since the last request file was read."""
    _names.cache_clear()


def _reason(e: BaseException) -> str:
    return " ".join((getattr(e, "strerror", None) or str(e) or type(e).__name__).split())[:100]


def probe(path: Path) -> Media:
    """Look at a file. `Wrong` if it is empty, cut off, too large, or not what its extension says."""
    suffix = path.suffix.lower()
    kind, demuxer = KINDS[suffix], DEMUXER.get(suffix, suffix[1:])
    try:
        if not path.stat().st_size:
            raise Wrong(f"is {path.name}, an empty file; copy it again")
        if kind == "image":
            return _image(path)
        if kind == "video":
            return _video(path, demuxer)
        if kind == "sound":
            return _sound(path, demuxer)
        return _actions(path)
    except Wrong:
        raise
    except PIL.Image.DecompressionBombError:
        raise Wrong(f"is {path.name}, which unfolds to far too many pixels; use another file") from None
    except Exception as e:  # parsers of foreign bytes raise anything: struct.error, SyntaxError, zlib.error, FFmpeg's …
        word = "actions" if kind == "actions" else f"{'an' if kind == 'image' else 'a'} {kind}"
        raise Wrong(f"is {path.name}, which cannot be read as {word} ({_reason(e)}); check the file") from None


def _pixels(path: Path, width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        most = f"{MOST_PIXELS // 10**6} million"
        raise Wrong(f"is {path.name} of {width}×{height} pixels; use a file with some, and at most {most}")
    if max(width, height) > MOST_STRETCHED * min(width, height):
        raise Wrong(f"is {path.name} of {width}×{height} pixels, which is all edge; crop it")


def _image(path: Path) -> Media:
    with PIL.Image.open(path, formats=PICTURES) as picture:
        _pixels(path, *picture.size)
        picture.load()  # the only way to know that it is whole
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation: on its side
        width, height = picture.size[::-1] if turned else picture.size
    return Media(path, "image", 1, height, width)


def _video(path: Path, demuxer: str) -> Media:
    with av.open(str(path), format=demuxer) as f:  # one demuxer: others (playlists) would open further files or URLs
        if not f.streams.video:
            raise Wrong(f"is {path.name}, which has no pictures in it; use a video")
        stream = f.streams.video[0]
        _pixels(path, stream.codec_context.width, stream.codec_context.height)
        frame = next(f.decode(stream))
        promised, fps = stream.frames, float(stream.average_rate or stream.guessed_rate or 0)
        f.seek(0)
        packets = (p for p in f.demux(stream) if p.size and not p.is_corrupt)
        frames = sum(1 for _, _ in zip(packets, range(MOST_FRAMES), strict=False))
    if frames < min(promised, MOST_FRAMES):
        raise Wrong(f"is {path.name}, which promises {promised} frames but holds {frames}; copy it again")
    return Media(path, "video", frames, frame.height, frame.width, fps)


def _sound(path: Path, demuxer: str) -> Media:
    if demuxer == "wav":
        _whole_wave(path)
    with av.open(str(path), format=demuxer) as f:
        if not f.streams.audio:
            raise Wrong(f"is {path.name}, which has no sound in it; use a sound file")
        frame = next(f.decode(f.streams.audio[0]))
        channels, rate = frame.layout.nb_channels, frame.sample_rate
    if channels > 2:
        raise Wrong(f"is {path.name} with {channels} channels; mix it down to one or two")
    return Media(path, "sound", 1, fps=float(rate))


def _whole_wave(path: Path) -> None:
    """`Wrong` if a file ends before its header says; FFmpeg would read what is left of it without a word."""
    with path.open("rb") as f:
        head = f.read(8)
    promised, size = int.from_bytes(head[4:], "little") + 8, path.stat().st_size
    streamed = promised in (8, 7 + 2**32)  # nobody knew the length when the header was written
    if head[:4] == b"RIFF" and not streamed and size + 1 < promised:  # some writers count a byte of padding
        raise Wrong(f"is {path.name}, which promises {promised} bytes but holds {size}; copy it again")


def _actions(path: Path) -> Media:
    rows = read_actions(path)
    return Media(path, "actions", len(rows), width=rows.shape[1])


def read_actions(path: Path) -> np.ndarray:
    """JSON [[…], …] or {"actions": [[…], …]} → float32 [rows, width], finite. `Wrong` otherwise."""
    if path.stat().st_size > MOST_ACTIONS:
        raise Wrong(f"is {path.name} of {path.stat().st_size >> 20} MiB; actions of one chunk take kilobytes")
    try:
        data = json.loads(path.read_bytes())
        tame(data)
    except (ValueError, RecursionError) as e:
        what = e.what if isinstance(e, Wrong) else "is not JSON; write [[…], …]"
        raise Wrong(f"is {path.name}, which {what}") from None
    rows = data.get("actions") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not rows or not all(isinstance(r, list) and r for r in rows):
        raise Wrong(f"is {path.name}, which holds no list of rows [[…], …]; write one row of numbers per step")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise Wrong(
                f"is {path.name}, whose rows 0 and {i} have {len(rows[0])} and {len(row)} numbers; make them equal"
            )
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e30 for x in row):
            raise Wrong(f"is {path.name}, whose row {i} holds something that is not a number; write numbers")
    return np.asarray(rows, np.float32)
