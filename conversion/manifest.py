"""manifest.json of an imported checkpoint: where it came from, what it is, and every default that came along.

In: an opened PyTorch folder. Out: a JSON table. It is written last, so a checkpoint without it is not complete.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.check import ConversionError
from conversion.folder import Component, Folder
from conversion.weights import Weights
from cosmos_jax.config import to_dict
from cosmos_jax.sampling import scheduler_config

NAME, FORMAT = "manifest.json", 1
PACKAGES = ("jax", "flax", "orbax-checkpoint", "tensorstore", "numpy", "ml-dtypes")


def build(
    folder: Folder, components: Mapping[str, tuple[str, Any, Weights]], fresh: Mapping, hashes: Mapping[str, str]
) -> dict:
    """components: name → item of the Orbax checkpoint, config, parameters. fresh: what was drawn. hashes: of files."""
    return {
        "format": FORMAT,
        "source": {
            "path": str(folder.path.absolute()), "layout": folder.layout, "naming": folder.naming,
            "sha256": dict(hashes),
            "tensors": {name: _dtypes(c) for name, c in folder.components.items()},
            "dropped": {name: c.dropped for name, c in folder.components.items() if c.dropped},
        },
        "components": {
            name: {
                "item": item, "config": to_dict(config), "parameters": sum(x.size for x in w.arrays.values()),
                "paths": ["/".join(k) for k in w.arrays], "narrowed": w.narrowed,
            } for name, (item, config, w) in components.items()
        },
        "fresh": dict(fresh),
        "scheduler": scheduler(folder),
        "prompts": prompts(folder),
        "action_statistics": _statistics(folder),
        "files": sorted(folder.files),
        "versions": versions(),
    }  # fmt: skip


def _dtypes(c: Component) -> dict[str, int]:
    """dtype → number of tensors."""
    return dict(collections.Counter(str(c.tensors.dtypes[name]) for name in {e.source for e in c.entries}))


def scheduler(folder: Folder) -> dict | None:
    """The checkpoint's own scheduler file, and one line that says what it asks for."""
    if folder.scheduler is None:
        return None
    _, line = scheduler_config.of_checkpoint(folder.scheduler, folder.index or {})
    index = {k: v for k, v in index_of(folder).items() if k != "default_use_system_prompt"}
    return {"config": folder.scheduler, "index": index, "choice": line}


def index_of(folder: Folder) -> dict:
    """What of the pipeline's index changes numbers."""
    known = ("use_native_flow_schedule", "distilled_sigmas", "default_use_system_prompt")
    return {k: v for k, v in (folder.index or {}).items() if k in known}


def prompts(folder: Folder) -> dict | None:
    """What the pipeline's index says about prompts. diffusers' own default is a system prompt."""
    if folder.index is None:
        return None
    stated = folder.index.get("default_use_system_prompt")
    return {
        "convention": "diffusers",
        "use_system_prompt": True if stated is None else bool(stated),
        "stated": stated is not None,
    }


def describe(folder: Folder) -> list[str]:
    """What a user should read before believing in the result: every choice, and what is missing."""
    out = []
    for name, c in folder.components.items():
        size = sum(math.prod(c.tensors.shapes[e]) for e in {e.source for e in c.entries})
        out.append(f"{name}: {len({e.source for e in c.entries})} tensors, {size:,} parameters")
        out += [f"{name}: dropped {k}: {why}" for k, why in c.dropped.items()]
    s, p = scheduler(folder), prompts(folder)
    if folder.layout == "diffusers":
        out.append(f"scheduler: {s['choice'] if s else 'none in the folder'}")
        how = "with" if p and p["use_system_prompt"] else "without"
        stated = (
            "as model_index.json says" if p and p["stated"] else "diffusers' default, model_index.json says nothing"
        )
        out.append(f"prompts: {how} a system prompt ({stated})" if p else "prompts: no model_index.json says how")
        out.append(f"action statistics: {', '.join(_statistics(folder) or {}) or 'none in the folder'}")
    return out


def _statistics(folder: Folder) -> dict | None:
    """Statistics of actions, where the folder carries them: every *stats*.json, and the policy of checkpoint.json."""
    found = {k: json.loads(p.read_text()) for k, p in folder.files.items() if "stats" in p.stem and p.suffix == ".json"}
    if "checkpoint.json" in folder.files:
        policy = json.loads(folder.files["checkpoint.json"].read_text()).get("policy")
        found |= {"checkpoint.json: policy": policy} if policy else {}
    return found or None


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def read(path: Path) -> dict:
    """The manifest of an imported checkpoint. ConversionError when it is absent or of another format."""
    file = path / NAME
    if not file.is_file():
        raise ConversionError(f"{path} has no {NAME}: it is no imported checkpoint, or its writing was interrupted.")
    table = json.loads(file.read_text())
    if table.get("format") != FORMAT:
        raise ConversionError(
            f"{file} has format {table.get('format')!r}; this version reads {FORMAT}. Convert it again."
        )
    return table
