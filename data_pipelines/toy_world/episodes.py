"""One episode: video, sound, actions, an exact caption and questions, from a seed.

In: a seed. Out: `Episode`, the same bytes on every machine and run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data_pipelines import action as actions
from data_pipelines.toy_world import world
from data_pipelines.toy_world.expert import Goal, expert_action, random_goal, raw_action
from data_pipelines.toy_world.render import pixels, render
from data_pipelines.toy_world.sound import RATE, synthesise
from data_pipelines.toy_world.world import COLOURS, MATERIALS, WALLS, Event, State

FRAMES = 17  # 1 + 4·4: five latent frames
CARRIED = 0.1  # a held puck that travels less was grasped, not carried
TRIES = 5  # scenes to draw until the script finishes in time
KINDS = ("push", "grasp", "carry", "slide")
NUMBERS = ("no", "one", "two", "three")
CAPTION_REQUEST = "Describe the video."


@dataclass(frozen=True)
class Episode:
    """FRAMES frames at 10 fps and what belongs to them."""

    seed: int
    kind: str
    video: np.ndarray  # uint8 [17,SIZE,SIZE,3]
    sound: np.ndarray  # float32 [2,13600], 8 kHz
    actions: np.ndarray  # float32 [16,10] raw
    poses: np.ndarray  # float32 [17,3] gripper x, y (table widths), yaw (rad)
    gripper: np.ndarray  # float32 [17,2] pixels (column, row)
    pucks: np.ndarray  # float32 [17,n,2] pixels
    colours: tuple[str, ...]
    caption: str
    instruction: str
    qa: tuple[tuple[str, str], ...]
    onsets: tuple[float, ...]  # seconds of the impacts
    events: tuple[tuple[float, str, int, int], ...]  # (seconds, kind, puck, other puck or -1) of the impacts
    fps: float = world.FPS
    sample_rate: int = RATE


def make_episode(seed: int) -> Episode:
    """The episode of a seed. About 4 ms on one core."""
    rng = np.random.RandomState(seed % 2**32)
    kind = KINDS[rng.randint(len(KINDS))]
    for _ in range(TRIES):  # a demonstration should do what its instruction says
        state = world.reset(rng, int(rng.randint(1, 3)))
        if kind == "slide":
            goal, state = Goal("wander"), _launch(rng, state)
        else:
            goal = random_goal(rng, state, kind)
        states, events = _play(rng, state, goal)
        if goal.reached(states[0], states[-1]):
            break
    poses = np.array([s.gripper for s in states])
    open_next = np.array([1.0 if s.open else 0.0 for s in states[1:]])
    return Episode(
        seed=seed,
        kind="slide" if goal.kind == "wander" else goal.kind,
        video=render(states),
        sound=synthesise(events, FRAMES / world.FPS),
        actions=actions.encode(actions.pose(*poses.T), open_next),
        poses=poses.astype(np.float32),
        gripper=pixels(poses[:, :2]),
        pucks=pixels(np.array([s.pos for s in states])),
        colours=tuple(COLOURS[c] for c in state.colours),
        caption=caption(states, events),
        instruction=goal.instruction(state),
        qa=questions(states, events),
        onsets=tuple(e.time for e in events),
        events=tuple((e.time, e.kind, e.puck, e.other) for e in events),
    )


def _launch(rng: np.random.RandomState, state: State) -> State:
    """Give one puck a velocity."""
    i, angle, speed = int(rng.randint(len(state.pos))), rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.6)
    vel = state.vel.copy()
    vel[i] = speed * np.array([np.cos(angle), np.sin(angle)])
    return replace(state, vel=vel)


def _play(rng: np.random.RandomState, state: State, goal: Goal) -> tuple[list[State], list[Event]]:
    """Run the script, with a smooth hand tremor and a slow turn of the wrist."""
    states, events = [state], []
    turn, drift = rng.uniform(-0.02, 0.02), np.zeros(2)
    heading, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15)
    for _ in range(FRAMES - 1):
        now = states[-1]
        if goal.kind == "wander":
            heading += bend
            move = 0.03 * np.array([np.cos(heading), np.sin(heading)])
            away = np.array(now.gripper[:2]) - 0.5
            move = move - 0.08 * away * (np.abs(away) > 0.3)
            act = raw_action(now, move, turn, True)
        else:
            act = expert_action(now, goal, turn)
            drift = 0.6 * drift + rng.normal(0, 0.004, 2)
            act[:2] += drift
        new, hits = world.step(now, act)
        states.append(new)
        events.extend(hits)
    return states, _merge(events)


def _merge(events: list[Event], gap: float = 0.12) -> list[Event]:
    """A pushed puck touches the palm many times: contacts of the same things within `gap` seconds are one impact."""
    last: dict[tuple[str, int, int], float] = {}
    kept = []
    for e in events:
        key = (e.kind, e.puck, e.other)
        if e.time - last.get(key, -1.0) > gap:
            kept.append(e)
        last[key] = e.time
    return kept


def _name(state: State, i: int) -> str:
    return f"{COLOURS[state.colours[i]]} {MATERIALS[state.materials[i]]} puck"


def _way(d: np.ndarray) -> str:
    if abs(d[0]) >= abs(d[1]):
        return "right" if d[0] > 0 else "left"
    return "up" if d[1] > 0 else "down"


def _mover(states: list[State]) -> int:
    """The puck that moved most; -1 if none did."""
    moved = np.linalg.norm(states[-1].pos - states[0].pos, axis=1)
    path = sum(np.linalg.norm(b.pos - a.pos, axis=1) for a, b in zip(states, states[1:], strict=False))
    best = int(np.argmax(path))
    return best if path[best] > 0.03 or moved[best] > 0.03 else -1


def _carried(states: list[State]) -> float:
    """How far the gripper has moved (table widths, as the crow flies) since it closed on what it holds at the end."""
    grasp = next(i for i, s in enumerate(states) if s.held == states[-1].held)
    (x, y), (x0, y0) = states[-1].gripper[:2], states[grasp].gripper[:2]
    return float(np.hypot(x - x0, y - y0))


def caption(states: list[State], events: list[Event]) -> str:
    """Short sentences: who moves what where, what is held, and the first two impacts with their times."""
    first, last = states[0], states[-1]
    m = _mover(states)
    if m < 0:
        head = f"The gripper grasps the {_name(first, last.held)}." if last.held >= 0 else "The gripper moves alone."
    else:
        way, what = _way(last.pos[m] - first.pos[m]), _name(first, m)
        if last.held == m and _carried(states) < CARRIED:
            head = f"The gripper grasps the {what}."
        elif last.held == m:
            head = f"The gripper carries the {what} {way}."
        elif not first.vel[m].any() and any(e.kind == "gripper" and e.puck == m for e in events):
            head = f"The gripper pushes the {what} {way}."
        else:
            head = f"The {what} slides {way}."
        if last.held not in (-1, m):  # it moved less than the one it was pushed into, but it is held
            head += f" The gripper grasps the {_name(first, last.held)}."
    hits = [f"{_hit(first, e)} at {e.time:.1f} s." for e in events[:2]]
    return " ".join([head, *hits])


def _hit(state: State, e: Event) -> str:
    if e.kind == "gripper":
        return f"The gripper hits {COLOURS[state.colours[e.puck]]}"
    if e.kind == "puck":
        return f"{COLOURS[state.colours[e.puck]].capitalize()} hits {COLOURS[state.colours[e.other]]}"
    return f"{COLOURS[state.colours[e.puck]].capitalize()} hits the {e.kind} wall"


def questions(states: list[State], events: list[Event]) -> tuple[tuple[str, str], ...]:
    """Questions with one-word answers that follow from what happened."""
    first, last = states[0], states[-1]
    m = _mover(states)
    wall = next((e.kind for e in events if e.kind in WALLS), "none")
    left = int(np.argmin(first.pos[:, 0]))
    return (
        ("How many pucks are there?", NUMBERS[len(first.pos)]),
        ("Which colour moves?", COLOURS[first.colours[m]] if m >= 0 else "none"),
        ("What is the moving puck made of?", MATERIALS[first.materials[m]] if m >= 0 else "none"),
        ("Which way does the puck move?", _way(last.pos[m] - first.pos[m]) if m >= 0 else "none"),
        ("Which wall is hit first?", wall),
        ("Does the gripper hold a puck at the end?", "yes" if last.held >= 0 else "no"),
        ("Which colour is leftmost at the start?", COLOURS[first.colours[left]]),
    )
