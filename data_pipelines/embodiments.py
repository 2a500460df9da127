"""Whose body an action moves: names, numbers of the domain, widths; and actions prepared for the model.

In: a domain's name, raw actions, statistics. Out: normalised actions and a record of what was done to them. The table
is cosmos-framework's (data/generator/action/utils/domain_utils.py; spec model.md §8.1) with diffusers' names beside.
"""

from __future__ import annotations

import difflib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.action import LIMIT, ActionStats

WIDEST = 64  # channels of the released action heads


class Embodiment(NamedTuple):
    """One body. width None: it depends on the dataset; the actions or the request must say it."""

    name: str
    domain: int  # which of the model's 32 action projections
    width: int | None
    also: tuple[int, ...] = ()  # other widths in use


TABLE = {
    e.name: e
    for e in (
        Embodiment("no_action", 0, None),
        Embodiment("av", 1, 9),
        Embodiment("camera_pose", 2, 9),
        Embodiment("hand_pose", 3, None),
        Embodiment("pusht", 4, 2),
        Embodiment("libero", 5, None, (7, 10, 13)),
        Embodiment("umi", 6, 10),
        Embodiment("bridge_orig_lerobot", 7, 10),
        Embodiment("droid_lerobot", 8, 10, (8,)),  # 8: joints, of the released policy
        Embodiment("robomind-franka", 8, 10),
        Embodiment("embodiment_b", 9, 30),
        Embodiment("galbot", 9, 30),  # diffusers' name
        Embodiment("robomind-franka-dual", 12, 20),
        Embodiment("robomind-ur", 13, 10),
        Embodiment("agibotworld", 15, 29),
        Embodiment("embodiment_c_gripper", 15, 29),
        Embodiment("embodiment_c_gripper_ext", 15, 29),
        Embodiment("agibot_gear_gripper", 15, 29),  # diffusers' names
        Embodiment("agibot_gear_gripper_ext", 15, 29),
        Embodiment("xdof_yam", 16, 20),
        Embodiment("molmoact2_yam", 16, 20),
        Embodiment("abc_yam", 16, 20),
        Embodiment("robotwin", 17, 14),
        Embodiment("fractal", 20, 10),
        Embodiment("drawanything", 21, 3),
        Embodiment("behavior1k_lerobot", 22, 23),
        Embodiment("maniparena", 23, 20),
    )
}


def embodiment(name: str) -> Embodiment:
    """The row of a domain's name, in any case. ValueError, with the nearest name, if there is none."""
    key = str(name).lower().strip()
    if key not in TABLE:
        close = difflib.get_close_matches(key, TABLE, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"domain_name {name!r} is not known{hint}; the domains are {', '.join(TABLE)}.")
    return TABLE[key]


def width(body: Embodiment, given: int | None = None) -> int:
    """Channels of a raw action: the body's, checked against those of the actions or of the request.

    ValueError if nobody says it (libero, hand_pose), if they differ, and for no_action, which has none.
    """
    known = [n for n in (body.width, *body.also) if n is not None] or range(1, WIDEST + 1)
    those = f"1 to {WIDEST}" if len(known) > 9 else " or ".join(map(str, known))
    if not body.domain:
        raise ValueError(f"{body.name} has no actions; give the domain_name of a body.")
    if given is None and body.width is None:
        raise ValueError(f"{body.name} actions have {those} channels, by dataset; give raw_action_dim or the actions.")
    if given is not None and given not in known:
        raise ValueError(f"{body.name} actions have {those} channels, not {given}; check domain_name and the actions.")
    return body.width if given is None else given


def read_actions(path: str | pathlib.Path) -> np.ndarray:
    """A JSON file [[…], …] or {"actions": [[…], …]} → float32 [rows, width]. ValueError if it is anything else."""
    path = pathlib.Path(path)
    try:
        rows = json.loads(path.read_bytes())
    except OSError as e:
        raise ValueError(f"actions {path} cannot be read ({e.strerror}).") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}); actions are a list of rows.") from e
    if isinstance(rows, dict):
        rows = rows.get("actions")
    good = isinstance(rows, list) and bool(rows) and all(isinstance(r, list) and len(r) == len(rows[0]) for r in rows)
    if not good or not rows[0] or not all(type(v) in (int, float) and abs(v) < 1e30 for r in rows for v in r):
        raise ValueError(f"actions {path} must be a list of rows of numbers, all of one length.")
    return np.asarray(rows, np.float32)


def prepare(
    raw: np.ndarray, body: Embodiment, rows: int, stats: ActionStats | None = None, *, convention: str = "framework"
) -> tuple[np.ndarray, dict[str, Any]]:
    """Actions [n, width] → float32 [rows, width] for the model, and what was done to them, for the run's record.

    stats: normalise with these; None: the actions are in the model's units already, as the framework's and diffusers'
    inference take them. In diffusers' convention the last row is repeated, or rows are cut, to make `rows`. ValueError
    for another width or number of rows, NaN, and values beyond LIMIT: those were not normalised.
    """
    if raw.ndim != 2 or not len(raw):
        raise ValueError(f"actions must be rows of channels, got an array of shape {list(raw.shape)}.")
    channels = width(body, raw.shape[1])
    if len(raw) != rows and convention == "framework":
        raise ValueError(f"there are {len(raw)} action rows, but action_chunk_size is {rows}; they must agree.")
    raw = np.concatenate([raw, np.repeat(raw[-1:], max(rows - len(raw), 0), 0)])[:rows]
    record: dict[str, Any] = {"domain_name": body.name, "domain": body.domain, "width": channels, "statistics": None}
    if stats is None:
        if not np.isfinite(raw).all():
            raise ValueError("the actions hold NaN or infinity; repair them.")
        if np.abs(raw).max() > LIMIT:
            raise ValueError(
                f"the actions reach {np.abs(raw).max():.1f}, but normalised ones stay within {LIMIT}; normalise them, "
                "or give the statistics of their dataset."
            )
        return raw.astype(np.float32), record
    return stats.normalise(raw), record | {"statistics": stats.record()}


def statistics(
    path: str | pathlib.Path, body: Embodiment, method: str = "quantile", *, clamp: bool = False
) -> ActionStats:
    """`ActionStats.load` for a body; of the two arms in UMI's file the first. ValueError if the widths do not fit."""
    stats = ActionStats.load(path, method, clamp=clamp)
    if body.name == "umi" and stats.width == 2 * body.width:
        return stats.first(body.width)
    width(body, stats.width)
    return stats
