"""One self-contained page that shows what the model learnt.

In: a working directory after `train` and `evaluate`. Out: report.html, which needs no network: every picture, clip and
sound is inside it. What does not exist is said to be missing; a score that loses to its baseline is red.
"""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib
import numpy as np

from cosmos_jax import checkpoint, media, metrics
from cosmos_jax.config import Config
from cosmos_jax.pipeline import ASSETS, CHECKPOINTS
from data_pipelines.packing import fill, plan, tight_bucket
from data_pipelines.tasks import TABLE
from data_pipelines.toy_world.episodes import make_episode
from data_pipelines.toy_world.samples import ToyAssets, make_sample
from data_pipelines.toy_world.sound import RATE
from data_pipelines.toy_world.stream import EVAL_SEED

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SCALE = 4  # pixels are enlarged this much
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1,h2{line-height:1.2} table{border-collapse:collapse;width:100%} td,th{padding:.35em .6em;border-bottom:1px solid #ddd;
text-align:left;vertical-align:top} .bad{color:#b00020;font-weight:600} .good{color:#1b7a34} .row{display:flex;
flex-wrap:wrap;gap:1em} figure{margin:0;width:200px} figcaption{font-size:13px;color:#555} video,img{max-width:100%}
.pix{image-rendering:pixelated} code{background:#f3f3f3;padding:.1em .3em} .missing{color:#b00020}"""


def write(workdir: str | Path, scores: dict[str, dict] | None = None) -> Path:
    """Write workdir/report.html and return its path. scores: default workdir/scores.json."""
    workdir = Path(workdir)
    scores = json.loads((workdir / "scores.json").read_text()) if scores is None else scores
    config = checkpoint.load_config(workdir / CHECKPOINTS)
    settings = _json(workdir / "settings.json")
    parts = [
        "<h1>What a small Cosmos 3 learnt</h1>",
        f"<p>{facts(workdir, config)}</p>",
        "<h2>Scores on episodes it never saw</h2>",
        score_table(scores),
        *gallery(workdir / "examples", settings),
        "<h2>Training</h2>",
        _picture(curves(metrics.read(workdir))),
        "<h2>What the tokens are, and who sees whom</h2>",
        "<p>From real packed batches, one sample of each task. Left: the streams, token by token. Right: the attention "
        "mask, rows are queries, columns keys; text (und) is causal, generation sees all text and all of itself.</p>",
        _picture(layouts(config, ToyAssets.load(workdir / ASSETS))),
    ]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Cosmos toy</title><style>{STYLE}</style>"
    path = workdir / "report.html"
    path.write_text(page + "\n".join(parts) + "</html>\n")
    return path


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def facts(workdir: Path, config: Config) -> str:
    """Where, with what and how long: one paragraph."""
    rows = metrics.read(workdir)
    device = jax.devices()[0]
    tokens = np.median([r["tokens_per_second"] for r in rows]) if rows else float("nan")
    last = rows[-1]["step"] if rows else 0
    return html.escape(
        f"Model {config.model.name}: {config.model.layers} layers × {config.model.hidden}, trained for {last} steps of "
        f"{config.data.bucket.rows} packs at {tokens:,.0f} tokens/s (median). Evaluated on {jax.device_count()} × "
        f"{device.device_kind}, jax {version('jax')}, Python {platform.python_version()}. Sampling: {config.sample.steps} "
        f"{config.sample.solver} steps, guidance {config.sample.guidance} where the task uses it."
    )


def score_table(scores: dict[str, dict]) -> str:
    """HTML table; losing rows are red and counted in words."""
    rows = []
    for name, s in scores.items():
        rivals = ", ".join(f"{html.escape(k)}: {v:.3g}" for k, v in s["baselines"].items())
        kind, verdict = ("good", "beats its baselines") if s["beats"] else ("bad", "does NOT beat its baselines")
        cells = (html.escape(name), f"{s['value']:.3g} {html.escape(s['unit'])}", f"{s['better']} is better", rivals)
        rows.append(f"<tr class={kind}>" + "".join(f"<td>{c}</td>" for c in (*cells, verdict)) + "</tr>")
    lost = [n for n, s in scores.items() if not s["beats"]]
    note = f"<p class=bad>{len(lost)} of {len(scores)} rows do not beat their baselines: {html.escape(', '.join(lost))}.</p>"
    head = "<tr><th>what<th>score<th><th>baselines, same data and run<th>verdict</tr>"
    return f"<table>{head}{''.join(rows)}</table>" + (note if lost else f"<p class=good>All {len(scores)} rows do.</p>")


def gallery(examples: Path, settings: dict) -> list[str]:
    """One section per task: what was asked, what came out, what was true."""
    out = []
    for task in TABLE:
        out.append(f"<h2>{task.name.replace('_', ' ')}: {html.escape(task.summary)}</h2>")
        if task.name in settings:
            out.append(f"<p><code>{html.escape(json.dumps(settings[task.name]))}</code></p>")
        path = examples / f"{task.name}.npz"
        if not path.exists():
            out.append(f"<p class=missing>Not available: {path.name} was not written by the evaluation.</p>")
            continue
        with np.load(path) as f:
            data = dict(f)
        show = {"reason": _reason, "inverse_dynamics": _actions, "policy": _rollouts}.get(task.name, _clips)
        out.append(show(data))
    return out


def _clips(d: dict) -> str:
    """Generated beside true, with sound where there is some."""
    figures = []
    for i, prompt in enumerate(d["prompt"]):
        for name, key, sound in (("generated", "video", "sound"), ("true", "true", "true_sound")):
            wave = d[sound][i] if sound in d else None
            figures.append(_figure(d[key][i], f"{name}: {prompt}", wave))
    return f"<div class=row>{''.join(figures)}</div>"


def _figure(video: np.ndarray, caption: str, sound: np.ndarray | None = None) -> str:
    if len(video) == 1:
        buffer = io.BytesIO()
        media.write_png(buffer, video[0], SCALE)
        inner = f"<img class=pix src='{_data(buffer, 'image/png')}'>"
    else:
        buffer = io.BytesIO()
        media.write_mp4(buffer, video, 10.0, sound, RATE, SCALE)
        muted = "muted autoplay" if sound is None else ""
        inner = f"<video controls loop {muted} src='{_data(buffer, 'video/mp4')}'></video>"
    return f"<figure>{inner}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _reason(d: dict) -> str:
    figures = []
    for video, said, true in zip(d["video"], d["caption"], d["caption_true"], strict=True):
        figures.append(_figure(video, f"says: {said} — true: {true}"))
    rows = [
        f"<tr class={'good' if a == t else 'bad'}><td>{html.escape(q)}<td>{html.escape(a)}<td>{html.escape(t)}</tr>"
        for q, a, t in zip(d["question"], d["answer"], d["answer_true"], strict=True)
    ]
    table = f"<table><tr><th>question<th>answer<th>truth</tr>{''.join(rows[:14])}</table>"
    return f"<div class=row>{''.join(figures)}</div>{table}"


def _actions(d: dict) -> str:
    names = {0: "forward", 1: "sideways", 4: "turn", 9: "gripper"}
    fig, axes = plt.subplots(len(d["true"]), len(names), figsize=(11, 1.7 * len(d["true"])), squeeze=False)
    for i, line in enumerate(axes):
        for ax, (channel, name) in zip(line, names.items(), strict=True):
            ax.plot(d["true"][i][:, channel], "k", lw=1, label="true")
            ax.plot(d["got"][i][:, channel], "C1", lw=1.5, label="inferred")
            ax.set_ylim(-1.6, 1.6)
            ax.set_title(name if i == 0 else "", fontsize=9)
    axes[0][0].legend(fontsize=7)
    fig.tight_layout()
    figures = "".join(_figure(v, "the clip whose actions are inferred") for v in d["video"])
    return _picture(fig) + f"<div class=row>{figures}</div>"


def _rollouts(d: dict) -> str:
    words = ("not done", "done")
    items = zip(d["video"], d["prompt"], d["success"], strict=True)
    figures = "".join(_figure(v, f"{p} — {words[int(s)]}") for v, p, s in items)
    return f"<p>In the simulator, actions from the model.</p><div class=row>{figures}</div>"


def curves(rows: Sequence[dict]) -> plt.Figure:
    """Loss in total, per modality and per sigma bucket, against the step."""
    keys = sorted({k for r in rows for k in r if k.startswith("loss/")})
    groups = {
        "all": ["loss"],
        "per modality": [k for k in keys if "sigma" not in k],
        "per quarter of sigma": [k for k in keys if "sigma" in k],
    }
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for ax, (title, names) in zip(axes, groups.items(), strict=True):
        for name in names:
            at = [r["step"] for r in rows if name in r]
            ax.plot(at, _smooth([r[name] for r in rows if name in r]), label=name.removeprefix("loss/"), lw=1.2)
        ax.set(title=title, xlabel="step", yscale="log")
        ax.legend(fontsize=7)
    fig.tight_layout()
    return fig


def _smooth(x: Sequence[float], width: int = 5) -> np.ndarray:
    y = np.asarray(x, float)
    if len(y) < width:
        return y
    return np.convolve(np.pad(y, (width // 2, width // 2), mode="edge"), np.ones(width) / width, "valid")


def layouts(config: Config, assets: ToyAssets) -> plt.Figure:
    """Token layout and attention mask of one packed sample per task."""
    spec = config.model.sequence
    e = assets.encode(make_episode(EVAL_SEED))
    fig, axes = plt.subplots(len(TABLE), 2, figsize=(11, 2.3 * len(TABLE)), width_ratios=(3, 1), squeeze=False)
    colours = matplotlib.colors.ListedColormap(
        ["#ffffff", "#8d99ae", "#2b6cb0", "#a3c9f1", "#c05621", "#f6c89f", "#2f855a"]
    )
    for (left, right), task in zip(axes, TABLE, strict=True):
        p = plan(make_sample(e, task.name), assets.tokenizer, spec)
        batch = fill([[p]], tight_bucket([p], 1, round_to=1), spec)
        und, gen = batch["und_segment_ids"][0], batch["gen_segment_ids"][0]
        kinds = np.ones(len(und) + len(gen), int)
        kinds[: len(und)][batch["und_vit_index"][0] >= 0] = 6
        for m, noisy in (("vision", 2), ("action", 4), ("sound", 4)):
            where = batch[f"{m}_index"][0]
            kinds[len(und) + where] = np.where(batch[f"{m}_noisy"][0], noisy, noisy + 1)
        left.imshow(kinds[None], aspect="auto", cmap=colours, vmin=0, vmax=6, interpolation="nearest")
        left.set(yticks=[], title=f"{task.name}: {len(und)} und + {len(gen)} gen tokens")
        right.imshow(mask(und, gen), cmap="Greys", interpolation="nearest")
        right.set(xticks=[], yticks=[])
    names = ("text", "noisy video", "clean video", "noisy action / sound", "clean action", "ViT features")
    patches = [matplotlib.patches.Patch(color=colours(i + 1), label=n) for i, n in enumerate(names)]
    fig.legend(handles=patches, ncol=6, loc="lower center", fontsize=8)
    fig.tight_layout(rect=(0, 0.02, 1, 1))
    return fig


def mask(und: np.ndarray, gen: np.ndarray) -> np.ndarray:
    """Segment ids of the two streams → bool [U+G, U+G]: what the attention call lets each token see."""
    ids, u = np.concatenate([und, gen]), len(und)
    see = (ids[:, None] == ids[None]) & (ids[:, None] >= 0)
    see[:u, :u] &= np.tril(np.ones((u, u), bool))
    see[:u, u:] = False
    return see


def grid(clips: Sequence[np.ndarray], every: int = 4) -> np.ndarray:
    """Clips [T,H,W,3] → one uint8 picture, a clip per line, every `every`-th frame."""
    width = max(len(c[::every]) for c in clips)
    lines = [np.concatenate([*c[::every], *[np.zeros_like(c[0])] * (width - len(c[::every]))], 1) for c in clips]
    return np.concatenate(lines, 0)


def poster(workdir: str | Path, path: str | Path) -> None:
    """The README's picture: generated above true, for several tasks."""
    examples = Path(workdir) / "examples"
    names = ("text2video_sound", "video2video", "forward_dynamics")
    fig, axes = plt.subplots(len(names), 1, figsize=(9, 1.0 + 2.2 * len(names)))
    for ax, name in zip(axes, names, strict=True):
        with np.load(examples / f"{name}.npz") as d:
            picture = grid([d["video"][0], d["true"][0]], 2)
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(f"{name.replace('_', ' ')} — above: generated, below: true\n{d['prompt'][0]}", fontsize=9)
        ax.axis("off")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _picture(fig: plt.Figure) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=90)
    plt.close(fig)
    return f"<img src='{_data(buffer, 'image/png')}'>"


def _data(buffer: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
