"""What the model does: actions read off a clip, and actions performed in the simulator.

Inverse dynamics is judged against the recorded actions; the policy by what happens on the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from cosmos_jax.evaluate.study import EXAMPLES, UPPER, Study, blank
from data_pipelines.toy_world.env import PolicyEnv
from data_pipelines.toy_world.samples import Encoded, make_sample
from data_pipelines.toy_world.stream import SPLITS

CHUNK = 16  # actions per look at the table
REPEATS = 4  # tries per task of the baselines that act at random
EXPERT = f"expert {UPPER}"


def inverse_dynamics(study: Study) -> None:
    """A clean clip in, its actions out: error in normalised units, and of the hand's movement in millimetres."""
    index, stats = study.samples, study.pipeline.assets.stats
    made = study.generate("inverse_dynamics", index)
    true = np.stack([study.raw[i].actions for i in index])
    got = np.stack([g.actions for g in made])
    usual = np.mean([e.actions for e in study.train], axis=(0, 1))
    study.keep(
        "inverse_dynamics", prompt=[study.raw[i].caption for i in index], video=[study.raw[i].video for i in index],
        true=true, got=got,
    )  # fmt: skip

    unit = stats.denormalise(np.ones(true.shape[-1])) - stats.denormalise(np.zeros(true.shape[-1]))

    def rms(guess):
        return np.sqrt(np.mean(((guess - true) / unit) ** 2, (1, 2)))

    def slip(guess):
        return 1000 * np.linalg.norm((guess - true)[..., :3], axis=-1).mean(1)

    study.score(
        "inverse dynamics, all channels", rms(got), "rms, normalised", "lower",
        {"mean action of training": rms(usual)}, note="Root mean square per clip, over 16 steps and 10 channels.",
    )  # fmt: skip
    study.score(
        "inverse dynamics, movement", slip(got), "mm per step", "lower",
        {"mean action of training": slip(usual), "no movement": slip(np.zeros_like(usual))},
        note="Distance between predicted and true translation of the hand per step (the table is 1 m wide).",
    )  # fmt: skip


def policy(study: Study) -> None:
    """Closed loop: look, predict 16 actions, perform them, look again; `evaluate.chunks` times."""
    n, chunks = study.config.evaluate.rollouts, study.config.evaluate.chunks
    first = SPLITS[study.config.data.eval_split]
    envs = [PolicyEnv(first + s) for s in range(n)]
    film = [[e.frame()] for e in envs]
    done = np.zeros(n, bool)
    dreams: list[np.ndarray] = []
    for chunk in range(chunks):
        made = study.pipeline.generate([_request(study, e, i) for i, e in enumerate(envs)], seed=1000 * chunk)
        dreams = dreams or [g.video for g in made[:EXAMPLES]]
        for i, g in enumerate(made):
            for action in g.actions:
                if done[i]:
                    break
                envs[i].step(action)
                film[i].append(envs[i].frame())
                done[i] = envs[i].success()
    kinds = np.array([e.kind for e in envs])

    def replay(env, rng):
        return study.train[rng.randint(len(study.train))].actions

    def others(player, repeats=1):
        return _rollouts(range(first, first + n), chunks * CHUNK, player, repeats)

    study.score(
        "policy, closed loop", done.astype(float), "success rate", "higher",
        {
            "random actions": others(lambda env, rng: [env.random_action(rng)], REPEATS),
            "actions of random training episodes": others(replay, REPEATS),
            EXPERT: others(lambda env, rng: [env.expert_action()]),
        },
        note=f"Goal reached within {chunks} × {CHUNK} actions; {CHUNK} actions are performed per look at the table. "
        f"The first two baselines are averages of {REPEATS} tries per task.",
        parts={k: {"model": float(done[kinds == k].mean())} for k in dict.fromkeys(kinds.tolist())},
    )  # fmt: skip
    length = 1 + CHUNK * chunks
    study.keep(
        "policy", prompt=[e.instruction for e in envs], success=done, imagined=dreams,
        video=[np.stack((f + [f[-1]] * length)[:length]) for f in film],
    )  # fmt: skip


def _request(study: Study, env: PolicyEnv, number: int):
    """What the camera sees now and what is wanted; everything else is to be made."""
    template: Encoded = study.seen[0]
    now = study.pipeline.assets.video.encode(env.frame()[None])
    latents = np.concatenate([now, np.zeros_like(template.video[:, 1:])], 1)
    view = dataclasses.replace(template, video=latents, instruction=env.instruction)
    return blank(make_sample(view, "policy", sample_id=number))


def _rollouts(seeds: range, steps: int, player: Callable, repeats: int) -> np.ndarray:
    """Success of someone else on the same tasks. player(env, rng) → actions to come. [seeds · repeats] float."""
    wins = []
    for k in range(len(seeds) * repeats):
        env, rng, won, left = PolicyEnv(seeds[k % len(seeds)]), np.random.RandomState(k), False, steps
        while left > 0 and not won:
            for action in player(env, rng)[:left]:
                env.step(action)
                won, left = won or env.success(), left - 1
        wins.append(float(won))
    return np.array(wins)
