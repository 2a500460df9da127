"""What a path holds: the PyTorch layouts, recognised and checked, before any tensor is read.

In: a folder or file. Out: `Folder`: its components (transformer, vision_encoder, reasoner, vae, sound_tokenizer), each
with our config, the name map and the lazily read tensors; and the small files beside them. Spec training.md §3.1-3.5.

A component that is there is understood in full or refused: unknown config fields, unmapped, missing or misshapen
tensors are one sentence each (conversion/configs.py, conversion/check.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion import avae, configs, dcp, framework, omni, pth, reasoner, safetensors, tree, wan
from conversion.check import ConversionError, check
from conversion.names import Entry
from conversion.weights import Foreign
from cosmos_jax.codecs import avae as sound_tokenizer
from cosmos_jax.codecs import avae_config
from cosmos_jax.codecs import wan as video
from cosmos_jax.config import ModelConfig, VisionConfig
from cosmos_jax.model import cosmos

TRAVEL = (".json", ".jinja", ".txt", ".yaml", ".yml", ".model")  # configs and tokenizers travel with the weights


@dataclass(frozen=True)
class Component:
    name: str
    config: Any  # ModelConfig, WanConfig or AVAEConfig
    entries: list[Entry]
    tensors: Any  # Mapping name → array, with .shapes and .dtypes; read when asked
    target: Mapping  # shapes of our parameters
    dropped: dict[str, str] = field(default_factory=dict)  # name → why it is not needed

    def load(self) -> dict:
        """Our parameters, whole, in host memory and the source's dtypes."""
        return tree.from_torch(self.entries, self.tensors)

    def weights(self) -> Foreign:
        return Foreign(self.entries, self.tensors, self.target)


@dataclass(frozen=True)
class Folder:
    path: Path
    layout: str  # diffusers | transformers | native | dcp | pth
    components: dict[str, Component]
    files: dict[str, Path]  # relative name → configs and tokenizer files beside the weights
    scheduler: dict | None = None  # scheduler_config.json
    index: dict | None = None  # model_index.json, with `distilled_sigmas` of modular_model_index.json
    naming: str = ""  # of a reasoner's tensors, one of reasoner.NAMINGS


def open_folder(path: str | Path, model: ModelConfig | None = None, average: bool | None = None) -> Folder:
    """Recognise and check what `path` holds; reads headers only. ConversionError or FileError otherwise.

    model: the architecture, where the layout does not state it (DCP and the framework's safetensors). average: which of
    `net_ema.` and `net.` a DCP checkpoint gives (default: the average where there is one).
    """
    path = Path(path)
    if not path.exists():
        raise ConversionError(f"{path} does not exist; give the folder or the .pth file of a checkpoint.")
    if path.is_file():
        not_asked(path, model, average)
        return _original_file(path)
    for recognised, read in LAYOUTS:
        if recognised(path):
            return read(path, model, average)
    raise ConversionError(
        f"{path} is no checkpoint that is known here: neither a diffusers folder (model_index.json or config.json with "
        "_class_name), nor a transformers one (config.json with model_type), nor cosmos-framework's (.metadata, or "
        "safetensors with names net.…), nor a Wan2.2_VAE.pth."
    )


def _diffusers(path: Path, model: ModelConfig | None, average: bool | None) -> Folder:
    """model_index.json and a folder per component; or the folder of one component."""
    not_asked(path, model, average)
    parts = {name: path / name for name in READERS if (path / name / "config.json").is_file()}
    if any((path / EYE).glob("*.safetensors")):  # Edge's has no config.json: the one at the top describes it
        parts[EYE] = path / EYE
    if not parts and not _is_single(path):
        raise ConversionError(f"{path} has a model_index.json, but none of {', '.join((*READERS, EYE))} is there.")
    if not parts:
        name = CLASSES[_json(path / "config.json")["_class_name"]]
        return Folder(path, "diffusers", {name: READERS[name](path, None)}, _files(path))
    index = _json(path / "model_index.json") if (path / "model_index.json").is_file() else None
    modular = path / "modular_model_index.json"
    if index is not None and modular.is_file() and (sigmas := _json(modular).get("distilled_sigmas")):
        index["distilled_sigmas"] = sigmas
    for name, value in (index or {}).items():
        if name in (*READERS, EYE) and name not in parts and isinstance(value, list) and value[0] is not None:
            raise ConversionError(f"{path}: model_index.json names {name}, but {name}/config.json is not there.")
    eye = parts.pop(EYE, None)
    components = {name: READERS[name](folder, eye) for name, folder in parts.items()}
    if eye:
        if "transformer" not in components:
            raise ConversionError(f"{path} has a {EYE} but no transformer that it belongs to.")
        components[EYE] = _vision(eye, components["transformer"].config)
    scheduler = path / "scheduler" / "scheduler_config.json"
    return Folder(path, "diffusers", components, _files(path), _json(scheduler) if scheduler.is_file() else None, index)


def _transformer(folder: Path, eye: Path | None) -> Component:
    cfg = configs.diffusers_transformer(_json(folder / "config.json"))
    if eye:
        cfg = dataclasses.replace(cfg, vision=_eye(folder.parent, eye, cfg))
    source = safetensors.open_folder(folder)
    return _checked("transformer", cfg, omni.entries(cfg), source, omni.part(cosmos.abstract(cfg)))


def _eye(root: Path, folder: Path, cfg: ModelConfig) -> VisionConfig:
    """The reasoner's config.json at the top of the repository describes the eye in full; else the folder's own."""
    top = _json(root / "config.json") if (root / "config.json").is_file() else {}
    if top.get("model_type") in MODELS and "vision_config" in top:
        return configs.reasoner(top).vision
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} has no config.json, and {root}/config.json describes no vision encoder.")
    return configs.vision_encoder(_json(folder / "config.json"), cfg.hidden)


def _vision(folder: Path, cfg: ModelConfig) -> Component:
    source = safetensors.open_folder(folder)
    return _checked(
        "vision_encoder", cfg, reasoner.vision_entries(cfg), source, reasoner.vision_part(cosmos.abstract(cfg))
    )


def _vae(folder: Path, eye: Path | None) -> Component:
    cfg = video.WanConfig.from_diffusers(_json(folder / "config.json"))
    return _checked("vae", cfg, wan.entries(cfg), safetensors.open_folder(folder), video.abstract(cfg))


def _sound(folder: Path, eye: Path | None) -> Component:
    cfg = avae_config.from_diffusers(_json(folder / "config.json"))
    source = safetensors.open_folder(folder)
    return _checked("sound_tokenizer", cfg, avae.entries(cfg), source, sound_tokenizer.abstract(cfg))


def _transformers(path: Path, model: ModelConfig | None, average: bool | None) -> Folder:
    """A reasoner alone: Qwen3-VL, or that of Cosmos 3."""
    not_asked(path, None, average)  # a model may be asked for: the one to grow from this reasoner
    config = _json(path / "config.json")
    cfg, source = configs.reasoner(config), safetensors.open_folder(path)
    naming = reasoner.naming(config, source)
    component = _checked("reasoner", cfg, reasoner.NAMINGS[naming](cfg), source, reasoner.part(cosmos.abstract(cfg)))
    return Folder(path, "transformers", {"reasoner": component}, _files(path), naming=naming)


def _native(path: Path, model: ModelConfig | None, average: bool | None, source=None, layout="native") -> Folder:
    """cosmos-framework's own names, in safetensors or a DCP checkpoint. They do not state the architecture."""
    if model is None:
        raise ConversionError(
            f"{path} is a checkpoint of cosmos-framework, which does not state its architecture; give --config, for "
            "example --config=configs/nano.py."
        )
    source = safetensors.open_folder(path) if source is None else source
    found = [p for p in framework.PREFIXES if any(name.startswith(p) for name in source)]
    wanted = [p for p in found if average is None or average == ("ema" in p)]
    if not wanted:
        have = ", ".join(f"{p}*" for p in found)
        raise ConversionError(f"{path} holds {have or 'none of the known names'}; choose --params accordingly.")
    prefix, *others = wanted + [p for p in found if p not in wanted]
    which = "the average" if "ema" in prefix else "the last parameters"
    dropped = {f"{p}*": f"{which} ({prefix}*) are taken" for p in others}
    if not any(name.startswith(f"{prefix}{framework.VISUAL}") for name in source):
        model = dataclasses.replace(model, vision=None)
    entries, target = framework.entries(model, prefix), cosmos.abstract(model)
    component = _checked("transformer", model, entries, source, target, dropped)
    return Folder(path, layout, {"transformer": component}, _files(path))


def _dcp(path: Path, model: ModelConfig | None, average: bool | None) -> Folder:
    return _native(path, model, average, dcp.open_folder(path), "dcp")


def _original_file(path: Path) -> Folder:
    """`Wan2.2_VAE.pth`, or the sound tokeniser as it was trained (a .ckpt, its config in a .json of the same name)."""
    source = safetensors.open_file(path) if path.suffix == ".safetensors" else pth.open_file(path)
    if (prefix := avae.original_prefix(source)) is None:
        cfg = video.WanConfig()  # the file states none: it is the published VAE or an error
        component = _checked("vae", cfg, wan.entries_original(cfg), source, video.abstract(cfg))
        return Folder(path, "pth", {"vae": component}, {})
    stated = path.with_suffix(".json")
    sound = avae_config.from_diffusers(_json(stated) if stated.is_file() else {})
    encodes = any(name.startswith(f"{prefix}encoder.") for name in source)
    sound = dataclasses.replace(sound, encoder_enabled=encodes)
    dropped = {f"{prefix}bottleneck.*": "the bottleneck computes without parameters"}
    dropped |= {name: "not of the generator" for name in source if not name.startswith(prefix)}
    entries, target = avae.entries_original(sound, prefix), sound_tokenizer.abstract(sound)
    component = _checked("sound_tokenizer", sound, entries, source, target, dropped)
    return Folder(path, "pth", {"sound_tokenizer": component}, {})


def _checked(name: str, cfg: Any, entries: list[Entry], source: Any, target: Mapping, dropped=None) -> Component:
    try:
        gone = check(entries, source.shapes, target, dropped)
    except ConversionError as e:
        raise ConversionError(f"{name}: {e}") from None
    return Component(name, cfg, entries, source, target, gone)


READERS: dict[str, Callable[[Path, Path | None], Component]] = {
    "transformer": _transformer, "vae": _vae, "sound_tokenizer": _sound,
}  # fmt: skip
EYE = "vision_encoder"
CLASSES = {
    "Cosmos3OmniTransformer": "transformer", "AutoencoderKLWan": "vae", "Cosmos3AVAEAudioTokenizer": "sound_tokenizer",
}  # fmt: skip
MODELS = ("qwen3_vl", "cosmos3_omni", "cosmos3_edge")


def _is_single(path: Path) -> bool:
    """The folder of one component."""
    config = path / "config.json"
    return config.is_file() and _json(config).get("_class_name") in CLASSES


def _is_diffusers(path: Path) -> bool:
    return _is_single(path) or (path / "model_index.json").is_file() or (path / "transformer" / "config.json").is_file()


def _is_dcp(path: Path) -> bool:
    return any((path / p / ".metadata").is_file() for p in ("", "model"))


def _is_native(path: Path) -> bool:
    files = any(path.glob("*.safetensors"))
    return files and any(name.startswith(framework.PREFIXES) for name in safetensors.open_folder(path))


def _is_transformers(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and _json(config).get("model_type") in MODELS


LAYOUTS = (
    (_is_diffusers, _diffusers), (_is_dcp, _dcp), (_is_native, _native), (_is_transformers, _transformers),
)  # fmt: skip


def not_asked(path: Path, model: ModelConfig | None, average: bool | None) -> None:
    if model is not None:
        raise ConversionError(f"{path} states its own architecture; leave --config out.")
    if average is not None:
        raise ConversionError(f"{path} holds one set of parameters; leave --params out.")


def _files(path: Path) -> dict[str, Path]:
    """Configs, tokenizer, scheduler … by their names relative to `path`; indexes belong to the weights."""
    found = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in TRAVEL}
    return {k: p for k, p in found.items() if not k.endswith(safetensors.INDEX) and not k.startswith(".")}


def _json(path: Path) -> dict:
    try:
        table = json.loads(path.read_text())
    except ValueError as e:
        raise ConversionError(f"{path} is not JSON ({e}); download it again.") from None
    if not isinstance(table, dict):
        raise ConversionError(f"{path} is not a table; download it again.")
    return table
