"""What the reasoner says: captions by slot and word for word, questions by exact answer.

Baselines: what the training episodes say most often, per slot and per question.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from cosmos_jax.evaluate.measure import SLOTS, slots
from cosmos_jax.evaluate.study import EXAMPLES, Study
from data_pipelines.toy_world.episodes import CAPTION_REQUEST
from data_pipelines.toy_world.samples import make_sample

USUAL = "most frequent in training"


def captions_and_answers(study: Study) -> None:
    """Every held-out clip is described once; `evaluate.questions` questions are spread over the clips and types."""
    asked = [(i, CAPTION_REQUEST, e.caption) for i, e in enumerate(study.raw)]
    pairs = [(i, q, a) for i, e in enumerate(study.raw) for q, a in e.qa]
    order = np.random.RandomState(0).permutation(len(pairs))[: study.config.evaluate.questions]
    pairs = [pairs[k] for k in sorted(order)]
    samples = [make_sample(study.seen[i], "reason", sample_id=i, question=(q, None)) for i, q, _ in asked + pairs]
    said = study.pipeline.reason(samples)
    _captions(study, said[: len(asked)])
    _answers(study, pairs, said[len(asked) :])


def _captions(study: Study, said: list[str]) -> None:
    true, usual = [e.caption for e in study.raw], [e.caption for e in study.train]
    modes = [Counter(column).most_common(1)[0][0] for column in zip(*map(slots, usual), strict=True)]
    right = np.array([np.equal(slots(a), slots(b)) for a, b in zip(said, true, strict=True)])
    guess = np.array([np.equal(modes, slots(b)) for b in true])
    study.score(
        "caption, slots", right.mean(1), "share right", "higher", {USUAL: guess.mean(1)},
        note=f"Exact agreement of each of {', '.join(SLOTS)} (to 0.1 s) with the true caption; a slot that the true "
        "caption leaves out must be left out.",
        parts={s: {"model": float(right[:, k].mean()), USUAL: float(guess[:, k].mean())} for k, s in enumerate(SLOTS)},
    )  # fmt: skip
    mode = Counter(usual).most_common(1)[0][0]
    study.score(
        "caption, word for word", [float(a == b) for a, b in zip(said, true, strict=True)], "share right", "higher",
        {USUAL: [float(mode == b) for b in true]},
        note="The whole caption, times of impact included, letter by letter.",
    )  # fmt: skip
    study.keep("caption", video=[e.video for e in study.raw], said=said, true=true)


def _answers(study: Study, pairs: list[tuple[int, str, str]], said: list[str]) -> None:
    seen: dict[str, Counter] = {}
    for e in study.train:
        for q, a in e.qa:
            seen.setdefault(q, Counter())[a] += 1
    usual = {q: counts.most_common(1)[0][0] for q, counts in seen.items()}
    right = np.array([float(a == b) for (_, _, a), b in zip(pairs, said, strict=True)])
    guess = np.array([float(usual.get(q) == a) for _, q, a in pairs])
    kinds = [(q, m) for q in usual if (m := np.array([q == k for _, k, _ in pairs])).any()]
    study.score(
        "question answering", right, "share right", "higher", {f"{USUAL}, per question": guess},
        note="The answer, letter by letter.",
        parts={q: {"model": float(right[m].mean()), USUAL: float(guess[m].mean())} for q, m in kinds},
    )  # fmt: skip
    clips = list(dict.fromkeys(i for i, _, _ in pairs))[:EXAMPLES]
    shown = [(clips.index(i), q, a, b) for (i, q, a), b in zip(pairs, said, strict=True) if i in clips]
    columns: dict[str, Any] = dict(
        zip(("clip", "question", "true", "said"), map(list, zip(*shown, strict=True)), strict=True)
    )
    np.savez_compressed(study.out / "question.npz", video=np.stack([study.raw[i].video for i in clips]), **columns)
