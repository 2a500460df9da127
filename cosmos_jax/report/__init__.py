"""One self-contained HTML page about a run: scores, what was made next to the truth, curves, attention masks, facts.

In: a working directory after `evaluate` (scores.json, facts.json, examples/, assets/, metrics.jsonl). Out: report.html,
which needs no other file and no network. What is missing is said in its place, never left out.

    sections (what to say) ─► html, charts, pictures (how it looks) ─► write
"""

from __future__ import annotations

import json
from pathlib import Path

import cosmos_jax.report.sections as sections
from cosmos_jax.report.html import Missing, missing, page
from cosmos_jax.report.pictures import grid, poster

__all__ = ["grid", "poster", "write"]

FILE = "report.html"


def write(workdir: str | Path, scores: dict[str, dict] | None = None) -> Path:
    """Write workdir/report.html and return its path. scores: rows of `evaluate` (default: those in scores.json)."""
    workdir = Path(workdir)
    if scores is None and (workdir / "scores.json").is_file():
        scores = json.loads((workdir / "scores.json").read_text())
    run = sections.Run(workdir, scores or {})
    body = []
    for anchor, title, build in sections.ALL:
        try:
            content = build(run)
        except Missing as e:
            content = missing(title, str(e))
        body.append((anchor, title, content))
    out = workdir / FILE
    out.write_text(page("Cosmos 3 on the toy table-top", sections.summary(run), body), encoding="utf-8")
    return out
