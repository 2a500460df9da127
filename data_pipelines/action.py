"""Actions: rigid poses ↔ relative 10-D vectors, and their normalisation.

In: poses or raw actions. Out: normalised actions for the model, and back. Layout of one arm (spec model.md §8.2):
[Δt (3), rot6d (6), gripper (1)], ΔT_i = T_i⁻¹ T_{i+1}; rot6d = first then second column of the rotation.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

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


@dataclass(frozen=True)
class ActionStats:
    """Per-channel 1 % and 99 % quantiles of raw actions: normalised = (raw − (hi+lo)/2) / max((hi−lo)/2, floor).

    The floor keeps constant channels at 0 (spec model.md §8.4, scale_floor).
    """

    lo: tuple[float, ...]
    hi: tuple[float, ...]
    floor: float = 1e-2

    @classmethod
    def fit(cls, actions: np.ndarray, floor: float = 1e-2) -> ActionStats:
        lo, hi = np.quantile(actions.reshape(-1, actions.shape[-1]).astype(np.float64), [0.01, 0.99], axis=0)
        return cls(tuple(lo.round(6).tolist()), tuple(hi.round(6).tolist()), floor)

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        lo, hi = np.asarray(self.lo), np.asarray(self.hi)
        return (hi + lo) / 2, np.maximum((hi - lo) / 2, self.floor)

    def normalise(self, raw: np.ndarray) -> np.ndarray:
        """Raw [..., width] → float32 about −1 … 1. ValueError for a wrong width, NaN, or values far outside."""
        self._check(raw, "raw actions")
        offset, scale = self._affine()
        x = ((raw - offset) / scale).astype(np.float32)
        if np.abs(x).max(initial=0) > LIMIT:
            raise ValueError(
                f"raw actions reach {np.abs(x).max():.1f} after normalising (limit {LIMIT}): these statistics do not "
                "belong to this data, or the actions are already in other units; pass raw actions of the same dataset."
            )
        return x

    def denormalise(self, x: np.ndarray) -> np.ndarray:
        """Normalised [..., width] → raw float32."""
        self._check(x, "normalised actions")
        offset, scale = self._affine()
        return (x * scale + offset).astype(np.float32)

    def _check(self, x: np.ndarray, what: str) -> None:
        if x.shape[-1] != len(self.lo):
            raise ValueError(f"{what} have {x.shape[-1]} channels, the statistics {len(self.lo)}; pass {len(self.lo)}.")
        if not np.isfinite(x).all():
            raise ValueError(f"{what} hold NaN or infinity; repair or drop them.")

    def save(self, path: str | pathlib.Path) -> None:
        pathlib.Path(path).write_text(json.dumps({"q01": self.lo, "q99": self.hi, "floor": self.floor}))

    @classmethod
    def load(cls, path: str | pathlib.Path) -> ActionStats:
        path = pathlib.Path(path)
        if not path.exists():
            raise ValueError(f"action statistics {path} do not exist; actions cannot be normalised without them.")
        d = json.loads(path.read_text())
        return cls(tuple(d["q01"]), tuple(d["q99"]), d["floor"])
