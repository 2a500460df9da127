"""The look of the comparison: one HTML page with inline SVG charts, on the style of the project's other report.

In: a `run.Result`, its verdict, the explanations. Out: HTML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cosmos_jax.parity import rows
from cosmos_jax.parity.rows import Row
from cosmos_jax.report.charts import Line, chart
from cosmos_jax.report.html import card, escape, page, table

if TYPE_CHECKING:
    from cosmos_jax.parity.run import Result

TITLE = "Parity with PyTorch"
LOW, HIGH = -4.0, 1.0  # decades of error/threshold in the overview
STYLE = """<style>.verdict-line { font-size:20px; margin:14px 0 18px; max-width:none }
td.number, th.number { text-align:right } .overview { background:var(--paper); border:1px solid var(--line);
border-radius:12px; padding:16px; margin:8px 0 4px } .overview svg { width:100% } section table { margin:4px 0 18px }
td.number { font-family:ui-monospace,monospace; font-size:13px } .charts { margin:14px 0 22px } h3 { margin-top:26px }
dt { font-weight:600; margin-top:10px } dd { margin:2px 0 0; max-width:80ch }</style>"""


def html(result: Result, headline: str, explained: Iterable[tuple[str, str]]) -> str:
    """The whole document."""
    good = not rows.failures(result.rows)
    mood = "good" if good else "bad"
    compared = ", ".join(f"{n} ({count:,} parameters)" for n, count in result.facts["parameters"].items())
    lead = (
        f'{STYLE}<p class="verdict-line {mood}"><b>{escape(headline)}</b></p>'
        "<p>The same inputs through PyTorch (diffusers, transformers) and through this project's JAX code, in float32, "
        f"from the same checkpoint: {escape(compared)}. Every array between the two ends is compared too, layer by "
        "layer and step by step.</p>"
    )
    body = [("overview", "Overview", overview(result))]
    for name in components(result.rows):
        own = [r for r in result.rows if r.component == name]
        body.append((name.replace(" ", "-"), name[0].upper() + name[1:], component(own)))
    reading = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in explained)
    body.append(("reading", "How to read it", f"<dl>{reading}</dl>"))
    body.append(("facts", "Facts of this run", facts(result)))
    return page(TITLE, lead, body)


def overview(result: Result) -> str:
    """A dot for every row on the scale of its own threshold, and a table."""
    lines, css = [], []
    for name in components(result.rows):
        own = [r for r in result.rows if r.component == name]
        bad, w = rows.failures(own), worst(own)
        mood = "bad" if bad else "good"
        said = f'<td class="verdict {mood}">{f"{len(bad)} FAIL" if bad else "pass"}</td>'
        first = rows.first_divergence(own)
        where = f"first divergence: {first.part}, {first.what}" if first else f"{w.part}, {w.what}"
        link = f'<a href="#{name.replace(" ", "-")}">{escape(name)}</a>'
        lines.append([link, _right(str(len(own))), said, _right(number(w.rel)), _right(number(w.limit)),
                      _right(floor(w)), f'<span class="note">{escape(where)}</span>'])  # fmt: skip
        css.append("lost" if bad else "")
    head = ["component", "rows", "verdict", "closest to its threshold", "threshold", "noise floor", "where"]
    notes = "".join(f'<p class="note">{escape(n)}</p>' for n in result.notes)
    return f'<div class="overview">{dots(result.rows)}</div>{table(head, lines, css)}{notes}'


def dots(found: list[Row]) -> str:
    """Error over threshold, logarithmic: left of the line is a pass. Rows without tolerance are passes or fails."""
    names, width, left, step = components(found), 1040, 170, 30
    height = 46 + step * len(names)
    span = width - left - 20

    def px(value: float) -> float:
        decade = math.log10(value) if value > 0 else LOW
        return left + span * (min(max(decade, LOW), HIGH) - LOW) / (HIGH - LOW)

    out = []
    for d in range(int(LOW), int(HIGH) + 1):
        x = px(10.0**d)
        stroke, w = ("#c4161c", 1.6) if d == 0 else ("#e4e7ec", 1)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 34}" stroke="{stroke}" stroke-width="{w}"/>')
        text = "threshold" if d == 0 else f"1/{10**-d:,}" if d < 0 else f"{10**d}×"
        out.append(f'<text x="{x:.1f}" y="{height - 18}" text-anchor="middle">{text}</text>')
    for k, name in enumerate(names):
        y = 22 + step * k
        out.append(f'<text class="title" x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for i, r in enumerate(r for r in found if r.component == name):
            share = r.rel / r.limit if r.limit else (0.0 if r.passed else math.inf)
            colour = "#2557d6" if r.passed else "#c4161c"
            hint = escape(f"{r.part}: {r.what}: relL2 {number(r.rel)}, threshold {number(r.limit)}")
            out.append(
                f'<circle cx="{px(share):.1f}" cy="{y + (i * 7 % 17) - 8}" r="{3 if r.passed else 4.5}" fill="{colour}" '
                f'fill-opacity="{0.45 if r.passed else 0.9}"><title>{hint}</title></circle>'
            )
    label = "every comparison as a share of its own threshold; at the left edge: equal, bit for bit, or below 1/10,000"
    out.append(f'<text x="{left}" y="{height - 2}">{label}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(out)}</svg>'


def component(own: list[Row]) -> str:
    """Charts, then a table for each part; the rows that a chart shows are folded away."""
    drawn = charts(own)
    out = f'<div class="charts wide">{"".join(card("", d) for d in drawn)}</div>' if drawn else ""
    for part, group in groups(own):
        plotted = [r for r in group if r.plot]
        plain = [r for r in group if not r.plot]
        bad = rows.failures(plotted)
        out += f"<h3>{escape(part)}</h3>"
        out += _table(plain + bad)
        if plotted:
            w = worst(plotted)
            said = f"all {len(plotted)} rows of the charts; closest to its threshold: {w.what}, {number(w.rel)}"
            out += f"<details><summary>{escape(said)}</summary>{_table(plotted)}</details>"
    return out


def charts(own: list[Row]) -> list[str]:
    """One for each plot: our error, the noise floor, the threshold."""
    out = []
    for plot in dict.fromkeys(r.plot for r in own if r.plot):
        here = [r for r in own if r.plot == plot]
        lines = []
        for colour, name in enumerate((rows.ADDED, rows.ALONE)):
            lines += _line(name, [(r.index, r.rel) for r in here if r.line == name], colour)
        lines += _line("noise floor", [(r.index, r.floor) for r in here if r.floor], 2, dashed=True)
        for k, limit in enumerate(dict.fromkeys(r.limit for r in here if r.line == rows.ADDED) or {here[0].limit}):
            edge = [r.index for r in here if r.limit == limit]
            if k == 0 or len(edge) > 1:
                lines += _line("threshold" if not k else "", [(i, limit) for i in (min(edge), max(edge))], 6, dashed=True)
        out.append(chart(plot, lines, plot.rsplit(" ", 1)[-1], log=True, width=520, height=250))
    return out


def _line(name: str, points: list[tuple], colour: int, dashed: bool = False) -> list[Line]:
    if not points:
        return []
    x, y = (np.array(v, float) for v in zip(*sorted(points), strict=True))
    return [Line(name, x, y, dashed=dashed, colour=colour)]


def _table(found: list[Row]) -> str:
    if not found:
        return ""
    lines = []
    for r in found:
        mood = "good" if r.passed else "bad"
        what = escape(r.what) + (f'<div class="note">{escape(r.note)}</div>' if r.note else "")
        source = f' <span class="note">{r.floor_from}</span>' if r.floor_from not in ("", "measured") else ""
        lines.append([what, _right(number(r.rel)), _right(number(r.peak)), _right(number(r.floor) + source),
                      _right(number(r.limit)), f'<td class="verdict {mood}">{r.verdict}</td>'])  # fmt: skip
    css = ["" if r.passed else "lost" for r in found]
    return table(["what", "relL2", "max/rms", "noise floor", "threshold", "verdict"], lines, css)


def _right(text: str) -> str:
    return f'<td class="number">{text}</td>'


def facts(result: Result) -> str:
    """Where and how this ran."""
    f = result.facts
    lines = {
        "reference": f["reference"], "layout": f["layout"],
        "stored as": ", ".join(f"{n}: {' and '.join(d)}" for n, d in f["dtypes"].items()),
        "date": f["date"], "git commit": f["commit"], "host": f["host"], "JAX runs on": f["jax device"],
        "PyTorch runs on": f["torch device"], "versions": ", ".join(f"{k} {v}" for k, v in f["versions"].items()),
        "seconds": ", ".join(f"{k} {v:.0f}" for k, v in result.seconds.items()),
    }  # fmt: skip
    body = table(["", ""], [[escape(k), escape(v)] for k, v in lines.items()])
    text = escape(json.dumps(f["configs"], indent=1))
    return f"{body}<details><summary>Configurations</summary><pre>{text}</pre></details>"


def components(found: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(r.component for r in found))


def groups(found: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by part, in their order."""
    out: dict[str, list[Row]] = {}
    for r in found:
        out.setdefault(r.part, []).append(r)
    return list(out.items())


def worst(found: Iterable[Row]) -> Row:
    """The row that comes closest to its threshold, or exceeds it most."""
    return max(found, key=lambda r: r.rel / r.limit if r.limit else (0.0 if r.passed else math.inf))


def number(x: float | None) -> str:
    return "–" if x is None else "0" if x == 0 else f"{x:.1e}"


def floor(r: Row) -> str:
    return number(r.floor) + (f" ({r.floor_from})" if r.floor_from not in ("", "measured") else "")
