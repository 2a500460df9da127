"""Scores: the trained toy against ground truth and against baselines computed from the same data in the same run.

In: a `Pipeline`. Out: workdir/scores.json, one row per ability: {"value", "unit", "baselines", "better", "beats"}.
`beats`: better than every baseline that is not an upper reference (the scripted expert). Examples go to the report.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from cosmos_jax.loss import loss_fn
from cosmos_jax.pipeline import Pipeline
from data_pipelines.loader import Loader, episodes
from data_pipelines.toy_world.env import PolicyEnv
from data_pipelines.toy_world.episodes import CAPTION_REQUEST, FRAMES, Episode
from data_pipelines.toy_world.render import locate, locate_gripper
from data_pipelines.toy_world.samples import REASON_FRAMES, Encoded, ToySamples, make_sample
from data_pipelines.toy_world.sound import onsets
from data_pipelines.toy_world.stream import EVAL_SEED, StreamSource
from data_pipelines.toy_world.world import COLOURS

UPPER = "expert (upper reference)"
LOST = 32.0  # px: error of an object that a generated frame does not show (half the picture)
SILENT = 1.7  # s: error of a clip without any sound (its whole length)
EXAMPLES = 4  # per task, for the report


@dataclasses.dataclass
class Held:
    """The held-out set, raw and encoded, and what the training set says on average."""

    raw: list[Episode]
    seen: list[Encoded]
    train: list[Episode]


def row(value: float, unit: str, better: str, **baselines: float) -> dict:
    """One score. Keyword names become baseline names, with spaces for underscores."""
    named = {(UPPER if k == "expert" else k.replace("_", " ")): float(v) for k, v in baselines.items()}
    sign = 1 if better == "higher" else -1
    rivals = [v for k, v in named.items() if k != UPPER]
    beats = bool(np.isfinite(value) and all(sign * value > sign * v for v in rivals))
    return {"value": float(value), "unit": unit, "better": better, "baselines": named, "beats": beats}


def evaluate(pipeline: Pipeline, workdir: str | Path) -> dict[str, dict]:
    """Score every ability, print the table, write scores.json and examples/*.npz. Returns the rows."""
    workdir, config = Path(workdir), pipeline.config
    (workdir / "examples").mkdir(parents=True, exist_ok=True)
    n = config.data.eval_episodes
    source = StreamSource(n, EVAL_SEED)
    raw = [source[i] for i in range(n)]
    train = StreamSource(min(200, config.data.episodes))
    held = Held(raw, [pipeline.assets.encode(e) for e in raw], [train[i] for i in range(len(train))])
    scores: dict[str, dict] = {}
    console = Console()
    for part in (language, dynamics, inverse, policy, sound, continuation, images, losses):
        began = time.perf_counter()
        scores |= part(pipeline, held, workdir / "examples")
        console.print(f"evaluated {part.__name__} in {time.perf_counter() - began:.0f} s")
    (workdir / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (workdir / "settings.json").write_text(json.dumps(pipeline.applied, indent=1) + "\n")
    console.print(table(scores))
    return scores


def table(scores: dict[str, dict]) -> Table:
    """The score table; a row that loses to a baseline is red and says so."""
    t = Table("what", "score", "baselines", "verdict", title="Scores on held-out episodes")
    for name, s in scores.items():
        rivals = ", ".join(f"{k} {v:.3g}" for k, v in s["baselines"].items())
        verdict = "beats its baselines" if s["beats"] else "[bold red]does NOT beat its baselines[/]"
        t.add_row(name, f"{s['value']:.3g} {s['unit']}", rivals, verdict)
    return t


def slots(caption: str) -> tuple[str, ...]:
    """(verb, colour, material, direction) of a caption's first sentence; "" where it names none."""
    words = caption.split(".")[0].lower().split()
    kinds = (("carries", "grasps", "pushes", "slides", "moves"), COLOURS, ("wood", "glass", "steel"))
    found = [next((w for w in words if w in kind), "") for kind in kinds]
    way = words[-1] if words and words[-1] in ("left", "right", "up", "down") else ""
    return (*found, way)


def language(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Captions by slot and questions by exact answer, against the most frequent of the training set."""
    asked = [(e, CAPTION_REQUEST, e.caption) for e in held.seen]
    pairs = [(e, q, a) for e in held.seen for q, a in e.qa][: p.config.evaluate.questions]
    said = p.reason([make_sample(e, "reason", question=(q, None)) for e, q, _ in asked + pairs])
    captions, answers = said[: len(asked)], said[len(asked) :]
    usual = [Counter(c).most_common(1)[0][0] for c in zip(*(slots(e.caption) for e in held.train), strict=True)]
    truth = [slots(e.caption) for e in held.raw]
    score = np.mean([[a == b for a, b in zip(slots(c), t, strict=True)] for c, t in zip(captions, truth, strict=True)])
    base = np.mean([[a == b for a, b in zip(usual, t, strict=True)] for t in truth])
    exact = np.mean([c == e.caption for c, e in zip(captions, held.raw, strict=True)])
    common: dict[str, str] = {}
    for q, _ in held.train[0].qa:
        common[q] = Counter(dict(e.qa)[q] for e in held.train).most_common(1)[0][0]
    right = np.mean([a == s for (_, _, a), s in zip(pairs, answers, strict=True)])
    guess = np.mean([a == common[q] for _, q, a in pairs])
    k = EXAMPLES
    np.savez(
        out / "reason.npz",
        video=np.stack([e.video for e in held.raw[:k]]),
        caption_true=[e.caption for e in held.raw[:k]],
        caption=captions[:k],
        question=[q for _, q, _ in pairs[: 7 * k]],
        answer_true=[a for _, _, a in pairs[: 7 * k]],
        answer=answers[: 7 * k],
    )
    return {
        "caption slots": row(score, "share right", "higher", most_frequent=base),
        "caption exact": row(exact, "share right", "higher", most_frequent=_exact_rate(held)),
        "question answering": row(right, "share right", "higher", most_frequent=guess),
    }


def _exact_rate(held: Held) -> float:
    usual = Counter(e.caption for e in held.train).most_common(1)[0][0]
    return float(np.mean([e.caption == usual for e in held.raw]))


def track(video: np.ndarray, colours) -> np.ndarray:
    """Where everything is in a video: [T, 1+n, 2] pixels, gripper first; NaN where it is not seen."""
    return np.stack([locate_gripper(video), *(locate(video, c) for c in colours)], 1)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pixel distance [..., 2] → [...]; LOST where a shows nothing, NaN where b (the truth) shows nothing."""
    d = np.linalg.norm(a - b, axis=-1)
    return np.where(np.isnan(b).any(-1), np.nan, np.where(np.isnan(a).any(-1), LOST, np.minimum(d, LOST)))


def dynamics(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Forward dynamics: positions over the whole imagined clip, of the gripper and of the pucks that move.

    Constant velocity is privileged: it extrapolates the true positions of the first two frames, of which the model sees
    only one.
    """
    n = p.config.evaluate.samples
    made = p.generate([make_sample(e, "forward_dynamics") for e in held.seen[:n]])
    _save(out / "forward_dynamics.npz", held, made)
    scores = {}
    errors: dict[str, dict[str, list]] = {k: {"model": [], "copy": [], "velocity": []} for k in ("gripper", "moving pucks")}
    steps = np.arange(FRAMES)[:, None, None]
    for e, g in zip(held.raw[:n], made, strict=True):
        true = track(e.video, e.colours)
        guess = {
            "model": track(g.video, e.colours),
            "copy": np.repeat(true[:1], FRAMES, 0),
            "velocity": np.clip(true[:1] + steps * (true[1:2] - true[:1]), 0, 63),
        }
        moves = np.linalg.norm(e.pucks[-1] - e.pucks[0], axis=-1) > 3
        for name, x in guess.items():
            d = distance(x, true)[1:]
            errors["gripper"][name].append(d[:, 0])
            errors["moving pucks"][name].append(d[:, 1:][:, moves].reshape(-1))
    for what, e in errors.items():
        mean = {k: np.nanmean(np.concatenate(v)) for k, v in e.items()}
        scores[f"forward dynamics, {what}"] = row(
            mean["model"], "px", "lower", copy_the_frame=mean["copy"], constant_velocity=mean["velocity"]
        )
    return scores


def inverse(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Inverse dynamics: root mean square error of normalised actions, against always saying the mean action."""
    n = p.config.evaluate.samples
    made = p.generate([make_sample(e, "inverse_dynamics") for e in held.seen[:n]])
    true = np.stack([e.actions for e in held.seen[:n]])
    got = np.stack([g.latents["action"] for g in made])
    mean = np.mean([p.assets.stats.normalise(e.actions) for e in held.train], axis=(0, 1))
    np.savez(out / "inverse_dynamics.npz", video=[e.video for e in held.raw[:EXAMPLES]], true=true[:EXAMPLES], got=got[:EXAMPLES])

    def rms(x):
        return float(np.sqrt(np.mean((x - true) ** 2)))

    return {"inverse dynamics": row(rms(got), "rms, normalised", "lower", mean_action=rms(mean))}


def policy(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Closed loop in the simulator: look, predict 16 actions, perform them, look again."""
    n, chunks = p.config.evaluate.rollouts, p.config.evaluate.chunks
    template = held.seen[0]
    envs = [PolicyEnv(s) for s in range(n)]
    film: list[list[np.ndarray]] = [[e.frame()] for e in envs]
    done = np.zeros(n, bool)
    for chunk in range(chunks):
        samples = []
        for i, e in enumerate(envs):
            first = p.assets.video.encode(e.frame()[None])
            z = np.concatenate([first, np.zeros_like(template.video[:, 1:])], 1)
            seen = dataclasses.replace(template, video=z, actions=np.zeros_like(template.actions), instruction=e.instruction)
            samples.append(make_sample(seen, "policy", sample_id=i))
        for i, g in enumerate(p.generate(samples, decode_video=False, seed=1000 * chunk)):
            for a in g.actions:
                if done[i]:
                    break
                envs[i].step(a)
                film[i].append(envs[i].frame())
                done[i] = envs[i].success()
    wins: dict[str, list[bool]] = {"expert": [], "random": []}
    for who, results in wins.items():
        for s in range(n):
            env, rng, ok = PolicyEnv(s), np.random.RandomState(s), False
            for _ in range(16 * chunks):
                env.step(env.expert_action() if who == "expert" else env.random_action(rng))
                ok = ok or env.success()
            results.append(ok)
    length = 1 + 16 * chunks
    clips = [np.stack((f + [f[-1]] * length)[:length]) for f in film[: 2 * EXAMPLES]]
    np.savez(out / "policy.npz", video=clips, prompt=[e.instruction for e in envs[: 2 * EXAMPLES]], success=done[: 2 * EXAMPLES])
    return {
        "policy, closed loop": row(
            done.mean(), "success rate", "higher", random_actions=np.mean(wins["random"]), expert=np.mean(wins["expert"])
        )
    }


def sound(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Text to video with sound: when is the first impact heard, against the time in the caption."""
    loud = [i for i, e in enumerate(held.raw) if e.onsets][: p.config.evaluate.samples]
    made = p.generate([make_sample(held.seen[i], "text2video_sound") for i in loud])
    _save(out / "text2video_sound.npz", held, made, loud)
    true = np.array([held.raw[i].onsets[0] for i in loud])
    heard = [onsets(g.sound) for g in made]
    error = np.mean([abs(h[0] - t) if h else SILENT for h, t in zip(heard, true, strict=True)])
    average = np.mean([e.onsets[0] for e in held.train if e.onsets])
    chance = np.abs(np.random.RandomState(0).uniform(0, SILENT, (200, len(true))) - true).mean()
    return {
        "sound onset": row(
            1000 * error, "ms", "lower", mean_onset=1000 * np.abs(average - true).mean(), random_time=1000 * chance
        )
    }


def continuation(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Image and video to video: positions of everything that moves, against copying the last frame given."""
    n, scores = min(p.config.evaluate.samples, 32), {}
    for name, given in (("image2video", 1), ("video2video", 5)):
        made = p.generate([make_sample(e, name) for e in held.seen[:n]])
        _save(out / f"{name}.npz", held, made)
        model, copy = [], []
        for e, g in zip(held.raw[:n], made, strict=True):
            true = track(e.video, e.colours)
            moves = np.nanmax(np.linalg.norm(true[given:] - true[given - 1 : given], axis=-1), 0) > 3
            model.append(distance(track(g.video, e.colours), true)[given:, moves].reshape(-1))
            copy.append(distance(np.repeat(true[given - 1 : given], FRAMES, 0), true)[given:, moves].reshape(-1))
        scores[name] = row(
            np.nanmean(np.concatenate(model)), "px", "lower", copy_the_last_frame=np.nanmean(np.concatenate(copy))
        )
    return scores


def images(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Text to image and video: does the clip show the colour that the caption names; chance is another caption's clip."""
    named = [i for i, e in enumerate(held.raw) if slots(e.caption)[1]][:32]
    scores = {}
    for name in ("text2image", "text2video"):
        made = p.generate([make_sample(held.seen[i], name) for i in named])
        _save(out / f"{name}.npz", held, made, named)
        seen = np.array([[shows(g.video[:1], c) for c in COLOURS] for g in made])
        want = np.array([COLOURS.index(slots(held.raw[i].caption)[1]) for i in named])
        hit = seen[np.arange(len(want)), want].mean()
        chance = seen[:, want].mean()  # every picture against every caption
        scores[f"{name}, colour shown"] = row(hit, "share", "higher", another_caption=chance)
    return scores


def shows(video: np.ndarray, colour: str) -> bool:
    return bool(np.isfinite(locate(video, colour, least=25.0)).any())


def losses(p: Pipeline, held: Held, out: Path) -> dict[str, dict]:
    """Held-out loss, against velocity 0 (the best constant) and against token frequencies."""
    c = p.config
    data = dataclasses.replace(c.data, caption_dropout=0.0)
    source = episodes(StreamSource(c.data.eval_episodes, EVAL_SEED), seed=0)
    make = ToySamples(source, p.assets, data, c.flow.shift_image, c.flow.shift_video)
    loader = Loader(make, p.assets.tokenizer, p.spec, c.data.bucket, c.data.look_ahead)
    run = jax.jit(lambda params, batch, key: loss_fn(params, c, batch, key, p.precision)[1])
    zero = jax.tree.map(np.zeros_like, p.params["io"])
    total: dict[str, list] = {}
    counts: Counter = Counter()
    for i in range(8):
        batch, key = next(loader), jax.random.fold_in(jax.random.key(7), i)
        counts.update(batch["und_targets"][batch["und_targets"] >= 0].tolist())
        for who, params in (("model", p.params), ("zero", p.params | {"io": zero})):
            for name, x in jax.device_get(run(params, batch, key)).items():
                total.setdefault(f"{who} {name}", []).append(x)
    mean = {k: float(np.mean(v)) for k, v in total.items() if k.split()[1].startswith("loss/")}
    scores = {
        f"held-out loss, {m}": row(mean[f"model loss/{m}"], "mse", "lower", velocity_zero=mean[f"zero loss/{m}"])
        for m in ("vision", "action", "sound")
    }
    share = np.array(list(counts.values())) / sum(counts.values())
    entropy = float(-(share * np.log(share)).sum())
    return scores | {"held-out loss, text": row(mean["model loss/text"], "nats/token", "lower", token_frequencies=entropy)}


def _save(path: Path, held: Held, made, index=None) -> None:
    """Generated clips beside the truth, for the report."""
    index = list(range(len(made))) if index is None else index
    k = min(EXAMPLES, len(made))
    arrays = {
        "prompt": [held.raw[i].caption for i in index[:k]],
        "video": np.stack([g.video for g in made[:k]]),
        "true": np.stack([held.raw[i].video[: len(made[0].video)] for i in index[:k]]),
    }
    if made[0].sound is not None:
        arrays |= {
            "sound": np.stack([g.sound for g in made[:k]]),
            "true_sound": np.stack([held.raw[i].sound for i in index[:k]]),
        }
    np.savez(path, **arrays)


assert max(REASON_FRAMES) < FRAMES
