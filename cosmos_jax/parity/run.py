"""From a checkpoint to a report: every component in turn, PyTorch first, then ours, never both in memory.

In: an opened `conversion.folder.Folder`. Out: the work, which writes the three files and returns the exit code.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import operator
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import transformers

from conversion.folder import Component, Folder
from cosmos_jax.config import ConfigError
from cosmos_jax.evaluate import commit
from cosmos_jax.parity import (
    denoise,
    gradients,
    pipeline,
    pipeline_cases,
    pipeline_ours,
    pipeline_reference,
    positions,
    reasoner,
    reference,
    report,
    rows,
    schedule,
    sound,
    tiny,
    transformer,
    video,
)
from cosmos_jax.parity.rows import Row

Part = Callable[[Folder], list[Row]]


@dataclass
class Result:
    """All that the report shows."""

    rows: list[Row]
    facts: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was not compared, and why


def prepare(folder: Folder, out: Path, what: str) -> Callable[[], int]:
    """Check what can be checked before any model is loaded."""
    if folder.scheduler is not None:
        schedule.ours(folder.scheduler, folder.index or {})  # refuses a scheduler that we do not have
    if what == "pipeline" and (absent := not_there(folder)):
        raise ConfigError(f"{folder.path} is no whole pipeline, it lacks {', '.join(absent)}; use --what=components.")

    def work() -> int:
        result = compare(folder, what)
        out.mkdir(parents=True, exist_ok=True)
        paths = report.write(result, out)
        wrong = rows.failures(result.rows)
        print(report.headline(result.rows))
        print(f"Open {paths['html']} in a browser.")
        return 1 if wrong else 0

    return work


def compare(folder: Folder, what: str = "components") -> Result:
    """Run every comparison that the folder allows. what: components, pipeline or all."""
    quiet()
    result = Result([], describe(folder))
    with jax.default_matmul_precision("highest"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)  # diffusers' own
        for name, part in parts(folder, what):
            began = time.perf_counter()
            found = part(folder)
            reference.release()
            result.rows += found
            result.seconds[name] = time.perf_counter() - began
            failed = len(rows.failures(found))
            verdict = "all pass" if not failed else f"{failed} FAIL"
            print(f"{name}: {len(found)} rows, {verdict} ({result.seconds[name]:.0f} s)", flush=True)
    result.notes += missing(folder, what)
    return result


def parts(folder: Folder, what: str = "components") -> Iterator[tuple[str, Part]]:
    """What is asked for and the folder allows to compare, in the order of the report."""
    if what != "pipeline":
        yield from _components(folder)
    if what != "components" and not not_there(folder):
        yield pipeline.NAME, _pipeline


def not_there(folder: Folder) -> list[str]:
    """What a pipeline needs and the folder lacks."""
    have = {n: n in folder.components for n in ("transformer", "vae")}
    have |= {"scheduler": folder.scheduler is not None, "text_tokenizer": (folder.path / "text_tokenizer").is_dir()}
    return [n for n, there in have.items() if not there]


def _components(folder: Folder) -> Iterator[tuple[str, Part]]:
    have = folder.components
    if "transformer" in have:
        yield positions.NAME, lambda f: positions.check(alone(f.components["transformer"].config))
        yield transformer.NAME, _transformer
        if gradients.fits(_size(have["transformer"])):
            yield gradients.NAME, _gradients
    if folder.scheduler is not None:
        yield schedule.NAME, lambda f: schedule.check(schedule.golden(f.scheduler, f.index or {}))
        if "transformer" in have:
            yield denoise.NAME, _denoise
    if "vae" in have:
        yield video.NAME, _video
    if "sound_tokenizer" in have:
        yield sound.NAME, _sound
    if _kind(folder):
        yield reasoner.NAME, _reasoner


def missing(folder: Folder, what: str) -> list[str]:
    """What the report cannot speak about."""
    out = []
    if what == "all" and (absent := not_there(folder)):
        out.append(f"The pipeline is not compared: the folder has no {', '.join(absent)}.")
    if what == "pipeline":
        return out
    if folder.layout == "diffusers" and "sound_tokenizer" not in folder.components:
        out.append("The folder has no sound_tokenizer: sound is not compared.")
    transformer = folder.components.get("transformer")
    if transformer and not gradients.fits(_size(transformer)):
        out.append("Gradients are not compared: they need 16 bytes of free memory per parameter.")
    if folder.layout == "diffusers" and not _kind(folder):
        out.append("The folder has no vision_encoder with a config.json at the top: the reasoner is not compared.")
    if folder.layout == "diffusers" and folder.scheduler is None:
        out.append("The folder has no scheduler: schedule and denoising are not compared.")
    return out


def alone(cfg):
    """The transformer without the vision encoder, which lies in a folder of its own and takes no part in denoising."""
    return dataclasses.replace(cfg, vision=None)


def place(folder: Folder, name: str) -> Path:
    """The component's own folder: below the checkpoint's, or that itself."""
    return folder.path / name if (folder.path / name).is_dir() else folder.path


def params(component: Component) -> dict:
    """Our parameters on the device, float32."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), component.load())


def _size(component: Component) -> int:
    return sum(math.prod(s) for s in component.tensors.shapes.values())


def _transformer(folder: Folder) -> list[Row]:
    component = folder.components["transformer"]
    golden = transformer.golden(_load(folder, diffusers.Cosmos3OmniTransformer, "transformer"))
    return transformer.check(golden, params(component), alone(component.config))


def _gradients(folder: Folder) -> list[Row]:
    component = folder.components["transformer"]
    golden = gradients.golden(_load(folder, diffusers.Cosmos3OmniTransformer, "transformer"))
    return gradients.check(golden, params(component), alone(component.config))


def _denoise(folder: Folder) -> list[Row]:
    component = folder.components["transformer"]
    load = _load(folder, diffusers.Cosmos3OmniTransformer, "transformer")
    golden = denoise.golden(load, folder.scheduler or {}, folder.index or {})
    return denoise.check(golden, params(component), alone(component.config))


def _video(folder: Folder) -> list[Row]:
    component = folder.components["vae"]
    golden = video.golden(_load(folder, diffusers.AutoencoderKLWan, "vae"))
    return video.check(golden, params(component), component.config)


def _sound(folder: Folder) -> list[Row]:
    component = folder.components["sound_tokenizer"]
    golden = sound.golden(_load(folder, diffusers.Cosmos3AVAEAudioTokenizer, "sound_tokenizer"))
    return sound.check(golden, params(component), component.config)


def _kind(folder: Folder) -> str | None:
    """The reasoner that transformers would load from this folder: its model_type; None if there is none.

    A released diffusers repository has one too: a config.json at the top, whose weights are those of the transformer's
    text tower and of the vision encoder.
    """
    top = folder.path / "config.json"
    if "reasoner" in folder.components or "vision_encoder" in folder.components and top.is_file():
        kind = json.loads(top.read_text()).get("model_type")
        return kind if kind in tiny.KINDS else None
    return None


def _reasoner(folder: Folder) -> list[Row]:
    load = reference.transformers_pretrained(tiny.KINDS[_kind(folder)][1], folder.path)
    have = folder.components
    cfg = have["reasoner" if "reasoner" in have else "transformer"].config
    golden = reasoner.golden(load, cfg)
    found = [params(have[n]) for n in ("reasoner", "transformer", "vision_encoder") if n in have]
    return reasoner.check(golden, reasoner.whole(functools.reduce(operator.or_, found), cfg), cfg)


def _pipeline(folder: Folder) -> list[Row]:
    cases = pipeline_cases.cases(pipeline_cases.Facts.of(folder))
    return pipeline.compare(pipeline_reference.record_all(folder, cases), pipeline_ours.connect, folder)


def _load(folder: Folder, cls: type, name: str) -> reference.Load:
    return reference.pretrained(cls, place(folder, name))


def quiet() -> None:
    """Only what the user has to know."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def describe(folder: Folder) -> dict[str, Any]:
    """What was compared, where, with which versions; JSON-able."""
    names = ("jax", "jaxlib", "numpy", "torch", "diffusers", "transformers")
    versions = {"python": sys.version.split()[0]} | {n: importlib.metadata.version(n) for n in names}
    sizes = {n: _size(c) for n, c in folder.components.items()}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "reference": str(folder.path.resolve()),
        "layout": folder.layout,
        "parameters": sizes,
        "dtypes": {
            n: sorted({np.dtype(d).name for d in c.tensors.dtypes.values()}) for n, c in folder.components.items()
        },
        "host": f"{platform.node()}, {platform.machine()}, {platform.system()}",
        "jax device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "torch device": str(reference.device()),
        "versions": versions,
        "configs": {n: dataclasses.asdict(c.config) for n, c in folder.components.items()},
    }
