"""Weights → PyTorch files that the reference libraries load.

In: a `Source`, a layout. Out: a folder, one tensor in memory at a time: diffusers (a folder per component), transformers
(the reasoner alone), native (cosmos-framework's names in safetensors; the video VAE as Wan2.2_VAE.pth), dcp (the same in a
torch.distributed.checkpoint).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from conversion import avae, configs, dcp, framework, omni, pth, reasoner, safetensors, wan
from conversion.check import ConversionError
from conversion.names import Entry
from conversion.source import Source
from conversion.weights import Layout, Merged, Weights, tensors

SHARD = 5_000_000_000  # bytes per safetensors file, as diffusers and transformers write them
Progress = Callable[[int], None]


def write(source: Source, layout: str, out: Path, progress: Progress = lambda nbytes: None) -> list[str]:
    """Fill the folder `out`; returns what of the source is not in it, a line each. ConversionError: cannot be written."""
    return LAYOUTS[layout](source, out, progress)


def _diffusers(source: Source, out: Path, progress: Progress) -> list[str]:
    if "reasoner" in source.components:
        raise ConversionError(
            f"{source.path} holds a reasoner alone, but a diffusers folder has a generator; use --layout=transformers."
        )
    for name, (cfg, weights) in source.components.items():
        if name == "transformer":
            entries, config = omni.entries(cfg), configs.to_diffusers(cfg)
        elif name == "vision_encoder":
            entries, config = reasoner.vision_entries(cfg), configs.to_vision_encoder(cfg)
        elif name == "vae":
            entries, config = wan.entries(cfg), cfg.to_diffusers()
        else:  # only diffusers has a sound tokeniser, so its own config is among the files
            entries, config = avae.entries(cfg), None
        stem = "model" if name == "vision_encoder" else "diffusion_pytorch_model"
        _safetensors(out / name, stem, entries, weights, progress)
        if config is not None:
            _json(out / name / "config.json", config)
    return _copy(source, out, lambda name: name if source.layout == "diffusers" else None)


def _transformers(source: Source, out: Path, progress: Progress) -> list[str]:
    found = {k: v for k, v in source.components.items() if k in ("reasoner", "transformer", "vision_encoder")}
    if "reasoner" not in found and len(found) < 2:
        raise ConversionError(f"{source.path} lacks the und tower or the vision encoder, so it holds no reasoner.")
    cfg = next(iter(found.values()))[0]
    weights = Merged(*(w for _, w in found.values()))
    _safetensors(out, "model", reasoner.entries(cfg), weights, progress)
    _json(out / "config.json", configs.to_transformers(cfg))
    left = _copy(source, out, lambda name: name if source.layout == "transformers" else _beside_a_reasoner(name))
    return [f"{name}: a reasoner has none" for name in source.components if name not in found] + left


def _native(source: Source, out: Path, progress: Progress) -> list[str]:
    entries, weights = _framework(source)
    _safetensors(out, "model", entries, weights, progress)
    return _vae_and_rest(source, out, progress)


def _dcp(source: Source, out: Path, progress: Progress) -> list[str]:
    entries, weights = _framework(source)
    layout, stream = tensors(entries, weights)
    dcp.write_folder(out / "model", layout, _counted(stream, progress))
    return _vae_and_rest(source, out, progress)


def _framework(source: Source) -> tuple[list[Entry], Weights]:
    if "transformer" not in source.components:
        raise ConversionError(f"{source.path} has no transformer, which is what cosmos-framework's layout is of.")
    cfg, weights = source.components["transformer"]
    if "vision_encoder" in source.components:
        cfg, eye = source.components["vision_encoder"]
        weights = Merged(weights, eye)
    return framework.entries(cfg), weights


def _vae_and_rest(source: Source, out: Path, progress: Progress) -> list[str]:
    if "vae" in source.components:
        cfg, weights = source.components["vae"]
        layout, stream = tensors(wan.entries_original(cfg), weights)
        pth.write_file(out / "Wan2.2_VAE.pth", layout, _counted(stream, progress))
    left = [f"{k}: this layout has none" for k in source.components if k == "sound_tokenizer"]
    return left + _copy(source, out, lambda name: None)


def _beside_a_reasoner(name: str) -> str | None:
    """Where a file of a diffusers folder lies in a reasoner's: tokenizer and processor files, at the top."""
    folder, _, file = name.rpartition("/")
    top = folder == "" and ("processor" in file or "chat_template" in file or file == "generation_config.json")
    return file if top or folder == "text_tokenizer" else None


def _copy(source: Source, out: Path, place: Callable[[str], str | None]) -> list[str]:
    """Copy the files that travel; those already written are the ones of the weights. Returns what stays behind."""
    left = []
    for name, path in source.files.items():
        target = place(name)
        if target is None:
            left.append(f"{name}: this layout has none")
            continue
        (out / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / target)
    return left


def _safetensors(folder: Path, stem: str, entries: list[Entry], weights: Weights, progress: Progress) -> None:
    """One file, or as many as it takes with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    layout, stream = tensors(entries, weights)
    shards = _shards(layout)
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    counted = _counted(stream, progress)
    for name, shard in zip(names, shards, strict=True):
        safetensors.write_file(folder / name, shard, itertools.islice(counted, len(shard)), {"format": "pt"})
    if len(shards) > 1:
        total = sum(safetensors.nbytes(*x) for x in layout.values())
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _json(folder / f"{stem}{safetensors.INDEX}", {"metadata": {"total_size": total}, "weight_map": where})


def _shards(layout: Layout) -> list[Layout]:
    """Consecutive tensors, at most SHARD bytes together (a larger tensor stands alone)."""
    shards: list[Layout] = [{}]
    size = 0
    for name, x in layout.items():
        n = safetensors.nbytes(*x)
        if shards[-1] and size + n > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += n
    return shards


def _counted(stream: Iterator[tuple[str, np.ndarray]], progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    for name, x in stream:
        yield name, x
        progress(x.nbytes)


def _json(path: Path, table: dict) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n")


LAYOUTS = {"diffusers": _diffusers, "transformers": _transformers, "native": _native, "dcp": _dcp}
