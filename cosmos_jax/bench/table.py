"""The numbers of a bench: a table on the terminal, JSON in a file.

In: what `versus.run`, `scaling.run` or `published.run` returned. Out: text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Column = tuple[str, Callable[[dict], str]]


def number(key: str, digits: int = 2, scale: float = 1.0) -> Callable[[dict], str]:
    """Reader of one value; a size that nobody published has none."""
    return lambda row: "–" if row[key] is None else f"{row[key] * scale:,.{digits}f}"


COLUMNS: dict[str, list[Column]] = {
    "versus": [
        ("size", lambda r: r["size"]), ("tokens", number("tokens", 0)), ("captions, once (s)", number("prefill_s")),
        ("step (s)", number("step_s")), ("with captions / steps (s)", number("amortised_s")),
        ("diffusers step (s)", number("diffusers_s")), ("× faster", number("ratio")),
        ("fastest steps: ours (s)", number("fastest_s")), ("theirs", number("diffusers_fastest_s")),
        ("× faster", number("fastest_ratio")), ("TFLOP", number("tflop")),
        ("diffusers", number("diffusers_tflop")), ("GFLOP/s", number("tflops", 0, 1e3)),
        ("diffusers", number("diffusers_tflops", 0, 1e3)),
        ("relL2 velocities", lambda r: f"{max(r['velocity_rel']):.1e}"),
        ("latents", lambda r: f"{r['latents_rel']:.1e}"),
    ],
    "scaling": [
        ("size", lambda r: r["size"]), ("tokens", number("tokens", 0)), ("TFLOP", number("tflop")),
        ("attention", number("attention_share", 0, 100)), ("step (s)", number("wall_s")),
        ("GFLOP/s", number("wall_tflops", 0, 1e3)), ("from the mean (%)", number("wall_deviation", 1, 100)),
        ("processor (s)", number("cpu_s")), ("GFLOP per processor s", number("cpu_tflops", 0, 1e3)),
        ("from the mean (%)", number("cpu_deviation", 1, 100)),
    ],
    "published": [
        ("size", lambda r: r["size"]), ("tokens", number("tokens", 0)), ("steps", number("steps", 0)),
        ("shift", number("shift", 0)), ("guidance", number("guidance", 0)), ("compile (s)", number("compile_s", 1)),
        ("captions (s)", number("prefill_s")), ("steps (s)", number("denoise_s")), ("decode (s)", number("decode_s")),
        ("together (s)", number("total_s")), ("vLLM-Omni (s)", number("vllm_omni_s")), ("limit (s)", number("limit_s")),
        ("TFLOP/s", number("tflops", 3)),
    ],
}  # fmt: skip


def show(kind: str, result: dict, console: Console | None = None) -> None:
    """Print the rows and, below them, what is known of the machine."""
    console = console or Console()
    table = Table(*(title for title, _ in COLUMNS[kind]))
    for row in result["rows"]:
        table.add_row(*(read(row) for _, read in COLUMNS[kind]))
    console.print(table)
    console.print(", ".join(_fact(k, v) for k, v in result["machine"].items()), highlight=False)


def _fact(key: str, value: Any) -> str:
    if key.endswith("_peak"):
        return f"{key[: -len('_peak')]} matmul {value / 1e9:,.0f} GFLOP/s"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(str, dict.fromkeys(value)))
    return f"{key.replace('_', ' ')} {value}"


def write(kind: str, result: dict, out: Path) -> Path:
    """`out`/generate-<kind>.json."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"generate-{kind}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
