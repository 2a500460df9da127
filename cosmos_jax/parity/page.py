"""The look of the comparison: one HTML page on the style of the project's other report.

In: a `run.Result`, its verdict, the explanations. Out: HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cosmos_jax.parity import figures, rows
from cosmos_jax.parity.rows import Row
from cosmos_jax.report.html import escape, page, table

if TYPE_CHECKING:
    from cosmos_jax.parity.run import Result

TITLE = "Parity with PyTorch"
STYLE = """<style>
header p { max-width:88ch } .verdict-line { font-size:20px; margin:14px 0 18px }
.sheet { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:14px 16px;
  margin:10px 0 16px }
.sheet svg { width:100%; display:block } .sheet p { margin:8px 0 0; max-width:none }
.plots { display:grid; grid-template-columns:repeat(auto-fit,minmax(420px,1fr)); gap:16px; margin:10px 0 16px }
.plots figure { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:8px 10px 4px }
.plots svg { width:100%; display:block }
td.number, th.number { text-align:right; white-space:nowrap; font-size:13px }
td.number { font-family:ui-monospace,SFMono-Regular,Menlo,monospace }
td.first { color:var(--soft); min-width:9em } details { margin:8px 0 0 } details table { margin-top:8px }
dt { font-weight:600; margin-top:12px } dd { margin:2px 0 0; max-width:84ch }
td a { color:var(--accent); white-space:nowrap }
</style>"""


def html(result: Result, headline: str, explained: Iterable[tuple[str, str]]) -> str:
    """The whole document."""
    mood = "bad" if rows.failures(result.rows) else "good"
    compared = ", ".join(f"{n} ({count:,} parameters)" for n, count in result.facts["parameters"].items())
    lead = (
        f'{STYLE}<p class="verdict-line {mood}"><b>{escape(headline)}</b></p>'
        "<p>The same inputs through PyTorch (diffusers, transformers) and through this project's JAX code, in float32, "
        f"from the same checkpoint: {escape(compared)}. What lies between input and output is compared too, layer by "
        "layer and step by step.</p>"
    )
    body = [("overview", "Overview", overview(result))]
    for name, own in groups(result.rows, lambda r: r.component):
        body.append((_anchor(name), name[0].upper() + name[1:], component(own)))
    reading = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in explained)
    body.append(("reading", "Reading it", f"<dl>{reading}</dl>"))
    body.append(("facts", "Facts", facts(result)))
    return page(TITLE, lead, body)


def overview(result: Result) -> str:
    """A dot for every row, and a line for every component."""
    lines, css = [], []
    for name, own in groups(result.rows, lambda r: r.component):
        bad, first, w = rows.failures(own), rows.first_divergence(own), worst(own)
        where = f"first divergence: {first.part}, {first.what}" if first else f"{w.part}, {w.what}"
        lines.append([
            f'<a href="#{_anchor(name)}">{escape(name)}</a>', _right(str(len(own))), _verdict(bad),
            _right(number(w.rel)), _right(number(w.limit)), _right(floor(w)),
            f'<span class="note">{escape(where)}</span>', _right(half(own)),
        ])  # fmt: skip
        css.append("lost" if bad else "")
    head = ["component", ">rows", "verdict", ">largest error", ">its threshold", ">noise floor", "where",
            ">bfloat16, ours / theirs"]  # fmt: skip
    notes = "".join(f'<p class="note">{escape(n)}</p>' for n in result.notes)
    picture = f'<div class="sheet">{figures.dots(result.rows)}<p class="note">{escape(figures.LABEL)}</p></div>'
    return picture + _sheet(head, lines, css) + notes


def component(own: list[Row]) -> str:
    """Charts; a table in which each chart is one line; all rows of the charts, folded away."""
    drawn = figures.by_depth(own)
    out = f'<div class="plots">{"".join(f"<figure>{d}</figure>" for d in drawn)}</div>' if drawn else ""
    shown: list[tuple[Row, str]] = []
    for _, group in groups(own, lambda r: r.part):
        for plot, rest in groups((r for r in group if r.plot), lambda r: r.plot or ""):
            bad = rows.failures(rest)
            note = f"the closest of {len(rest)} in the chart “{plot}”"
            shown += [(r, r.note) for r in bad] if bad else [(worst(rest), note)]
        shown += [(r, r.note) for r in group if not r.plot]
    plotted = [(r, r.note) for r in own if r.plot]
    if plotted:
        folded = f"<details><summary>All {len(plotted)} rows of the charts</summary>{_rows(plotted)}</details>"
        return out + _rows(shown) + folded
    return out + _rows(shown)


def _rows(found: list[tuple[Row, str]]) -> str:
    """(row, a note) → a table; a part is named once."""
    lines, before = [], None
    for r, note in found:
        part, before = ("" if r.part == before else r.part), r.part
        what = escape(r.what) + (f' <span class="note">{escape(note)}</span>' if note else "")
        lines.append([f'<td class="first">{escape(part)}</td>', what, _right(number(r.rel)), _right(number(r.peak)),
                      _right(floor(r)), _right(number(r.limit)), _verdict([] if r.passed else [r])])  # fmt: skip
    head = ["", "what", ">relL2", ">max/rms", ">noise floor", ">threshold", "verdict"]
    return _sheet(head, lines, ["" if r.passed else "lost" for r, _ in found])


def _sheet(head: list[str], lines: list[list[str]], css: list[str]) -> str:
    """A table whose headings with a ">" stand over numbers."""
    made = table([h.lstrip(">") for h in head], lines, css)
    for h in head:
        if h.startswith(">"):
            made = made.replace(f"<th>{escape(h[1:])}</th>", f'<th class="number">{escape(h[1:])}</th>', 1)
    return made


def _verdict(bad: list[Row]) -> str:
    word = "pass" if not bad else "FAIL" if len(bad) == 1 else f"{len(bad)} FAIL"
    return f'<td class="verdict {"bad" if bad else "good"}">{word}</td>'


def _right(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


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


def groups(found: Iterable[Row], key) -> list[tuple[str, list[Row]]]:
    """Rows by key, in their order."""
    out: dict[str, list[Row]] = {}
    for r in found:
        out.setdefault(key(r), []).append(r)
    return list(out.items())


def worst(found: Iterable[Row]) -> Row:
    """The float32 row that comes closest to its threshold, or exceeds it most; with a noise floor, if any has one."""
    found = list(found)
    whole = [r for r in found if r.part != rows.BFLOAT16] or found
    measured = [r for r in whole if r.floor]
    if measured and not rows.failures(whole):
        whole = measured
    return max(whole, key=lambda r: r.share)


def half(found: Iterable[Row]) -> str:
    """The largest ratio of our bfloat16 error to PyTorch's."""
    ratios = [r.rel / r.floor for r in found if r.part == rows.BFLOAT16 and r.floor]
    return f"{max(ratios):.2f}" if ratios else "–"


def number(x: float | None) -> str:
    return "–" if x is None else "0" if x == 0 else f"{x:.1e}"


def floor(r: Row) -> str:
    """The noise floor, and where it is from if it was not measured here."""
    return number(r.floor) + (f" ({r.floor_from})" if r.floor_from not in ("", "measured") else "")
