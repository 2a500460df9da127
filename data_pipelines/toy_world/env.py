"""The simulator as a robot's world: look, act, succeed or not. For closed-loop evaluation.

In: raw actions. Out: frames and success.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.toy_world import world
from data_pipelines.toy_world.expert import expert_action, random_goal, raw_action
from data_pipelines.toy_world.render import render


class PolicyEnv:
    """One task of a seed: push, grasp or carry. Seeds of evaluation never coincide with training episodes'."""

    def __init__(self, seed: int):
        rng = np.random.RandomState((seed * 7919 + 0xC0515) % 2**32)
        self.state = self.first = world.reset(rng, int(rng.randint(1, 3)))
        self.goal = random_goal(rng, self.state, ("push", "grasp", "carry")[seed % 3])
        self.kind = self.goal.kind  # a push that no puck has room for becomes a grasp
        self.instruction = self.goal.instruction(self.state)

    def frame(self) -> np.ndarray:
        """What the camera sees now. uint8 [SIZE,SIZE,3]."""
        return render([self.state])[0]

    def step(self, raw: np.ndarray) -> None:
        """Apply one raw action [10]."""
        self.state, _ = world.step(self.state, raw)

    def success(self) -> bool:
        """Is the goal reached in the present state?"""
        return self.goal.reached(self.first, self.state)

    def expert_action(self) -> np.ndarray:
        """What the script would do now."""
        if self.goal.kind == "push" and self.success():
            return raw_action(self.state, np.zeros(2), 0.0, True)
        return expert_action(self.state, self.goal)

    def random_action(self, rng: np.random.RandomState) -> np.ndarray:
        """A random move of the arm's usual speed, opening or closing at random."""
        angle = rng.uniform(0, 2 * np.pi)
        move = world.MAX_STEP * rng.uniform(0.3, 1.0) * np.array([np.cos(angle), np.sin(angle)])
        return raw_action(self.state, move, rng.uniform(-0.05, 0.05), rng.uniform() < 0.5)
