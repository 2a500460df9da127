"""Weights → PyTorch files that the reference libraries load.

In: a `Source`, a layout. Out: a `Plan`, and from it a folder, one tensor in memory at a time: diffusers (a folder per
component), transformers (the reasoner alone), native (cosmos-framework's names in safetensors, Wan2.2_VAE.pth,
avae.pth), dcp (the same with the model in a checkpoint of torch.distributed).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from conversion import avae, dcp, export_configs, framework, omni, pth, reasoner, safetensors, wan
from conversion.check import ConversionError
from conversion.folder import EYE
from conversion.names import Entry
from conversion.source import Source
from conversion.weights import Layout, Merged, Weights, tensors
from cosmos_jax.codecs import avae_config

SHARD = 5_000_000_000  # bytes per safetensors file, as diffusers and transformers write them
Progress = Callable[[int], None]


@dataclass
class Plan:
    """What a folder will hold; every name is relative to it."""

    weights: list[tuple[str, str, list[Entry], Weights]] = field(default_factory=list)  # a key of WRITERS, where, what
    tables: dict[str, dict] = field(default_factory=dict)  # JSON file → content
    copies: dict[str, Path] = field(default_factory=dict)  # file → where it is now
    left: list[str] = field(default_factory=list)  # what of the source will not be there, and why
    index: Callable[[str], bool] | None = None  # which tensors an index at the top lists, over the folders


def plan(source: Source, layout: str) -> Plan:
    """Decide what is written; ConversionError if the source has not what the layout needs."""
    return LAYOUTS[layout](source)


def size(chosen: Plan) -> int:
    """Bytes of the tensors that will be written."""
    layouts = (tensors(entries, weights)[0] for _, _, entries, weights in chosen.weights)
    return sum(safetensors.nbytes(*x) for layout in layouts for x in layout.values())


def write(chosen: Plan, out: Path, progress: Progress = lambda nbytes: None) -> None:
    """Fill the folder `out`."""
    listed: dict[str, str] = {}
    size = 0
    for writer, name, entries, weights in chosen.weights:
        layout, stream = tensors(entries, weights)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        files = WRITERS[writer](out / name, layout, _counted(stream, progress))
        if chosen.index and name.partition("/")[0] in ("transformer", EYE):
            mine = {k: str(Path(name).parent / file) for k, file in (files or {}).items() if chosen.index(k)}
            size += sum(safetensors.nbytes(*layout[k]) for k in mine)
            listed |= mine
    if chosen.index:
        _index(out / f"model{safetensors.INDEX}", listed, size)
    for name, table in chosen.tables.items():
        (out / name).write_text(json.dumps(table, indent=2) + "\n")
    for name, origin in chosen.copies.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, out / name)


def _diffusers(source: Source) -> Plan:
    if "reasoner" in source.components:
        raise ConversionError(
            f"{source.path} holds a reasoner alone, but a diffusers folder has a generator; use --layout=transformers."
        )
    out = Plan()
    for name, (cfg, weights) in source.components.items():
        stem, table = "diffusion_pytorch_model", None
        if name == "transformer":
            entries, table = omni.entries(cfg), export_configs.diffusers_transformer(cfg)
        elif name == EYE:
            stem, entries = "model", reasoner.vision_entries(cfg)
            if cfg.vision.kind == "qwen3vl":  # Edge's folder has no config.json
                table = export_configs.vision_encoder(cfg)
            if "config.json" not in source.files:
                out.tables["config.json"] = export_configs.reasoner(cfg)
        elif name == "vae":
            entries, table = wan.entries(cfg), cfg.to_diffusers()
        else:
            entries, table = avae.entries(cfg), avae_config.to_diffusers(cfg)
        out.weights.append(("safetensors", f"{name}/{stem}", entries, weights))
        if table is not None and f"{name}/config.json" not in source.files:
            out.tables[f"{name}/config.json"] = table
    if EYE in source.components:  # so that transformers finds the reasoner in this repository
        edge = source.components[EYE][0].vision.kind == "siglip2"
        out.index = _of_a_reasoner if edge else lambda name: True
    return _copies(out, source, lambda name: name if source.layout == "diffusers" else None)


def _transformers(source: Source) -> Plan:
    found = {k: v for k, v in source.components.items() if k in ("reasoner", "transformer", "vision_encoder")}
    if "reasoner" not in found and len(found) < 2:
        raise ConversionError(f"{source.path} lacks the und tower or the vision encoder, so it holds no reasoner.")
    cfg, weights = list(found.values())[-1][0], Merged(*(w for _, w in found.values()))
    out = Plan([("safetensors", "model", reasoner.NAMINGS[source.naming or "saved"](cfg), weights)])
    if "config.json" not in source.files:
        out.tables["config.json"] = export_configs.reasoner(cfg)
    out.left = [f"{name}: a reasoner has none" for name in source.components if name not in found]
    return _copies(out, source, lambda name: name if source.layout == "transformers" else _beside_a_reasoner(name))


def _native(source: Source) -> Plan:
    return _framework(source, "safetensors", "model.net.")


def _dcp(source: Source) -> Plan:
    return _framework(source, "dcp", "net.")


def _framework(source: Source, writer: str, prefix: str) -> Plan:
    """prefix: what cosmos-framework's exported files, and its checkpoints, begin every name with."""
    out = Plan()
    parts = [source.components[k] for k in ("transformer", EYE) if k in source.components]
    if parts:
        cfg = parts[-1][0]
        if len(parts) > 1 and cfg.vision.kind != "qwen3vl":  # the framework keeps Edge's eye in a file of its own
            raise ConversionError(
                "cosmos-framework's checkpoints of Edge hold no vision encoder; use --layout=diffusers."
            )
        out.weights.append((writer, "model", framework.entries(cfg, prefix), Merged(*(w for _, w in parts))))
    if "reasoner" in source.components:
        raise ConversionError(
            f"{source.path} is a reasoner alone; use --layout=transformers, or grow it with --config."
        )
    for name, (cfg, weights) in source.components.items():
        if name == "vae":
            out.weights.append(("pth", "Wan2.2_VAE.pth", wan.entries_original(cfg), weights))
        elif name == "sound_tokenizer":
            out.weights.append(("pth", "avae.pth", avae.entries_original(cfg), weights))
            out.tables["avae.json"] = avae_config.to_diffusers(cfg)
    return _copies(out, source, lambda name: None)


def _of_a_reasoner(name: str) -> bool:
    """Edge's index at the top lists these alone, as the framework's exporter writes it."""
    generator = ("_moe_gen.", ".self_attn.add_", ".norm_added_", ".to_add_out.", ".k_norm_und_for_gen.")
    shared = name.startswith(("model.", "layers.", "embed_tokens.", "lm_head.", "norm."))
    return shared and not any(part in name for part in generator)


def _beside_a_reasoner(name: str) -> str | None:
    """Where a file of a diffusers folder lies in a reasoner's: tokenizer and processor files, at the top."""
    folder, _, file = name.rpartition("/")
    mine = ("processor", "chat_template", "tokenizer", "config.json")  # a diffusers repository has a reasoner's config
    top = folder == "" and any(word in file for word in mine)
    return file if top or folder == "text_tokenizer" else None


def _copies(out: Plan, source: Source, place: Callable[[str], str | None]) -> Plan:
    for name, path in source.files.items():
        if (target := place(name)) is None:
            out.left.append(f"{name}: this layout has none")
        else:
            out.copies[target] = path
    return out


def _safetensors(where: Path, layout: Layout, stream: Iterator[tuple[str, np.ndarray]]) -> dict[str, str]:
    """`where`.safetensors, or as many files as it takes and an index. Returns tensor → file."""
    shards, folder, stem = _shards(layout), where.parent, where.name
    n = len(shards)
    names = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" if n > 1 else f"{stem}.safetensors" for i in range(1, n + 1)]
    for name, shard in zip(names, shards, strict=True):
        safetensors.write_file(folder / name, shard, itertools.islice(stream, len(shard)), {"format": "pt"})
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    if n > 1:
        _index(folder / f"{stem}{safetensors.INDEX}", places, sum(safetensors.nbytes(*x) for x in layout.values()))
    return places


def _index(path: Path, places: dict[str, str], size: int) -> None:
    table = {"metadata": {"total_size": size}, "weight_map": places}
    path.write_text(json.dumps(table, indent=2) + "\n")


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


WRITERS: dict[str, Callable[[Path, Layout, Iterator[tuple[str, np.ndarray]]], dict[str, str] | None]] = {
    "safetensors": _safetensors, "pth": pth.write_file, "dcp": dcp.write_folder,
}  # fmt: skip
LAYOUTS = {"diffusers": _diffusers, "transformers": _transformers, "native": _native, "dcp": _dcp}
