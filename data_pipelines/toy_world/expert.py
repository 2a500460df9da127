"""What there is to do on the table, and a script that does it.

In: a state and a goal. Out: the next raw action. Used to make episodes and as the upper reference of evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines import action as actions
from data_pipelines.toy_world.world import COLOURS, MAX_STEP, PALM, RADIUS, REACH, State

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, 1.0), "down": (0.0, -1.0)}
CORNERS = {"top left": (0.2, 0.8), "top right": (0.8, 0.8), "bottom left": (0.2, 0.2), "bottom right": (0.8, 0.2)}
PUSHED = 0.12  # a push counts from this displacement on


@dataclass(frozen=True)
class Goal:
    kind: str  # push | grasp | carry | wander
    puck: int = 0
    where: str = ""  # a direction or a corner

    def instruction(self, state: State) -> str:
        """The goal as an order."""
        colour = COLOURS[state.colours[self.puck]]
        return {
            "push": f"Push the {colour} puck {self.where}.",
            "grasp": f"Grasp the {colour} puck.",
            "carry": f"Carry the {colour} puck to the {self.where} corner.",
            "wander": "Move around.",
        }[self.kind]

    def reached(self, first: State, now: State) -> bool:
        """Did what happened between the two states fulfil the goal?"""
        if self.kind == "grasp":
            return now.held == self.puck
        if self.kind == "push":
            moved = now.pos[self.puck] - first.pos[self.puck]
            return now.held < 0 and float(moved @ np.array(DIRECTIONS[self.where])) >= PUSHED
        if self.kind == "carry":
            return now.held == self.puck and _in_corner(now.pos[self.puck], self.where)
        return True


def _in_corner(p: np.ndarray, corner: str) -> bool:
    """In the quadrant of the corner, 0.08 clear of its inner borders."""
    return all((v < 0.42) if c < 0.5 else (v > 0.58) for v, c in zip(p, CORNERS[corner], strict=True))


def random_goal(rng: np.random.RandomState, state: State, kind: str) -> Goal:
    """A goal that is possible from here and not yet reached."""
    for _ in range(50):
        puck = int(rng.randint(len(state.pos)))
        where = {"push": list(DIRECTIONS), "carry": list(CORNERS)}.get(kind, [""])
        goal = Goal(kind, puck, where[rng.randint(len(where))])
        p = state.pos[puck]
        if kind == "carry" and _in_corner(p, goal.where):
            continue
        if kind == "push":
            d = np.array(DIRECTIONS[goal.where])
            behind, ahead = p - 0.25 * d, p + (PUSHED + RADIUS + 0.05) * d
            if min(behind.min(), ahead.min()) < 0.04 or max(behind.max(), ahead.max()) > 0.96:
                continue  # no room to stand behind it or to push it into
            if (p - np.array(state.gripper[:2])) @ d < 0.1:
                continue  # the hand would have to walk around it first
        return goal
    return Goal("grasp", int(rng.randint(len(state.pos))))


def expert_action(state: State, goal: Goal, turn: float = 0.0) -> np.ndarray:
    """The next raw action [10] towards the goal; `turn` (rad) is free to choose."""
    g, p = np.array(state.gripper[:2]), state.pos[goal.puck]
    if goal.kind == "push":
        return _act(state, _push_target(g, p, np.array(DIRECTIONS[goal.where])), turn, True)
    if state.held == goal.puck:
        to = np.array(CORNERS[goal.where]) if goal.kind == "carry" else p
        return _act(state, to - p, turn, False)
    if state.held >= 0 or not state.open:
        return _act(state, np.zeros(2), turn, True)
    d = p - g
    if np.linalg.norm(d) < REACH - 0.015:
        return _act(state, np.zeros(2), turn, False)
    return _act(state, d * (1 - (RADIUS + PALM) / np.linalg.norm(d)), turn, True)


def _push_target(g: np.ndarray, p: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Displacement that leads behind the puck, around it, and then through it."""
    along, side = float((p - g) @ d), float((p - g) @ np.array([-d[1], d[0]]))
    if along > 0 and abs(side) < 0.03:
        return d * 0.04
    behind = p - d * (RADIUS + PALM + 0.035)
    if along < RADIUS + PALM and abs(side) < RADIUS + PALM + 0.02:  # in the way: step aside first
        aside = np.array([-d[1], d[0]]) * (-1.0 if side > 0 else 1.0)
        return aside * 0.06 - d * (0.03 if abs(side) > RADIUS else 0.0)
    return behind - g


def _act(state: State, move: np.ndarray, turn: float, is_open: bool) -> np.ndarray:
    """`raw_action` within the arm's speed."""
    return raw_action(state, move * min(1.0, MAX_STEP / max(float(np.hypot(*move)), 1e-9)), turn, is_open)


def raw_action(state: State, move: np.ndarray, turn: float, is_open: bool) -> np.ndarray:
    """World displacement → raw action [10] in the gripper's own frame, unclipped."""
    x, y, yaw = state.gripper
    poses = actions.pose(np.array([x, x + move[0]]), np.array([y, y + move[1]]), np.array([yaw, yaw + turn]))
    return actions.encode(poses, np.array([float(is_open)]))[0]
