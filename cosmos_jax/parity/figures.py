"""The charts of the comparison, as inline SVG.

In: rows. Out: one `<svg>` string each: every row on the scale of its own threshold; the error against depth or step.
"""

from __future__ import annotations

import math

import numpy as np

from cosmos_jax.parity import rows
from cosmos_jax.parity.rows import Row
from cosmos_jax.report.charts import FONT, Line, chart
from cosmos_jax.report.html import escape

LOW, HIGH = -4, 1  # decades of error/threshold
BLUE, RED = "#2557d6", "#c4161c"
RED_LINE = 6  # its place in the colours of report.charts
LABEL = (
    "Every comparison as a share of its own threshold (point at a dot to read it). Left edge: equal bit for bit, or "
    "below 1/10,000. Rings: bfloat16, against 1.25 times PyTorch's own error."
)


def dots(found: list[Row]) -> str:
    """Error over threshold, logarithmic: left of the red line is a pass. A row without tolerance is at an end."""
    names, width, left, step = list(dict.fromkeys(r.component for r in found)), 1040, 150, 34
    height = 40 + step * len(names)
    span = width - left - 30

    def px(value: float) -> float:
        decade = math.log10(value) if value > 0 else LOW
        return left + span * (min(max(decade, LOW), HIGH) - LOW) / (HIGH - LOW)

    out = []
    for d in range(LOW, HIGH + 1):
        x = px(10.0**d)
        style = f'stroke="{RED}" stroke-width="1.6"' if d == 0 else 'stroke="#e4e7ec"'
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 24}" {style}/>')
        text = "threshold" if d == 0 else f"1/{10**-d:,}" if d < 0 else f"{10**d}×"
        out.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{text}</text>')
    for k, name in enumerate(names):
        y = 24 + step * k
        out.append(f'<text class="title" x="{left - 16}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for i, r in enumerate(r for r in found if r.component == name):
            out.append(_dot(r, px(r.share), y + (i * 7 % 19) - 9))
    return f'<svg {FONT} viewBox="0 0 {width} {height}" role="img" aria-label="{LABEL}">{"".join(out)}</svg>'


def _dot(r: Row, x: float, y: float) -> str:
    colour = BLUE if r.passed else RED
    ring = r.part == rows.BFLOAT16
    look = f'fill="none" stroke="{colour}" stroke-width="1.5"' if ring else f'fill="{colour}"'
    size, opacity = (3, 1 if ring else 0.45) if r.passed else (4.5, 0.9)
    hint = escape(f"{r.part}: {r.what}: relL2 {r.rel:.1e}, threshold {r.limit:.1e}")
    return f'<circle cx="{x:.1f}" cy="{y}" r="{size}" {look} opacity="{opacity}"><title>{hint}</title></circle>'


def by_depth(own: list[Row]) -> list[str]:
    """A chart for each plot of a component: our error, the noise floor, the threshold."""
    out = []
    for plot in dict.fromkeys(r.plot for r in own if r.plot):
        here = [r for r in own if r.plot == plot]
        added = [r for r in here if r.line == rows.ADDED] or here
        lines: list[Line] = []
        for colour, name in enumerate((rows.ADDED, rows.ALONE)):
            lines += _line(name, [(r.index, r.rel) for r in here if r.line == name], colour)
        lines += _line("noise floor", [(r.index, r.floor) for r in here if r.floor], 2, dashed=True)
        lines += _line("threshold", sorted({(r.index, r.limit) for r in added}), RED_LINE, dashed=True)
        out.append(chart(plot, lines, plot.rsplit(" ", 1)[-1], log=True, width=520, height=230))
    return out


def _line(name: str, points: list[tuple], colour: int, dashed: bool = False) -> list[Line]:
    if not points:
        return []
    x, y = (np.array(v, float) for v in zip(*sorted(points), strict=True))
    return [Line(name, x, y, dashed=dashed, colour=colour)]
