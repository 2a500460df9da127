"""The comparison as files: report.html (one page, no other file, no network), report.md, rows.json.

In: a `run.Result`. Out: the three files. Every number on the page is in rows.json; nothing is rounded into a verdict.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_jax.parity import rows
from cosmos_jax.parity.page import floor, groups, half, html, number, worst
from cosmos_jax.parity.rows import Row

if TYPE_CHECKING:
    from cosmos_jax.parity.run import Result

EXPLAINED = (  # how to read it: (words, what they mean)
    ("relL2", "‖ours − reference‖ / ‖reference‖ over the whole array, in float64."),
    ("max/rms", "The largest single error, divided by the root mean square of the reference: it finds local faults."),
    (
        "noise floor",
        "What float32 itself costs the reference: its float32 result against its float64 result (measured here where "
        "the model fits in float64; norm statistics and rotary phases stay float32, as its code insists), else the "
        "published value. An error near the floor is rounding, not a mistake.",
    ),
    (
        "threshold",
        "Above the floor, below every plausible mistake that we know of. 2e-6 for networks of up to 3 layers, 4e-6 at "
        "8, 6e-6 at 36, linear in the logarithm of the depth; 0 means bit for bit.",
    ),
    (
        "errors add up",
        "Our layers run on our own hidden states. The error grows with depth, and after a mistake every row fails.",
    ),
    (
        "each one alone",
        "Each layer, stage or step is fed the reference's own input, so one that fails is wrong itself. The first of "
        "these that fails is named as the first divergence.",
    ),
    (
        "eps probe",
        "Weights scaled by 1e-2 on both sides, so that activations are small and the eps of the norms decides: a tenth "
        "of the right eps, which passes otherwise, is 1e-2 off here.",
    ),
    (
        "gradients",
        "Of the training loss (flow matching, next-word cross entropy), by torch's autograd and by ours, on the same "
        "noise. One row per parameter; of a stacked one, its worst layer. The threshold grows with depth like that of "
        "the outputs. Where PyTorch has no gradient, ours must be exactly 0.",
    ),
    (
        "bfloat16",
        "Both against float32 arithmetic on the same bfloat16 weights. Two correct bfloat16 programs differ by as much "
        "as a wrong one would, so the only question is whether ours loses more than PyTorch's: at most 1.25 times.",
    ),
)


def write(result: Result, out: Path) -> dict[str, Path]:
    """Write the three files; returns their paths by kind."""
    paths = {kind: out / name for kind, name in (("html", "report.html"), ("md", "report.md"), ("json", "rows.json"))}
    first = rows.first_divergence(result.rows)
    content = {
        "passed": not rows.failures(result.rows),
        "first_divergence": first and first.to_dict(),
        "facts": result.facts,
        "seconds": result.seconds,
        "notes": result.notes,
        "rows": [r.to_dict() for r in result.rows],
    }
    paths["json"].write_text(json.dumps(_finite(content), indent=1) + "\n")
    paths["md"].write_text(markdown(result))
    paths["html"].write_text(html(result, headline(result.rows), EXPLAINED))
    return paths


def _finite(x):
    """JSON has no infinity: it becomes the word."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_finite(v) for v in x]
    return x if not isinstance(x, float) or math.isfinite(x) else str(x)


def headline(found: Iterable[Row]) -> str:
    """The verdict in one sentence."""
    found = list(found)
    wrong, first = rows.failures(found), rows.first_divergence(found)
    if first is None:
        return f"All {len(found)} rows pass."
    where = f"{first.component}, {first.part}: {first.what}"
    return f"{len(wrong)} of {len(found)} rows FAIL. First divergence: {where} (relL2 {first.rel:.1e})."


def markdown(result: Result) -> str:
    """The page without its charts."""
    out = [f"# Parity with PyTorch\n\n**{headline(result.rows)}**\n"]
    out.append(
        "| component | rows | verdict | largest error | its threshold | noise floor | bfloat16 error / PyTorch's |"
    )
    out.append("|---|--:|---|--:|--:|--:|--:|")
    parts = groups(result.rows, lambda r: r.component)
    for name, own in parts:
        bad, w = rows.failures(own), worst(own)
        said = f"**{len(bad)} FAIL**" if bad else "pass"
        out.append(f"| {name} | {len(own)} | {said} | {number(w.rel)} | {number(w.limit)} | {floor(w)} | {half(own)} |")
    out += [f"\n{n}" for n in result.notes]
    for name, own in parts:
        out += [f"\n## {name}\n", "| part | what | relL2 | max/rms | noise floor | threshold | verdict | note |"]
        out.append("|---|---|--:|--:|--:|--:|---|---|")
        for r in own:
            cells = (r.part, r.what, number(r.rel), number(r.peak), floor(r), number(r.limit), r.verdict, r.note)
            out.append(f"| {' | '.join(cells)} |")
    out.append("\n## How to read it\n")
    out += [f"* **{word}**: {meaning}" for word, meaning in EXPLAINED]
    text = json.dumps(_finite(result.facts | {"seconds": result.seconds}), indent=1)
    return "\n".join(out) + f"\n\n## Facts\n\n```json\n{text}\n```\n"
