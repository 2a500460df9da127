"""What the model shows: pictures from captions, continued clips, imagined consequences of actions.

Objects are found by colour in generated and true frames alike, so what the finder gets wrong cancels. Upper reference:
the true clip, encoded and decoded, that is, perfect latents.
"""

from __future__ import annotations

import functools

import numpy as np

from cosmos_jax.evaluate.measure import LOST, VISIBLE, colours_named, distance, moving, shows, slots, track
from cosmos_jax.evaluate.study import UPPER, Study
from data_pipelines.tasks import task
from data_pipelines.toy_world.render import SIZE
from data_pipelines.toy_world.world import COLOURS

CODEC = f"tokeniser alone {UPPER}"
LIMIT = (
    f"An object that a generated frame does not show counts as {LOST:.0f} px off, and nothing counts as more; a puck "
    "that the hand hides in the true frame (less than a quarter is seen) is not judged."
)


def pictures(study: Study) -> None:
    """text2image and text2video: is every puck that the caption names in the (first) picture?"""
    index = [i for i in study.samples if colours_named(study.raw[i].caption)]
    named = [colours_named(study.raw[i].caption) for i in index]
    true = [{c for c in COLOURS if shows(study.raw[i].video[0], c)} for i in index]
    for name in ("text2image", "text2video"):
        made = study.generate(name, index)
        study.keep_clips(name, index, made)
        shown = [{c for c in COLOURS if shows(g.video[0], c)} for g in made]
        share = _shares(shown, named)
        own = np.eye(len(index), dtype=bool)
        study.score(
            f"{name}, colours", share[own], "share shown", "higher",
            {"another caption's picture": share[~own] if len(index) > 1 else np.nan,
             f"true pictures {UPPER}": _shares(true, named)[own]},
            note="Share of the puck colours named in the caption that the first picture shows. Baseline: the same "
            "pictures judged by every other caption.",
            **({"way": _way(study, index, made)} if name == "text2video" else {}),
        )  # fmt: skip


def _shares(shown: list[set], named: list[list[str]]) -> np.ndarray:
    """[picture, caption]: share of the caption's colours that are in the picture."""
    return np.array([[np.mean([c in s for c in colours]) for colours in named] for s in shown])


def _way(study: Study, index: list[int], made: list) -> dict:
    """Does the captioned puck go where the caption says? Share of the clips with a captioned direction, and chance."""
    signs = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    right, paths = [], []
    for i, g in zip(index, made, strict=True):
        _, colour, _, way, *_ = slots(study.raw[i].caption)
        if colour and way:
            path = track(g.video, [colour])[:, 1]
            paths.append((np.nan_to_num(path[-1] - path[0]), signs[way]))
    for d, (axis, sign) in paths:
        right.append(bool(abs(d[axis]) >= abs(d[1 - axis]) and d[axis] * sign > 0))
    return {"moves the captioned way": float(np.mean(right)) if right else None, "chance": 0.25, "n": len(right)}


def continuation(study: Study) -> None:
    """image2video and video2video: what is where in the frames that were not given."""
    for name in ("image2video", "video2video"):
        given = 1 + 4 * (task(name).clean_frames - 1)
        made = study.generate(name, study.samples)
        study.keep_clips(name, study.samples, made)
        rivals = {"copy the last given frame": _copy}
        if given > 1:
            rivals["constant velocity"] = _constant_velocity
        errors = _errors(study, made, given, rivals, functools.partial(moving, given=given))
        study.score(
            f"{name}, positions", errors.pop("model"), "px", "lower", errors,
            note=f"Mean distance from the truth, over all frames after the {given} given, of what leaves its place "
            f"(gripper and pucks). {LIMIT}",
        )  # fmt: skip


def forward_dynamics(study: Study) -> None:
    """One frame and 16 actions in, 16 frames out: where are the gripper and the pucks that move?"""
    made = study.generate("forward_dynamics", study.samples)
    study.keep_clips("forward_dynamics", study.samples, made, actions=[study.raw[i].actions for i in study.samples])
    rivals = {"copy the given frame": _copy, "constant velocity (sees two frames)": _glimpse}

    def gripper(true):
        return np.arange(true.shape[1]) == 0

    def pucks(true):
        return moving(true, 1) & ~gripper(true)

    for what, chosen in (("gripper", gripper), ("moving pucks", pucks)):
        errors = _errors(study, made, 1, rivals, chosen)
        study.score(
            f"forward dynamics, {what}", errors.pop("model"), "px", "lower", errors,
            note="Mean distance from the truth over 16 imagined frames. The constant-velocity baseline is privileged: "
            f"it extrapolates the true motion between the first two frames, of which the model sees one. {LIMIT}",
        )  # fmt: skip


def _copy(true: np.ndarray, given: int) -> np.ndarray:
    """Everything stays where it was in the last given frame. [T,n,2]"""
    return np.repeat(true[given - 1 : given], len(true), 0)


def _constant_velocity(true: np.ndarray, given: int) -> np.ndarray:
    """Everything moves on as between the last two given frames, as far as the edge of the picture."""
    steps = np.arange(len(true))[:, None, None] - (given - 1)
    return np.clip(true[given - 1] + steps * (true[given - 1] - true[given - 2]), 0, SIZE - 1)


def _glimpse(true: np.ndarray, given: int) -> np.ndarray:
    """Constant velocity that may also look at the first frame to be predicted."""
    return _constant_velocity(true, given + 1)


def _errors(study: Study, made: list, given: int, rivals: dict, chosen) -> dict[str, np.ndarray]:
    """Mean error per clip (px; NaN if nothing is chosen there) of the model, the codec and each rival."""
    out: dict[str, list] = {k: [] for k in ("model", *rivals, CODEC)}
    for i, g in zip(study.samples, made, strict=True):
        e = study.raw[i]
        path, true = track(e.video, e.colours), track(e.video, e.colours, VISIBLE)
        pick = chosen(path)
        guesses = {"model": track(g.video, e.colours), CODEC: track(study.through_codec(i), e.colours)}
        for name, guess in (guesses | {k: f(path, given) for k, f in rivals.items()}).items():
            d = distance(guess, true)[given:, pick]
            out[name].append(np.nanmean(d) if np.isfinite(d).any() else np.nan)
    return {k: np.array(v) for k, v in out.items()}
