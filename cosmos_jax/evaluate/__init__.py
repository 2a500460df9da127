"""Scores: the trained toy against ground truth and against baselines computed from the same data in the same run.

In: a `Pipeline`. Out: in the working directory, scores.json (one row per ability), facts.json (what ran, where, how
long, and the fine print of every row) and examples/*.npz for the report.

    held-out episodes ─► requests without targets ─► pipeline ─► measure ─► score ◄─ baselines ◄─ training episodes
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from cosmos_jax.config import Config, to_dict
from cosmos_jax.evaluate import control, held_out, language, sound, video
from cosmos_jax.evaluate.study import Study, required

PARTS = (
    language.captions_and_answers,
    video.pictures,
    video.continuation,
    video.forward_dynamics,
    control.inverse_dynamics,
    control.policy,
    sound.text2video_sound,
    held_out.losses,
)


def evaluate(pipeline: Any, workdir: str | Path, config: Config | None = None) -> dict[str, dict]:
    """Score every ability, print the table, write scores.json, facts.json and examples/*.npz; returns the rows.

    pipeline: a `Pipeline` (or anything with its config, assets, spec, applied, generate, reason and held_out_loss).
    config: other settings than the pipeline's, for `evaluate` and `data`. A row is {"value", "unit",
    "baselines": {name: value}, "better": "higher"|"lower", "beats": bool}; `beats` means better than every baseline
    that is not named an upper reference.
    """
    workdir, config = Path(workdir), config or pipeline.config
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=150)
    study = Study.prepare(pipeline, config, workdir / "examples")
    seconds = {}
    for part in PARTS:
        began = time.perf_counter()
        part(study)
        seconds[part.__name__] = round(time.perf_counter() - began, 1)
        console.print(f"evaluated {part.__name__.replace('_', ' ')} in {seconds[part.__name__]:.0f} s")
    facts = describe(pipeline, config) | {"seconds": seconds, "rows": study.details}
    for name, content in (("scores", study.scores), ("facts", facts)):
        (workdir / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    console.print(table(study.scores))
    return study.scores


def describe(pipeline: Any, config: Config) -> dict:
    """What ran, where, with which settings; JSON-able."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": sys.version.split()[0]} | {n: importlib.metadata.version(n) for n in names}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "parameters": sum(x.size for x in jax.tree.leaves(getattr(pipeline, "params", {}))),
        "versions": versions,
        "sampling": dict(pipeline.applied),
        "config": to_dict(config),
    }


def commit() -> str:
    """The git commit of this code, with + for uncommitted changes."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        call = ("git", *words)
        return subprocess.run(call, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        head, dirty = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"
    return head + ("+" if dirty else "")


def table(scores: dict[str, dict]) -> Table:
    """The score table for the console; a row that loses to a baseline is red and says to which."""
    t = Table("ability", "score", "baselines", "verdict", title="Held-out episodes against baselines")
    for name, s in scores.items():
        rivals = "\n".join(f"{k}: {v:.3g}" for k, v in s["baselines"].items())
        t.add_row(name, f"{s['value']:.3g} {s['unit']}", rivals, verdict(s) if s["beats"] else f"[red]{verdict(s)}[/]")
    return t


def verdict(s: dict) -> str:
    """A row's outcome in words."""
    if s["beats"]:
        return "beats its baselines"
    better = (lambda a, b: a > b) if s["better"] == "higher" else (lambda a, b: a < b)
    lost = [k for k, v in s["baselines"].items() if required(k) and not better(s["value"], v)]
    return "does NOT beat " + (" and ".join(lost) or "anything: its value is not a number")
