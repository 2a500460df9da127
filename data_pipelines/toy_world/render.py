"""Pictures of the table, and the way back from a picture to positions.

In: states. Out: uint8 frames [T,SIZE,SIZE,3]; and from frames: where each colour is (also in a blurry generated frame).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.toy_world.world import COLOURS, RADIUS, State

SIZE = 48
TABLE = np.array([205, 205, 205], np.float32)
RGB = {"red": (220, 30, 30), "green": (20, 170, 40), "blue": (30, 60, 230), "yellow": (240, 205, 20)}
MARK = {1: (250, 250, 250), 2: (20, 20, 20)}  # the centre of glass is white, of steel black; wood is plain
GRIPPER = np.array([150, 30, 190], np.float32)  # purple: far from every puck
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
HAND = 0.1  # radius of the drawn palm; the one that touches is PALM
MARGIN = 10  # pixels around the picture, so that no window is cut at its edge
PUCK_WINDOW, GRIPPER_WINDOW = SIZE // 6, SIZE // 5 + 1  # half sides that hold the drawn thing and its soft edge


def pixels(pos: np.ndarray) -> np.ndarray:
    """Table coordinates [..., 2] → pixel (column, row) [..., 2]."""
    return np.stack([pos[..., 0] * SIZE - 0.5, (1 - pos[..., 1]) * SIZE - 0.5], -1).astype(np.float32)


def render(states: Sequence[State]) -> np.ndarray:
    """[T,SIZE,SIZE,3] uint8. Antialiased by distance fields; the gripper over the pucks."""
    side = SIZE + 2 * MARGIN
    frame = np.broadcast_to(TABLE, (len(states), side, side, 3)).copy()
    for i, (colour, material) in enumerate(zip(states[0].colours, states[0].materials, strict=True)):
        where, d = _window(np.array([s.pos[i] for s in states], np.float32), PUCK_WINDOW)
        r = np.hypot(d[0], d[1])
        _paint(frame, where, RADIUS - r, np.array(RGB[COLOURS[colour]], np.float32))
        if material in MARK:
            _paint(frame, where, 0.055 - r, np.array(MARK[material], np.float32))
    _draw_gripper(frame, states)
    return (frame[:, MARGIN:-MARGIN, MARGIN:-MARGIN] + 0.5).astype(np.uint8)


def _draw_gripper(frame: np.ndarray, states: Sequence[State]) -> None:
    """A palm and two fingers along the heading: apart when open, together when closed. Drawn larger than it pushes."""
    pose = np.array([s.gripper for s in states], np.float32)
    gap = np.array([0.09 if s.open else 0.05 for s in states], np.float32)[:, None, None]
    c, s = np.cos(pose[:, 2])[:, None, None], np.sin(pose[:, 2])[:, None, None]
    where, d = _window(pose[:, :2], GRIPPER_WINDOW)
    u, v = d[0] * c + d[1] * s, -d[0] * s + d[1] * c  # along the heading, and across it
    finger = np.maximum(np.abs(u - 0.06) - 0.08, np.abs(np.abs(v) - gap) - 0.045)
    _paint(frame, where, HAND - np.hypot(u + 0.02, v), GRIPPER)
    _paint(frame, where, -finger, GRIPPER)


def _window(at: np.ndarray, half: int) -> tuple[tuple, tuple]:
    """Table points [T,2] → index of the (2·half+1)² pixels around each, and their offset (x, y) from it, [T,k,k]."""
    col, row = np.rint(pixels(at)).astype(int).T[:, :, None] + np.arange(-half, half + 1)
    x = (col + np.float32(0.5)) / np.float32(SIZE) - at[:, :1]
    y = 1 - (row + np.float32(0.5)) / np.float32(SIZE) - at[:, 1:]
    frames = np.arange(len(at))[:, None, None]
    return (frames, row[:, :, None] + MARGIN, col[:, None, :] + MARGIN), (
        x[:, None, :].astype(np.float32), y[:, :, None].astype(np.float32),
    )  # fmt: skip


def _paint(frame: np.ndarray, where: tuple, inside: np.ndarray, colour: np.ndarray) -> None:
    """Blend `colour` into a window where the signed distance `inside` is positive; the edge is two pixels wide."""
    alpha = np.clip(inside * (SIZE / 2) + 0.5, 0, 1)[..., None]
    below = frame[where]
    frame[where] = below + alpha * (colour - below)


def locate(frames: np.ndarray, colour: str, least: float = 4.0) -> np.ndarray:
    """Pixel centroid (column, row) of a puck colour in uint8 frames [T,SIZE,SIZE,3] → [T,2]; NaN where it is absent."""
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
