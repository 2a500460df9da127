"""Line charts as inline SVG: no scripts, no fonts, no fetches.

In: numbers. Out: one `<svg>` string.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cosmos_jax.report.html import escape

COLOURS = ("#2557d6", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285", "#c4161c")
WIDTH, HEIGHT = 360, 220
FONT = 'font-family="system-ui,sans-serif" font-size="11" fill="#667085"'  # without the page's style sheet too
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 26, 40


@dataclass(frozen=True)
class Line:
    name: str
    x: np.ndarray
    y: np.ndarray
    dashed: bool = False
    faint: bool = False  # drawn pale and left out of the legend
    colour: int = 0


def chart(
    title: str, lines: list[Line], x_label: str = "", log: bool = False, width: int = WIDTH, height: int = HEIGHT
) -> str:
    """All lines in one frame. Points that are not finite (or not positive, if log) are skipped."""
    kept = [(line, _finite(line, log)) for line in lines]
    x = np.concatenate([p[0] for _, p in kept]) if kept else np.zeros(0)
    if not x.size:
        return f'<p class="note">{escape(title)}: no points.</p>'
    y = np.concatenate([p[1] for _, p in kept])
    x0, x1 = float(x.min()), max(float(x.max()), float(x.min()) + 1e-9)
    ticks = _log_ticks(y) if log else _ticks(*_span(y))
    low, high = (f([*y.tolist(), *ticks]) for f in (min, max))
    a, b = (math.log(low), math.log(high)) if log else (low, high)

    def px(v):
        return LEFT + (width - LEFT - RIGHT) * (v - x0) / (x1 - x0)

    def py(v):
        v = np.log(v) if log else v
        return height - BOTTOM - (height - BOTTOM - TOP) * (v - a) / max(b - a, 1e-9)

    out = [f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>']
    for t in ticks:
        out.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}" stroke="#e4e7ec"/>')
        out.append(f'<text x="{LEFT - 5}" y="{py(t) + 4:.1f}" text-anchor="end">{t:.4g}</text>')
    for t in (t for t in _ticks(x0, x1) if px(t) < width - RIGHT - 7 * len(x_label)):
        out.append(f'<text x="{px(t):.1f}" y="{height - BOTTOM + 13}" text-anchor="middle">{t:.6g}</text>')
    out.append(f'<text x="{width - RIGHT}" y="{height - BOTTOM + 13}" text-anchor="end">{escape(x_label)}</text>')
    for line, (lx, ly) in kept:
        points = " ".join(f"{u:.1f},{v:.1f}" for u, v in zip(px(lx), py(ly), strict=True))
        style = ' stroke-dasharray="4 3"' if line.dashed else ""
        style += ' opacity=".25"' if line.faint else ""
        colour = COLOURS[line.colour % len(COLOURS)]
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"{style}/>')
    out += _legend([line for line in lines if not line.faint], height)
    return f'<svg {FONT} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(out)}</svg>'


def smooth(y: np.ndarray, share: float = 0.05) -> np.ndarray:
    """A centred moving average over about `share` of the points."""
    n = max(1, int(len(y) * share))
    kernel = np.ones(2 * n + 1)
    ok = np.isfinite(y)
    total = np.convolve(np.where(ok, y, 0), kernel, "same") if len(y) > 2 * n else np.where(ok, y, 0)
    count = np.convolve(ok.astype(float), kernel, "same") if len(y) > 2 * n else ok.astype(float)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _finite(line: Line, log: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    ok = np.isfinite(y) & ((y > 0) | (not log))
    return x[ok], y[ok]


def _span(y: np.ndarray) -> tuple[float, float]:
    low, high = float(y.min()), float(y.max())
    return (low, high) if high > low else (low - 1, high + 1)


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    raw = (high - low) / about
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(y: np.ndarray) -> list[float]:
    low, high = math.floor(math.log10(y.min())), math.ceil(math.log10(y.max()))
    every = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [m * 10.0**e for e in range(low, high + 1) for m in every]
    return [t for t in ticks if y.min() * 0.999 <= t <= y.max() * 1.001] or [float(y.min()), float(y.max())]


def _legend(lines: list[Line], height: int) -> list[str]:
    out, x = [], float(LEFT)
    for line in lines:
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        colour = COLOURS[line.colour % len(COLOURS)]
        y = height - 8
        out.append(f'<line x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2"{dash}/>')
        out.append(f'<text x="{x + 20}" y="{y}">{escape(line.name)}</text>')
        x += 32 + 6.2 * len(line.name)
    return out
