"""From captions, frames and waveforms to things that can be compared. numpy only; nothing here knows a model.

Positions are pixels (column, row), times seconds.
"""

from __future__ import annotations

import re

import numpy as np

from data_pipelines.toy_world.render import SIZE, locate, locate_gripper
from data_pipelines.toy_world.sound import onsets
from data_pipelines.toy_world.world import COLOURS, MATERIALS, RADIUS

LOST = SIZE / 2  # px: the error of an object that a generated frame does not show, and the largest there is
VISIBLE = float(np.pi * (RADIUS * SIZE) ** 2 / 4)  # pixels of a colour, a quarter of a puck, that make it "shown"
VERBS = ("carries", "grasps", "pushes", "slides", "moves")
WAYS = ("left", "right", "up", "down")
SLOTS = ("verb", "colour", "material", "direction", "first impact", "time of impact")


def slots(caption: str) -> tuple[str, ...]:
    """What a caption says, one entry per SLOTS; "" where it is silent."""
    sentences = [s.rstrip(".") for s in re.split(r"(?<=\.)\s+", caption.strip())] or [""]
    words = sentences[0].lower().split()
    found = [next((w for w in words if w in kind), "") for kind in (VERBS, COLOURS, MATERIALS)]
    way = words[-1] if words and words[-1] in WAYS else ""
    hit = re.fullmatch(r"(.+) at (\d+\.\d) s", sentences[1]) if len(sentences) > 1 else None
    return (*found, way, *(hit.groups() if hit else ("", "")))


def colours_named(caption: str) -> list[str]:
    """Every puck colour that a caption mentions."""
    words = re.findall(r"[a-z]+", caption.lower())
    return [c for c in COLOURS if c in words]


def shows(picture: np.ndarray, colour: str) -> bool:
    """Is a puck of this colour in the picture? uint8 [H,W,3]."""
    return bool(np.isfinite(locate(picture[None], colour, least=VISIBLE)).all())


def track(video: np.ndarray, colours, least: float = 4.0) -> np.ndarray:
    """Where everything is in a video uint8 [T,H,W,3]: [T, 1+n, 2], gripper first; NaN where it is not seen.

    least: pixels that must be seen. The truth is judged with VISIBLE, so that a puck hidden by the hand asks nothing.
    """
    return np.stack([locate_gripper(video), *(locate(video, c, least) for c in colours)], 1)


def distance(guess: np.ndarray, true: np.ndarray) -> np.ndarray:
    """[..., 2] px → [...]: at most LOST; LOST where the guess shows nothing, NaN where the truth shows nothing."""
    d = np.minimum(np.linalg.norm(guess - true, axis=-1), LOST)
    return np.where(np.isnan(true).any(-1), np.nan, np.where(np.isnan(guess).any(-1), LOST, d))


def moving(true: np.ndarray, given: int, least: float = 3.0) -> np.ndarray:
    """Which objects of a track [T,n,2] leave their place of frame given−1 by more than `least` px. [n] bool."""
    away = np.linalg.norm(true[given:] - true[given - 1], axis=-1)
    return np.nan_to_num(away).max(0) > least


def first_onset(wave: np.ndarray) -> float:
    """When the first impact is heard in float32 [2,N]; NaN in silence."""
    found = onsets(wave)
    return float(found[0]) if found else np.nan


def seen_impact(pucks: np.ndarray, fps: float, least: float = 1.0) -> float:
    """When any puck of a track [T,n,2] changes its velocity most; NaN if by less than `least` px/frame²."""
    change = np.nan_to_num(np.linalg.norm(np.diff(pucks, n=2, axis=0), axis=-1)).max(1, initial=0.0)
    return float(1 + change.argmax()) / fps if change.max() > least else np.nan


def nearest(time: float, onsets: list[float]) -> float:
    """Seconds from `time` to the nearest onset; NaN if there is neither."""
    return min((abs(time - t) for t in onsets), default=np.nan)


def onset_error(heard: np.ndarray, true: np.ndarray, penalty: float) -> np.ndarray:
    """|heard − true|; `penalty` where nothing was heard (NaN)."""
    return np.where(np.isnan(heard), penalty, np.abs(heard - true))
