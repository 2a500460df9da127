"""Actions: rigid poses ↔ relative 10-D vectors, and their normalisation.

In: poses or raw actions. Out: normalised actions for the model, and back. Layout of one arm (spec model.md §8.2):
[Δt (3), rot6d (6), gripper (1)], ΔT_i = T_i⁻¹ T_{i+1}; rot6d = first then second column of the rotation.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

WIDTH = 10
LIMIT = 5.0  # |normalised action| beyond this means that the statistics do not belong to the data


def pose(x: np.ndarray, y: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Planar poses → [..., 4, 4] float64 (z = 0, rotation about z)."""
    x, y, yaw = np.broadcast_arrays(x, y, yaw)
    t = np.zeros((*x.shape, 4, 4))
    c, s = np.cos(yaw), np.sin(yaw)
    t[..., 0, 0], t[..., 0, 1], t[..., 1, 0], t[..., 1, 1] = c, -s, s, c
    t[..., 2, 2] = t[..., 3, 3] = 1.0
    t[..., 0, 3], t[..., 1, 3] = x, y
    return t


def relative(poses: np.ndarray) -> np.ndarray:
    """[N+1,4,4] → [N,4,4]: ΔT_i = T_i⁻¹ T_{i+1} ("backward_framewise")."""
    return np.linalg.solve(poses[:-1], poses[1:])


def rot6d(rotation: np.ndarray) -> np.ndarray:
    """[..., 3, 3] → [..., 6]: first column, then second."""
    return np.concatenate([rotation[..., :, 0], rotation[..., :, 1]], -1)


def rotation(rot6d: np.ndarray) -> np.ndarray:
    """[..., 6] → [..., 3, 3], projected onto SO(3) by SVD; the third column is the cross product."""
    a, b = rot6d[..., :3], rot6d[..., 3:]
    u, _, vt = np.linalg.svd(np.stack([a, b, np.cross(a, b)], -1))
    fix = np.ones((*u.shape[:-2], 3))
    fix[..., 2] = np.linalg.det(u @ vt)
    return (u * fix[..., None, :]) @ vt


def encode(poses: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """poses [N+1,4,4], gripper [N] (1 open, 0 closed) → raw actions [N,10] float32."""
    d = relative(poses)
    return np.concatenate([d[:, :3, 3], rot6d(d[:, :3, :3]), gripper[:, None]], -1).astype(np.float32)


def decode(actions: np.ndarray) -> np.ndarray:
    """Raw actions [N,10] → relative transforms [N,4,4]."""
    t = np.tile(np.eye(4), (len(actions), 1, 1))
    t[:, :3, 3], t[:, :3, :3] = actions[:, :3], rotation(actions[:, 3:9].astype(np.float64))
    return t


METHODS = {  # how raw actions become −1 … 1: the lists of a statistics file that it takes
    "quantile": ("q01", "q99"),
    "quantile_rot": ("q01", "q99"),
    "quantile_rot_scale_floor": ("q01", "q99", "min", "max"),  # widened until the extremes fit the limit
    "asinh_rot": ("q01", "q99"),  # then asinh(z) / asinh(1): far values are compressed, not lost
    "piecewise_asinh_rot": ("q01", "q99"),  # the same beyond ±1 only
    "minmax": ("min", "max"),
    "meanstd": ("mean", "std"),
}
TINY = 1e-8  # the least spread that is divided by, in statistics read from files


@dataclass(frozen=True)
class ActionStats:
    """Per-channel statistics: normalised = (raw − (hi+lo)/2) / max((hi−lo)/2, floor), bent by the asinh methods.

    lo and hi become ∓1: the 1 % and 99 % quantiles, the extremes, or mean ∓ deviation, by method. The floor keeps
    constant channels at 0 (spec model.md §8.4, training.md §2.6). Arithmetic is float32, the framework's
    (cosmos-framework, data/generator/action/utils/action_processing.py).
    """

    lo: tuple[float, ...]
    hi: tuple[float, ...]
    floor: float = 1e-2
    method: str = "quantile"
    clamp: bool = False  # cut beyond ±1, which loses it, instead of refusing beyond LIMIT
    source: str = field(default="", compare=False)  # file and digest

    @classmethod
    def fit(cls, actions: np.ndarray, floor: float = 1e-2) -> ActionStats:
        flat = actions.reshape(-1, actions.shape[-1]).astype(np.float64)
        lo, hi = np.quantile(flat, [0.01, 0.99], axis=0).round(6).astype(np.float32)  # what `load` will read
        return cls(tuple(lo.tolist()), tuple(hi.tolist()), floor)

    @property
    def width(self) -> int:
        return len(self.lo)

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        lo, hi = np.asarray(self.lo), np.asarray(self.hi)
        return ((hi + lo) / 2).astype(np.float32), np.maximum((hi - lo) / 2, self.floor).astype(np.float32)

    def normalise(self, raw: np.ndarray) -> np.ndarray:
        """Raw [..., width] → float32 about −1 … 1. ValueError for a wrong width, NaN, or values far outside."""
        self._check(raw, "raw actions")
        offset, scale = self._affine()
        x = _bend((raw.astype(np.float32) - offset) / scale, self.method)
        if self.clamp:
            return x.clip(-1, 1)
        if np.abs(x).max(initial=0) > LIMIT * (1 + 1e-5):
            raise ValueError(
                f"raw actions reach {np.abs(x).max():.1f} after normalising (limit {LIMIT}): these statistics do not "
                "belong to this data, or the actions are already in other units; pass raw actions of the same dataset."
            )
        return x

    def denormalise(self, x: np.ndarray) -> np.ndarray:
        """Normalised [..., width] → raw float32. What `clamp` cut stays cut."""
        self._check(x, "normalised actions")
        offset, scale = self._affine()
        return _unbend(x.astype(np.float32), self.method) * scale + offset

    def first(self, width: int) -> ActionStats:
        """The statistics of the first channels: one arm of two."""
        return replace(self, lo=self.lo[:width], hi=self.hi[:width])

    def record(self) -> dict[str, Any]:
        """What was used, for JSON."""
        return asdict(self) | {"limit": None if self.clamp else LIMIT}

    def _check(self, x: np.ndarray, what: str) -> None:
        if x.shape[-1] != self.width:
            raise ValueError(f"{what} have {x.shape[-1]} channels, the statistics {self.width}; pass {self.width}.")
        if not np.isfinite(x).all():
            raise ValueError(f"{what} hold NaN or infinity; repair or drop them.")

    def save(self, path: str | pathlib.Path) -> None:
        """What `fit` found."""
        pathlib.Path(path).write_text(json.dumps({"q01": self.lo, "q99": self.hi, "floor": self.floor}))

    @classmethod
    def load(cls, path: str | pathlib.Path, method: str = "quantile", *, clamp: bool = False) -> ActionStats:
        """Read a file: flat {"q01": [..], "q99": [..], ..}, or such blocks: {"global": {..}, "global_raw": {..}}.

        global_raw, which the methods with "rot" in their name read, has the statistics of rotations too; in global they
        are −1 and 1, so that they stay as they are. ValueError if the file is missing, no JSON, or lacks something.
        """
        if method not in METHODS:
            raise ValueError(f"action normalisation {method!r} is not known; it is {', '.join(METHODS)}.")
        path = pathlib.Path(path)
        if not path.is_file():
            raise ValueError(f"action statistics {path} do not exist; actions cannot be normalised without them.")
        data = path.read_bytes()
        try:
            d = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"action statistics {path} are not JSON ({e}).") from e
        block = d.get("global_raw" if "rot" in method else "global", d) if isinstance(d, dict) else None
        lists = [_numbers(block, name, path) for name in METHODS[method]]
        if len({len(x) for x in lists}) > 1:
            raise ValueError(f"action statistics {path}: {', '.join(METHODS[method])} differ in length.")
        lo, hi = _ends(method, *lists)
        if (lo > hi).any():
            raise ValueError(f"action statistics {path}: channel {int((lo > hi).argmax())} ends before it begins.")
        floor = d.get("floor", TINY if method == "meanstd" else TINY / 2)
        if not isinstance(floor, (int, float)) or not floor > 0:
            raise ValueError(f"action statistics {path}: the floor must be a positive number, got {floor!r}.")
        source = f"{path.name} sha256:{hashlib.sha256(data).hexdigest()[:16]}"
        return cls(tuple(lo.tolist()), tuple(hi.tolist()), float(floor), method, clamp, source)


def _numbers(block: Any, name: str, path: pathlib.Path) -> np.ndarray:
    """A list of a statistics file, at the precision the framework reads it in: float32."""
    values = block.get(name) if isinstance(block, dict) else None
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and abs(v) < 1e30 for v in values):
        raise ValueError(f"action statistics {path} have no list of numbers {name!r}.")
    return np.asarray(values, np.float32)


def _ends(method: str, a: np.ndarray, b: np.ndarray, *extremes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What becomes −1 and 1, float64: exact sums of float32 numbers."""
    if method == "meanstd":
        return a.astype(np.float64) - b, a.astype(np.float64) + b
    if extremes:
        middle = (b + a) / np.float32(2)
        reach = np.maximum(*(np.abs(x - middle) for x in extremes)) / np.float32(LIMIT)
        half = np.maximum((b - a) / np.float32(2), reach).astype(np.float64)
        return middle - half, middle + half
    return a.astype(np.float64), b.astype(np.float64)


def _bend(z: np.ndarray, method: str) -> np.ndarray:
    if method == "asinh_rot":
        return np.arcsinh(z) / np.float32(math.asinh(1))
    if method == "piecewise_asinh_rot":
        return np.where(np.abs(z) <= 1, z, np.sign(z) * (1 + np.arcsinh(np.abs(z) - 1)))
    return z


def _unbend(y: np.ndarray, method: str) -> np.ndarray:
    if method == "asinh_rot":
        return np.sinh(y * np.float32(math.asinh(1)))
    if method == "piecewise_asinh_rot":
        return np.where(np.abs(y) <= 1, y, np.sign(y) * (1 + np.sinh(np.abs(y) - 1)))
    return y
