"""Pictures of the table, and the way back from a picture to positions.

In: states. Out: uint8 frames [T,48,48,3]; and from frames: where each colour is (also in a blurry generated frame).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.toy_world.world import COLOURS, PALM, RADIUS, State

SIZE = 48
TABLE = np.array([205, 205, 205], np.float32)
RGB = {"red": (220, 30, 30), "green": (20, 170, 40), "blue": (30, 60, 230), "yellow": (240, 205, 20)}
MARK = {1: (250, 250, 250), 2: (20, 20, 20)}  # the centre of glass is white, of steel black; wood is plain
GRIPPER = np.array([150, 30, 190], np.float32)  # purple: far from every puck
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
_CENTRES = np.stack([(_X + 0.5) / SIZE, 1 - (_Y + 0.5) / SIZE])  # [2, 48, 48] in table units


def pixels(pos: np.ndarray) -> np.ndarray:
    """Table coordinates [..., 2] → pixel (column, row) [..., 2]."""
    return np.stack([pos[..., 0] * SIZE - 0.5, (1 - pos[..., 1]) * SIZE - 0.5], -1).astype(np.float32)


def render(states: Sequence[State]) -> np.ndarray:
    """[T,48,48,3] uint8. Antialiased by distance fields; the gripper over the pucks."""
    t = len(states)
    frame = np.broadcast_to(TABLE, (t, SIZE, SIZE, 3)).copy()
    for i, (colour, material) in enumerate(zip(states[0].colours, states[0].materials, strict=True)):
        at = np.array([s.pos[i] for s in states], np.float32)
        r = _distance(at)
        _paint(frame, RADIUS - r, np.array(RGB[COLOURS[colour]], np.float32))
        if material in MARK:
            _paint(frame, 0.04 - r, np.array(MARK[material], np.float32))
    _draw_gripper(frame, states)
    return (frame + 0.5).astype(np.uint8)


def _draw_gripper(frame: np.ndarray, states: Sequence[State]) -> None:
    """A palm and two fingers along the heading: apart when open, together when closed."""
    pose = np.array([s.gripper for s in states], np.float32)
    gap = np.array([0.066 if s.open else 0.03 for s in states], np.float32)
    at, c, s = pose[:, :2], np.cos(pose[:, 2]), np.sin(pose[:, 2])
    d = _CENTRES[None] - at[:, :, None, None]
    u = d[:, 0] * c[:, None, None] + d[:, 1] * s[:, None, None]  # along the heading
    v = -d[:, 0] * s[:, None, None] + d[:, 1] * c[:, None, None]
    _paint(frame, PALM - np.hypot(u + 0.02, v), GRIPPER)
    across = np.abs(np.abs(v) - gap[:, None, None])
    finger = np.maximum(np.abs(u - 0.04) - 0.055, across - 0.02)
    _paint(frame, -finger, GRIPPER)


def _distance(at: np.ndarray) -> np.ndarray:
    return np.hypot(_CENTRES[0] - at[:, 0, None, None], _CENTRES[1] - at[:, 1, None, None])


def _paint(frame: np.ndarray, inside: np.ndarray, colour: np.ndarray) -> None:
    """Blend `colour` where the signed distance `inside` [T,48,48] is positive; the edge is two pixels wide."""
    alpha = np.clip(inside * (SIZE / 2) + 0.5, 0, 1)[..., None]
    frame += alpha * (colour - frame)


def locate(frames: np.ndarray, colour: str, least: float = 4.0) -> np.ndarray:
    """Pixel centroid (column, row) of a puck colour in uint8 frames [T,48,48,3] → [T,2]; NaN where it is absent."""
    return _centroid(frames, np.array(RGB[colour], np.float32), least)


def locate_gripper(frames: np.ndarray, least: float = 4.0) -> np.ndarray:
    """Pixel centroid of the gripper [T,2]; NaN where it is absent. Its fingers put it ahead of the pose."""
    return _centroid(frames, GRIPPER, least)


def _centroid(frames: np.ndarray, colour: np.ndarray, least: float) -> np.ndarray:
    """Weight of a pixel: how far it lies from the table towards the colour, less how far beside that line.

    So a pale blur of the right hue counts, a full spot of another hue does not. Mean shift then ignores stray pixels.
    """
    towards = colour - TABLE
    length = np.linalg.norm(towards)
    d = frames.astype(np.float32) - TABLE
    along = d @ towards / length**2
    beside = np.linalg.norm(d - along[..., None] * towards, axis=-1) / length
    weight = np.clip(along - 1.2 * beside - 0.15, 0, 1)
    out = np.full((len(frames), 2), np.nan, np.float32)
    for t, w in enumerate(weight):
        if w.sum() < least:
            continue
        smooth = _box(w, 5)
        row, col = np.unravel_index(smooth.argmax(), smooth.shape)
        c = np.array([col, row], np.float32)
        for _ in range(4):
            near = w * (np.hypot(_X - c[0], _Y - c[1]) < 2.0 * RADIUS * SIZE)
            c = np.array([(near * _X).sum(), (near * _Y).sum()]) / max(near.sum(), 1e-6)
        out[t] = c
    return out


def _box(x: np.ndarray, k: int) -> np.ndarray:
    """Sum over k×k windows."""
    s = np.pad(x, k // 2).cumsum(0).cumsum(1)
    s = np.pad(s, ((1, 0), (1, 0)))
    return s[k:, k:] - s[:-k, k:] - s[k:, :-k] + s[:-k, :-k]
