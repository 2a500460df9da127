"""The physics: pucks with mass and friction on a walled table, and a gripper that pushes, grasps and releases.

In: a state and a raw 10-D action. Out: the next state and the impacts on the way. Unit square, x right, y up, seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

FPS = 10.0  # actions and frames per second
SUBSTEPS = 8
RADIUS = 0.12  # of a puck
PALM = 0.075  # of the gripper's disc
REACH = 0.24  # closing with the palm this near a puck's centre grasps it
FRICTION = 0.45  # deceleration of a sliding puck, table widths / s²
RESTITUTION = 0.9
QUIET = 0.02  # impulses below this make no sound
MAX_STEP, MAX_TURN, MAX_YAW = 0.045, 0.12, 0.6  # per action; metres, radians
COLOURS = ("red", "green", "blue", "yellow")
MATERIALS = ("wood", "glass", "steel")
MASS = {"wood": 0.5, "glass": 1.0, "steel": 2.0}
WALLS = ("left", "right", "bottom", "top")


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on."""

    pos: np.ndarray  # [n, 2]
    vel: np.ndarray  # [n, 2]
    colours: tuple[int, ...]
    materials: tuple[int, ...]
    gripper: tuple[float, float, float]  # x, y, yaw
    open: bool = True
    held: int = -1  # index of the carried puck
    time: float = 0.0

    @property
    def mass(self) -> np.ndarray:
        return np.array([MASS[MATERIALS[m]] for m in self.materials])


@dataclass(frozen=True)
class Event:
    """An impact: when (s), how hard (impulse), where, what it struck, and which materials ring."""

    time: float
    kind: str  # gripper | puck | left | right | bottom | top
    puck: int
    impulse: float
    pos: tuple[float, float]
    materials: tuple[int, ...]
    other: int = -1  # the second puck of a puck–puck impact


def _place(rng: np.random.RandomState, pucks: int) -> tuple[np.ndarray, np.ndarray]:
    """Puck centres [n, 2] and a gripper [2] within a few steps of one of them, nothing touching anything."""
    while True:
        pos = rng.uniform(RADIUS + 0.02, 1 - RADIUS - 0.02, (pucks, 2))
        angle = rng.uniform(0, 2 * np.pi)
        gripper = pos[0] + rng.uniform(0.24, 0.42) * np.array([np.cos(angle), np.sin(angle)])
        apart = [np.linalg.norm(p - q) > 2 * RADIUS + 0.02 for i, p in enumerate(pos) for q in pos[:i]]
        clear = np.linalg.norm(pos - gripper, axis=1) > RADIUS + PALM + 0.03
        if all(apart) and clear.all() and np.abs(gripper - 0.5).max() < 0.4:
            return pos, gripper


def reset(rng: np.random.RandomState, pucks: int) -> State:
    """Pucks at rest in random places, an open gripper near one and clear of all."""
    pos, gripper = _place(rng, pucks)
    colours = tuple(int(c) for c in rng.permutation(len(COLOURS))[:pucks])
    materials = tuple(int(m) for m in rng.randint(len(MATERIALS), size=pucks))
    yaw = float(rng.uniform(-0.15, 0.15))
    return State(pos, np.zeros((pucks, 2)), colours, materials, (float(gripper[0]), float(gripper[1]), yaw))


def step(state: State, raw_action: np.ndarray) -> tuple[State, list[Event]]:
    """Apply one raw action [10] for 1/FPS seconds. Translation and turn are clipped to what the arm can do."""
    a = np.asarray(raw_action, np.float64)
    x, y, yaw = state.gripper
    move = _rotate(a[:2], yaw)
    length = float(np.hypot(*move))
    move = move * min(1.0, MAX_STEP / max(length, 1e-9))
    turn = math.atan2(a[4] - a[6], a[3] + a[7])  # of the planar rotation nearest to the rot6d
    turn = min(max(turn, -MAX_TURN), MAX_TURN)
    goal = np.clip(np.array([x, y]) + move, 0.04, 0.96)
    wants_open = bool(a[9] > 0.5)
    held = state.held
    if wants_open:
        held = -1
    elif held < 0 and state.open:
        distance = np.linalg.norm(state.pos - np.array([x, y]), axis=1)
        near = int(distance.argmin())
        held = near if distance[near] < REACH else -1
    pos, vel = state.pos.copy(), state.vel.copy()
    events = _substeps(state, pos, vel, np.array([x, y]), goal, held)
    new_yaw = float(np.clip(yaw + turn, -MAX_YAW, MAX_YAW))
    new = replace(
        state, pos=pos, vel=vel, gripper=(float(goal[0]), float(goal[1]), new_yaw), open=wants_open, held=held,
        time=state.time + 1 / FPS,
    )  # fmt: skip
    return new, events


def _rotate(v: np.ndarray, yaw: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([c * v[0] - s * v[1], s * v[0] + c * v[1]])


def _substeps(state: State, pos: np.ndarray, vel: np.ndarray, start, goal, held: int) -> list[Event]:
    """Integrate the pucks in place while the gripper moves from start to goal; return the impacts.

    Plain floats: with three pucks they are ten times faster than arrays.
    """
    dt = 1 / FPS / SUBSTEPS
    hand = tuple(((goal - start) * FPS).tolist())
    p, v, mass = pos.tolist(), vel.tolist(), state.mass.tolist()
    contact = _Contact(state, p, v, mass, held, [])
    for k in range(1, SUBSTEPS + 1):
        contact.now = state.time + k * dt
        g = (start[0] + (goal[0] - start[0]) * k / SUBSTEPS, start[1] + (goal[1] - start[1]) * k / SUBSTEPS)
        for i in range(len(p)):
            if i == held:  # a carried puck is drawn to the rim of the palm and moves with it
                dx, dy = p[i][0] + hand[0] * dt - g[0], p[i][1] + hand[1] * dt - g[1]
                pull = 0.5 + 0.5 * (RADIUS + PALM) / max(math.hypot(dx, dy), 1e-9)
                p[i], v[i] = [g[0] + pull * dx, g[1] + pull * dy], list(hand)
                continue
            speed = math.hypot(*v[i])
            if speed:
                slow = max(speed - FRICTION * dt, 0.0) / speed
                v[i] = [v[i][0] * slow, v[i][1] * slow]
                p[i] = [p[i][0] + v[i][0] * dt, p[i][1] + v[i][1] * dt]
            if held < 0:
                contact.palm(i, g, hand)
        for i in range(len(p)):
            contact.walls(i)
            for j in range(i + 1, len(p)):
                contact.pucks(i, j)
    pos[:], vel[:] = p, v
    return [e for e in contact.events if e.impulse > QUIET]


@dataclass
class _Contact:
    """Resolves overlaps at one instant and records the impacts."""

    state: State
    p: list
    v: list
    mass: list
    held: int
    events: list[Event]
    now: float = 0.0

    def _hit(self, kind: str, i: int, impulse: float, at, other: int = -1) -> None:
        materials = tuple(self.state.materials[k] for k in (i, other) if k >= 0)
        self.events.append(Event(self.now, kind, i, impulse, (at[0], at[1]), materials, other))

    def palm(self, i: int, g, hand) -> None:
        """The empty palm, open or closed, is a moving disc of infinite mass."""
        dx, dy = self.p[i][0] - g[0], self.p[i][1] - g[1]
        dist = math.hypot(dx, dy)
        if dist >= RADIUS + PALM:
            return
        nx, ny = dx / max(dist, 1e-9), dy / max(dist, 1e-9)
        approach = (self.v[i][0] - hand[0]) * nx + (self.v[i][1] - hand[1]) * ny
        self.p[i] = [g[0] + nx * (RADIUS + PALM), g[1] + ny * (RADIUS + PALM)]
        if approach < 0:
            self.v[i] = [self.v[i][0] - 1.1 * approach * nx, self.v[i][1] - 1.1 * approach * ny]
            self._hit("gripper", i, -approach * self.mass[i], self.p[i])

    def walls(self, i: int) -> None:
        for axis in (0, 1):
            for side, sign in ((0, 1.0), (1, -1.0)):
                edge = RADIUS if side == 0 else 1 - RADIUS
                if (self.p[i][axis] - edge) * sign >= 0:
                    continue
                self.p[i][axis] = edge
                speed = -self.v[i][axis] * sign
                if speed > 0:
                    self.v[i][axis] = 0.0 if i == self.held else -RESTITUTION * self.v[i][axis]
                    self._hit(WALLS[2 * axis + side], i, speed * self.mass[i], self.p[i])

    def pucks(self, i: int, j: int) -> None:
        """Conserves momentum; a carried puck does not give way."""
        a, b = self.p[i], self.p[j]
        dx, dy = b[0] - a[0], b[1] - a[1]
        dist = math.hypot(dx, dy)
        if dist >= 2 * RADIUS:
            return
        nx, ny = dx / max(dist, 1e-9), dy / max(dist, 1e-9)
        wi = 0.0 if i == self.held else 1 / self.mass[i]
        wj = 0.0 if j == self.held else 1 / self.mass[j]
        overlap = (2 * RADIUS - dist) / (wi + wj)
        self.p[i] = [a[0] - nx * overlap * wi, a[1] - ny * overlap * wi]
        self.p[j] = [b[0] + nx * overlap * wj, b[1] + ny * overlap * wj]
        va, vb = self.v[i], self.v[j]
        approach = (vb[0] - va[0]) * nx + (vb[1] - va[1]) * ny
        if approach < 0:
            impulse = -(1 + RESTITUTION) * approach / (wi + wj)
            self.v[i] = [va[0] - impulse * wi * nx, va[1] - impulse * wi * ny]
            self.v[j] = [vb[0] + impulse * wj * nx, vb[1] + impulse * wj * ny]
            self._hit("puck", i, impulse, ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), j)
