"""What a command leaves behind: pictures, clips with their sound, waves, actions, text, and run.json.

In: arrays. Out: files in a folder. A file gets its name when it is complete, so an interrupted run leaves no half of
one; run.json is written last and names the others with their hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_jax import media

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av", "pillow", "tokenizers")
RECORD = "run.json"


def write(
    out: Path, *, video: np.ndarray | None = None, sound: np.ndarray | None = None, actions: np.ndarray | None = None,
    text: str | None = None, fps: float = 24.0, rate: int = media.SOUND_RATE, units: str = "raw", scale: int = 1,
    crf: int = media.CRF,
) -> list[str]:  # fmt: skip
    """Whatever there is, as image.png or video.mp4 (with its sound), sound.wav, actions.json, answer.txt. Their names.

    video: uint8 [T,H,W,3], one frame makes a picture. sound: float32 [2,N] at `rate` Hz. actions: [rows,width], in
    `units`. crf: of H.264, smaller is better.
    """
    out.mkdir(parents=True, exist_ok=True)
    files: list[str] = []

    @contextlib.contextmanager
    def file(name: str) -> Iterator[Path]:
        with appearing(out / name) as partial:
            yield partial
        files.append(name)

    if video is not None and len(video) == 1:
        with file("image.png") as path:
            media.write_png(path, video[0], scale)
    elif video is not None:
        with file("video.mp4") as path:
            media.write_mp4(path, video, fps, sound, rate, scale, crf)
    if sound is not None:
        with file("sound.wav") as path:
            media.write_wav(path, sound, rate)
    if actions is not None:
        with file("actions.json") as path:
            media.write_actions(path, actions, fps, units)
    if text is not None:
        with file("answer.txt") as path:
            path.write_text(text + "\n", encoding="utf-8")
    return files


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write; it becomes `path` when it is complete, and is removed after an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def record(out: Path, report: Mapping[str, Any], files: list[str]) -> None:
    """Write run.json: the report, the files with their hashes, versions and machine."""
    hashes = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}
    whole = {**report, "files": hashes, "versions": versions(), "machine": machine()}
    with appearing(out / RECORD) as path:
        path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def machine() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {"host": platform.node(), "device": devices[0].device_kind, "devices": len(devices)}


def peak_memory() -> dict[str, int]:
    """Bytes: the most that was ever in use on each kind of memory that tells."""
    import resource

    import jax

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {"host_bytes": host} | ({"device_bytes": max(peaks)} if peaks else {})
