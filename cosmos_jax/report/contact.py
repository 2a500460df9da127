"""A contact sheet: one page over everything that a batch of requests has made.

In: a folder with one folder per request, each with its run.json. Out: index.html beside them, which shows the files
where they lie (nothing is copied into the page).
"""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from cosmos_jax import outputs
from cosmos_jax.report.html import card, cards, escape, page, table

FILE = "index.html"
SHOWN = ("task", "seed", "steps", "guidance", "shift", "height", "width", "num_frames", "fps", "seconds")
PROMPT = 400  # characters


def write(out: Path, names: list[str]) -> Path:
    """The page about these requests, in their order."""
    runs = {n: json.loads((out / n / outputs.RECORD).read_text(encoding="utf-8")) for n in names}
    rows = [[_link(n), *(escape(_short(run.get(k))) for k in SHOWN)] for n, run in runs.items()]
    body = [("made", "What was made", cards([_card(n, run) for n, run in runs.items()], "wide"))]
    body.append(("settings", "Settings", table(["request", *SHOWN], rows)))
    done = f"<p>{len(runs)} request{'s' * (len(runs) != 1)}; every folder has its own run.json.</p>"
    with outputs.appearing(out / FILE) as path:
        path.write_text(page("Contact sheet", done, body), encoding="utf-8")
    return out / FILE


def _card(name: str, run: dict) -> str:
    files = [_file(f"{quote(name)}/{quote(f)}", f) for f in run["files"]]
    prompt = run.get("prompt") or ""
    text = escape(prompt[:PROMPT] + ("…" if len(prompt) > PROMPT else ""))
    return card(f"<b>{_link(name)}</b> <span class='soft'>{escape(run.get('task', ''))}</span><br>{text}", *files)


def _file(where: str, name: str) -> str:
    if name.endswith(".mp4"):
        play = "controls loop playsinline"
        return f'<figure><video style="width:100%;max-width:440px" {play} src="{where}"></video></figure>'
    if name.endswith(".png"):
        return f'<figure><img style="width:100%;max-width:440px" alt="" src="{where}"></figure>'
    if name.endswith(".wav"):
        return f'<figure><audio controls src="{where}"></audio></figure>'
    return f'<p><a href="{where}">{escape(name)}</a></p>'


def _link(name: str) -> str:
    return f'<a href="{quote(name)}/{outputs.RECORD}">{escape(name)}</a>'


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)
