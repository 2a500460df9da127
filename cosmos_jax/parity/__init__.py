"""Ours against PyTorch: `python -m cosmos_jax parity --reference=DIR --out=DIR`.

In: a PyTorch checkpoint (diffusers or transformers layout). Out: report.md, report.html, rows.json: component by
component, layer by layer, step by step, with the noise floor, the threshold and the verdict of every comparison.

    rows (what a comparison says) ─► reference (PyTorch), inputs, walk ─► one file per component ─► run ─► report

This package alone imports torch, diffusers and transformers; without them `prepare` says how to get them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from cosmos_jax.config import ConfigError

NEEDED = ("torch", "diffusers", "transformers")


def prepare(reference: str | Path, out: str | Path, what: str = "components") -> Callable[[], int]:
    """Check everything; the returned work writes the report and returns 0, or 1 if a row fails.

    ValueError (one sentence): libraries or the folder are missing, the folder is in another layout, or cannot be read.
    """
    lacking = [n for n in NEEDED if importlib.util.find_spec(n) is None]
    if lacking:
        raise ConfigError(f"parity needs {', '.join(lacking)}, which is the reference; run: pip install -e '.[test]'")
    from conversion import folder

    found = folder.open_folder(reference)
    if found.layout not in ("diffusers", "transformers"):
        raise ConfigError(
            f"{reference} is in the {found.layout} layout, which PyTorch's own libraries do not load; convert it to "
            "diffusers first."
        )
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"--out={out} is a file; name a directory.")
    # PyTorch and JAX take turns on one device, so neither may keep what it does not use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from cosmos_jax.parity import run

    return run.prepare(found, Path(out), what)
