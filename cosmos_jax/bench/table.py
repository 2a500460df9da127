"""The numbers of a bench: a table on the terminal, JSON in a file.

In: what the `run` of a kind returned. Out: text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Column = tuple[str, Callable[[dict], str]]


def number(key: str, digits: int = 2, scale: float = 1.0) -> Callable[[dict], str]:
    """Reader of one value; "–" where there is none."""
    return lambda row: "–" if row.get(key) is None else f"{row[key] * scale:,.{digits}f}"


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
    "attention": [
        ("pack", lambda r: r["shape"]), ("library", lambda r: r["library"]), ("pass", lambda r: r["pass"]),
        ("TFLOP", number("tflop", 3)), ("ms", number("s", 2, 1e3)), ("TFLOP/s", number("tflops", 3)),
        ("of the peak (%)", number("share", 0, 100)), ("× xla", number("ratio")),
        ("of one sample as large (%)", number("of_single", 0, 100)), ("from xla", lambda r: f"{r['error']:.0e}"),
    ],
    "flow": [
        ("size", lambda r: r["shape"]), ("operation", lambda r: r["operation"]), ("MB", number("bytes", 0, 1e-6)),
        ("copy (GB/s)", number("copy_rate", 1, 1e-9)),
        ("xla (ms)", number("xla_s", 3, 1e3)), ("GB/s", number("xla_rate", 1, 1e-9)),
        ("of a copy (%)", number("xla_share", 0, 100)), ("kernel (ms)", number("kernel_s", 3, 1e3)),
        ("GB/s", number("kernel_rate", 1, 1e-9)), ("of a copy (%)", number("kernel_share", 0, 100)),
        ("× xla", number("ratio")),
    ],
    "denoise": [
        ("size", lambda r: r["shape"]), ("layers", number("layers", 0)), ("tokens", number("tokens", 0)),
        ("step (ms)", number("step_s", 1, 1e3)), ("TFLOP/s", number("tflops", 3)),
        ("of the peak (%)", number("share", 0, 100)),
        *(column for part in ("qkv", "attention", "mlp") for column in (
            (f"{part} (ms)", number(f"{part}_s", 1, 1e3)), ("TFLOP/s", number(f"{part}_tflops", 3)),
        )),
        ("other (ms)", number("other_s", 1, 1e3)),
    ],
    "train": [
        ("size", lambda r: r["shape"]), ("layers", number("layers", 0)), ("devices", number("devices", 0)),
        ("samples", number("samples", 0)), ("tokens", number("tokens", 0)), ("step (ms)", number("step_s", 1, 1e3)),
        ("TFLOP", number("tflop", 3)), ("TFLOP/s", number("tflops", 3)), ("MFU (%)", number("share", 0, 100)),
        ("× with recomputing", number("recomputed")), ("memory (GB)", number("peak_bytes", 1, 1e-9)),
        ("loss", number("loss", 3)),
    ],
    "data": [
        ("mixture", lambda r: r["shape"]), ("workers", number("workers", 0)),
        ("rows", lambda r: f"{r['host_rows']} of {r['rows']}"), ("first (s)", number("first_s", 1)),
        ("batches/s", number("batches_s")), ("samples/s", number("samples_s", 0)), ("tokens/s", number("tokens_s", 0)),
        ("filled (%)", number("efficiency", 1, 100)), ("dearest row / mean", number("balance", 3)),
        ("rows drawn alone", number("balance_alone", 3)), ("look-ahead", number("look_ahead", 0)),
        ("waiting, a row (MB)", number("waiting_bytes", 1, 1e-6)), ("longest wait (steps)", number("longest_wait", 0)),
    ],
}  # fmt: skip


def show(kind: str, result: dict, console: Console | None = None) -> None:
    """Print the rows and, below them, what is known of the machine."""
    console = console or Console(width=None if sys.stdout.isatty() else 160)
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
    """`out`/generate-<kind>.json, or <kind>.json for what is no `bench generate`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / (f"generate-{kind}.json" if kind in ("versus", "scaling", "published") else f"{kind}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
