"""Still pictures: grids of clips during training, and one poster of a whole run for the README.

In: clips, or a working directory after `evaluate`. Out: PNG.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cosmos_jax.report.html import Missing, png

ROWS = {  # poster: examples file → how its clips came about
    "text2image": "image from text",
    "text2video_sound": "video with sound from text",
    "image2video": "video from its first frame",
    "video2video": "video from its first 5 frames",
    "forward_dynamics": "what 16 actions will do",
    "policy": "driving the simulated robot",
}


def grid(videos: Sequence[np.ndarray], every: int = 4, scale: int = 2) -> bytes:
    """Clips uint8 [T,H,W,3], one per line, every `every`-th frame from left to right, as PNG; short lines end white."""
    strips = [np.concatenate(list(v[::every]), 1) for v in videos]
    width = max(s.shape[1] for s in strips)
    lines = [np.pad(s, ((0, 2), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    return png(np.concatenate(lines), scale)


def poster(workdir: str | Path, path: str | Path, example: int = 0) -> None:
    """One PNG: frames generated and true for several tasks, and the score table. Missing if nothing was evaluated."""
    from matplotlib.figure import Figure  # here, since it takes a second to load

    workdir = Path(workdir)
    if not (workdir / "scores.json").is_file():
        raise Missing(f"{workdir / 'scores.json'} does not exist; run evaluate first.")
    scores = json.loads((workdir / "scores.json").read_text())
    found = [(f, text) for f, text in ROWS.items() if (workdir / "examples" / f"{f}.npz").is_file()]
    figure = Figure(figsize=(15, 1.55 * max(len(found), 1) + 0.6), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.05, 1), squeeze=False)[0]
    left.suptitle("Generated (top) and true (bottom)", fontsize=12, fontweight="bold")
    axes = left.subplots(len(found), 1, squeeze=False)[:, 0] if found else []
    for axis, (file, text) in zip(axes, found, strict=True):
        with np.load(workdir / "examples" / f"{file}.npz") as data:
            made, true, prompt = _pair(data, min(example, len(data["prompt"]) - 1))
        axis.imshow(_strip(made, true), interpolation="nearest", aspect="equal")
        axis.set_title(f"{text}: {textwrap.shorten(prompt, 86, placeholder=' …')}", fontsize=8, loc="left", pad=2)
        axis.axis("off")
    _score_table(right, scores)
    figure.savefig(path, format="png", facecolor="white")


def _pair(data, k: int) -> tuple[np.ndarray, np.ndarray | None, str]:
    """The clip, its truth (what happened after the policy's imagination) and its prompt."""
    if "imagined" in data:
        return data["imagined"][k], data["video"][k][: len(data["imagined"][k])], str(data["prompt"][k])
    return data["video"][k], data["true_video"][k], str(data["prompt"][k])


def _strip(made: np.ndarray, true: np.ndarray | None, every: int = 2) -> np.ndarray:
    """[2·H, …, 3]: frames side by side, white between them; as wide as a whole clip, whatever the length."""
    lines = []
    for clip in (made, true):
        if clip is None:
            continue
        frames = [np.pad(f, ((1, 1), (1, 1), (0, 0)), constant_values=255) for f in clip[::every]]
        blank = [np.full_like(frames[0], 255)] * (9 - len(frames))
        lines.append(np.concatenate(frames + blank, 1))
    return np.concatenate(lines)


def _score_table(figure, scores: dict[str, dict]) -> None:
    figure.suptitle("Scores on held-out episodes", fontsize=12, fontweight="bold")
    axis = figure.subplots()
    axis.axis("off")
    step = 1 / (len(scores) + 1)
    for k, head in zip((0.0, 0.36, 0.63), ("ability", "model", "baselines"), strict=True):
        axis.text(k, 1 - step / 2, head, fontsize=8, color="#667085", va="center")
    for i, (name, s) in enumerate(scores.items()):
        y, colour = 1 - (i + 1.5) * step, "#1d2433" if s["beats"] else "#c4161c"
        rivals = "; ".join(f"{k} {v:.3g}" for k, v in s["baselines"].items())
        axis.text(0, y, name, fontsize=8, va="center", color=colour)
        axis.text(0.36, y, f"{s['value']:.3g} {s['unit']}", fontsize=8, va="center", color=colour, fontweight="bold")
        axis.text(0.63, y, textwrap.fill(rivals, 48), fontsize=6, va="center", color="#667085")
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1)
