"""What the report says, section by section.

In: `Run`, a working directory read on demand. Out: HTML. A section raises `Missing` when what it needs is not there.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path

import numpy as np

from cosmos_jax import metrics
from cosmos_jax.config import Config, from_dict
from cosmos_jax.evaluate import verdict
from cosmos_jax.evaluate.study import required
from cosmos_jax.report import layout
from cosmos_jax.report.charts import Line, chart, smooth
from cosmos_jax.report.examples import EXAMPLES
from cosmos_jax.report.html import Missing, card, cards, escape, missing, table
from data_pipelines import loader as loaders
from data_pipelines.packing import fill, plan, tight_bucket
from data_pipelines.schema import MODALITIES
from data_pipelines.tasks import ALL as EVERY
from data_pipelines.tasks import Task
from data_pipelines.toy_world.samples import TASKS, ToyAssets, make_sample
from data_pipelines.toy_world.stream import held_out

UNKNOWN = "unknown"


class Run:
    """A working directory."""

    def __init__(self, workdir: Path, scores: dict[str, dict]):
        self.workdir, self.scores = workdir, scores

    @cached_property
    def facts(self) -> dict:
        path = self.workdir / "facts.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @cached_property
    def history(self) -> list[dict]:
        return metrics.read(self.workdir)

    @property
    def config(self) -> Config:
        if "config" not in self.facts:
            raise Missing(f"{self.workdir / 'facts.json'}, which holds the config, does not exist; run evaluate.")
        return from_dict(self.facts["config"])

    def examples(self, name: str) -> dict[str, np.ndarray]:
        path = self.workdir / "examples" / f"{name}.npz"
        if not path.is_file():
            raise Missing(f"{path} does not exist; run evaluate.")
        with np.load(path) as f:
            return dict(f)

    def assets(self) -> ToyAssets:
        if not (self.workdir / "assets").is_dir():
            raise Missing(f"{self.workdir / 'assets'}, which holds the tokenisers, does not exist; train there first.")
        return ToyAssets.load(self.workdir / "assets")


def summary(run: Run) -> str:
    """What this is, and the verdict in one line."""
    lost = [name for name, s in run.scores.items() if not s["beats"]]
    lead = (
        "<p>A small Cosmos 3 in JAX: one model that captions clips, answers questions, draws, continues videos with "
        "sound, foresees what actions do, reads actions off a clip, and drives a simulated robot. Everything below was "
        "made by this run on episodes that it never trained on.</p>"
    )
    if not run.scores:
        return lead + missing("The verdict", f"{run.workdir / 'scores.json'} does not exist; run evaluate.")
    n = len(run.scores)
    lead += f'<p><b class="good">{n - len(lost)} of {n} rows beat every baseline they have to beat.</b>'
    if lost:
        lead += f' <b class="bad">{len(lost)} do not: {escape("; ".join(lost))}.</b>'
    return lead + "</p>"


def score_table(run: Run) -> str:
    if not run.scores:
        raise Missing(f"{run.workdir / 'scores.json'} does not exist; run evaluate.")
    rows, css = [], []
    for name, s in run.scores.items():
        detail = run.facts.get("rows", {}).get(name, {})
        value = f"<b>{s['value']:.3g}</b> {escape(s['unit'])}"
        if "standard_error" in detail:
            value += f'<div class="note">± {detail["standard_error"]:.2g} (n = {detail["n"]})</div>'
        rivals = "".join(
            f'<div class="{"" if required(k) else "upper"}">{escape(k)}: {v:.3g}</div>'
            for k, v in s["baselines"].items()
        )
        note = escape(detail.get("note", "")) + _parts(detail.get("parts", {}))
        said = escape(verdict(s))
        if "narrow" in detail:
            said += f'<div class="note">within two standard errors of {escape(" and ".join(detail["narrow"]))}</div>'
        said = f'<td class="verdict {"good" if s["beats"] else "bad"}">{said}</td>'
        arrow = "higher is better" if s["better"] == "higher" else "lower is better"
        rows.append([f'{escape(name)}<div class="note">{arrow}</div>', f'<td class="number">{value}</td>', rivals, said,
                     f'<span class="note">{note}</span>'])  # fmt: skip
        css.append("" if s["beats"] else "lost")
    lead = (
        "<p>Every baseline was computed in the same run from the same data. ± is one standard error of the mean over "
        "samples; a difference of less than two standard errors may be chance. An upper reference is not to be "
        "beaten: it shows what is possible.</p>"
    )
    return lead + table(["ability", "model", "baselines", "verdict", "what is measured"], rows, css)


def _parts(parts: dict) -> str:
    if not parts:
        return ""
    lines = "".join(
        f"<div>{escape(k)}: {', '.join(f'{escape(who)} {x:.2f}' for who, x in v.items())}</div>"
        for k, v in parts.items()
    )
    return f"<details><summary>part by part</summary>{lines}</details>"


def made(run: Run) -> str:
    """Every task's examples, or why there are none."""
    out = ["<p>Clips loop without sound; those with a sound track start when you press play.</p>"]
    for t in (t for t in TASKS if t.name in EXAMPLES):
        how = ", ".join(f"{k} {v}" for k, v in run.facts.get("sampling", {}).get(t.name, {}).items())
        out.append(
            f'<h3 id="task-{t.name}">{t.name}</h3><p class="soft">{escape(t.summary)}{_given(t)} <i>{how}</i></p>'
        )
        for file, build in EXAMPLES[t.name]:
            try:
                out.append(build(run.examples(file)))
            except Missing as e:
                out.append(missing(f"{t.name}: {file}", str(e)))
    return "".join(out)


def _given(t: Task) -> str:
    if t.clean_frames == EVERY or not t.clean_frames:
        return "."
    frames = 1 + 4 * (t.clean_frames - 1)
    return f". Given: the first {f'{frames} frames' if frames > 1 else 'frame'}."


def curves(run: Run) -> str:
    rows = run.history
    if not rows:
        raise Missing(f"{run.workdir / metrics.FILE} does not exist or is empty; train there first.")
    steps = np.array([r["step"] for r in rows])

    def series(*keys: str, names: list[str] | None = None) -> list[Line]:
        out = []
        for i, key in enumerate(keys):
            y = np.array([r.get(key, math.nan) for r in rows])
            name = (names or list(keys))[i]
            out += [Line(name, steps, y, faint=True, colour=i), Line(name, steps, smooth(y), colour=i)]
        return out

    names = [*MODALITIES, "text"]
    sigma = sorted({k for r in rows for k in r if k.startswith("loss/sigma_")})
    quarter = [f"{i / len(sigma):.2g}–{(i + 1) / len(sigma):.2g}" for i in range(len(sigma))]
    drawn = [
        chart("total loss", series("loss"), "step", log=True),
        chart("loss by modality", series(*(f"loss/{m}" for m in names), names=names), "step", log=True),
        chart("generation loss by noise level σ", series(*sigma, names=quarter), "step", log=True),
        chart("text: share of answer tokens predicted", series("text/accuracy", names=["accuracy"]), "step"),
        chart("gradient norm before clipping", series("grad_norm"), "step", log=True),
        chart("tokens per second", series("tokens_per_second", names=["tokens/s"]), "step"),
    ]
    return f'<div class="charts">{"".join(card("", d) for d in drawn)}</div>'


def tokens(run: Run) -> str:
    """One real sample of each task, packed alone, and one row of a training batch."""
    config, assets = run.config, run.assets()
    spec, source = config.model.sequence, held_out(config.data.eval_episodes, config.data.eval_split)
    episode = next((e for e in source if e.onsets), source[0])
    out = [
        "<p>For each task, the two streams of one real sample and its attention mask, both read from the packed batch. "
        "Lines are queries, columns keys; a cell has the colour of its key, white is not seen; the bands name the "
        "tokens; the dotted line divides <i>und</i> from <i>gen</i>. Text is causal and never sees the generator; the "
        "generator sees all of both. Clean tokens are conditions, noisy ones are denoised and supervised.</p>"
        f"<p>{layout.key()}</p>"
    ]
    items = []
    for t in TASKS:
        try:
            p = plan(make_sample(assets.encode(episode), t.name), assets.tokenizer, spec)
        except ValueError as e:  # a model without sound or actions
            items.append(card(f"<b>{t.name}</b>", missing(t.name, str(e))))
            continue
        batch = fill([[p]], tight_bucket([p], 1, round_to=1), spec)
        n = layout.mask(batch, 0)
        shown = f"{len(p.ids)} und + {p.size['gen']} gen tokens; {n.mean():.0%} of the square is seen"
        items.append(card(f"<b>{t.name}</b>", f"<div style='width:100%'>{layout.strips(batch, 0)}</div>",
                          layout.draw(batch, 0, shown, 2)))  # fmt: skip
    out.append(cards(items))
    what = loaders.toy(source, config.data, spec, assets, config.flow.shift_image, config.flow.shift_video)
    loader = loaders.Loader(*what, config.data.look_ahead)
    batch = next(loader)
    held = int((batch["segment_sample_id"][0] >= 0).sum())
    out.append(
        f"<h3>A row of a training batch</h3><p>{held} samples share this row; nothing sees across their borders. "
        f"{loader.efficiency:.1%} of the token slots of this batch are filled.</p>{layout.strips(batch, 0)}"
        + layout.draw(batch, 0, "the mask of the whole row", 2).replace(
            'class="mask"', 'class="mask" style="max-width:560px"'
        )
    )
    return "".join(out)


def facts(run: Run) -> str:
    """Where and how this ran."""
    f, rows = run.facts, run.history
    if not f and not rows:
        raise Missing(f"neither facts.json nor {metrics.FILE} is in {run.workdir}; train and evaluate there.")
    rate = [r["tokens_per_second"] for r in rows if "tokens_per_second" in r]
    work = [r["model_tflops"] for r in rows if "model_tflops" in r]
    seconds, commit = f.get("seconds", {}), f.get("commit", UNKNOWN)
    by_part = ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
    speed = f"{np.median(rate):,.0f} tokens/s, {np.median(work):.3g} model TFLOP/s (medians)" if rate else UNKNOWN
    spent = f"about {_minutes(rows):.0f} min of steps, compilation and checkpoints not counted" if rate else UNKNOWN
    lines = {
        "evaluated": f.get("date", UNKNOWN),
        "git commit": commit + (" (+ = with uncommitted changes)" if commit.endswith("+") else ""),
        "device": f.get("device", UNKNOWN),
        "parameters": f"{f['parameters']:,}" if "parameters" in f else UNKNOWN,
        "training steps": str(int(rows[-1]["step"])) if rows else f"{UNKNOWN} (no {metrics.FILE})",
        "training speed": speed,
        "training time": spent,
        "evaluation time": f"{sum(seconds.values()):.0f} s ({by_part})" if seconds else UNKNOWN,
        "versions": ", ".join(f"{k} {v}" for k, v in f.get("versions", {}).items()) or UNKNOWN,
    }  # fmt: skip
    body = table(["", ""], [[escape(k), escape(v)] for k, v in lines.items()])
    for title, key in (("Sampling settings", "sampling"), ("Config", "config")):
        text = escape(json.dumps(f[key], indent=1)) if key in f else UNKNOWN
        body += f"<details><summary>{title}</summary><pre>{text}</pre></details>"
    return body


def _minutes(rows: list[dict]) -> float:
    """Time of the steps, from their rates: tokens of the logged steps stand for those between."""
    total, before = 0.0, 0
    for r in rows:
        if "tokens_per_second" in r:
            total += (r["step"] - before) * (r["tokens/und"] + r["tokens/gen"]) / r["tokens_per_second"]
        before = r["step"]
    return total / 60


ALL = (
    ("scores", "Scores", score_table),
    ("made", "What it made", made),
    ("curves", "Training", curves),
    ("tokens", "How samples become tokens, and who sees whom", tokens),
    ("facts", "Facts of this run", facts),
)
