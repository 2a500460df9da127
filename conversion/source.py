"""Where weights may come from: a PyTorch folder, an imported Orbax checkpoint, a training run here.

In: a path. Out: `Source`: per component its config and its parameters, unread; and the files that travel with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion import manifest
from conversion.check import ConversionError
from conversion.folder import EYE, Folder, not_asked, open_folder
from conversion.initialise import Grown
from conversion.weights import Merged, Selected, Stored, Weights, place
from cosmos_jax import checkpoint
from cosmos_jax.codecs.avae_config import AVAEConfig
from cosmos_jax.codecs.wan import WanConfig
from cosmos_jax.config import Config, ModelConfig, from_dict

WEIGHTS, FILES = "weights", "files"  # inside an imported checkpoint, beside its manifest
CONFIGS: dict[str, type] = {"vae": WanConfig, "sound_tokenizer": AVAEConfig}  # any other component: ModelConfig
ITEMS = {"vae": "vae", "sound_tokenizer": "sound_tokenizer"}  # any other component: "model"


@dataclass(frozen=True)
class Source:
    path: Path
    layout: str  # of the PyTorch folder, or where these weights came from; "run" for a training run here
    components: Mapping[str, tuple[Any, Weights]]  # name → config, parameters
    files: dict[str, Path] = field(default_factory=dict)  # configs and tokenizers, by their names in that layout
    lines: tuple[str, ...] = ()  # what a user should read
    naming: str = ""  # of a reasoner's tensors, one of reasoner.NAMINGS
    folder: Folder | None = None  # the PyTorch folder, if it is one
    fresh: dict[str, Any] = field(default_factory=dict)  # what was drawn: seed and paths
    scheduler: dict | None = None  # scheduler_config.json
    index: dict = field(default_factory=dict)  # what the pipeline's index says beside it
    sha256: dict[str, str] = field(default_factory=dict)  # of the files it was imported from

    @property
    def root(self) -> Path:
        """Where `files` lie, as in the PyTorch folder."""
        return self.path / FILES if (self.path / manifest.NAME).is_file() else self.path

    def place(self, part: str, abstract: Mapping) -> dict:
        """Parameters of an item ("model", "vae", "sound_tokenizer") on their devices: see `weights.place`."""
        return place(Merged(*(w for name, (_, w) in self.components.items() if item(name) == part)), abstract)


def item(component: str) -> str:
    """The item of the Orbax checkpoint that holds a component; both towers and the eye share one tree."""
    return ITEMS.get(component, "model")


def is_ours(path: Path) -> bool:
    """Whether this is an Orbax checkpoint: imported, or of a run."""
    return (path / manifest.NAME).is_file() or (path / "checkpoints").is_dir()


def open_source(path: str | Path, model: ModelConfig | None = None, average: bool | None = None) -> Source:
    """Recognise what `path` holds. ConversionError, FileError or CheckpointError: one sentence."""
    path = Path(path)
    if (path / manifest.NAME).is_file():
        not_asked(path, model, average)
        return _imported(path)
    if (path / "checkpoints").is_dir():
        not_asked(path, model, None)  # a run has an average and last parameters, as --params says
        return _run(path, average)
    found = open_folder(path, model, average)
    components: dict[str, tuple[Any, Weights]] = {k: (c.config, c.weights()) for k, c in found.components.items()}
    origin = Source(
        path, found.layout, components, found.files, naming=found.naming, folder=found, scheduler=found.scheduler,
        index=manifest.index_of(found),
    )  # fmt: skip
    return _grown(origin, model) if found.layout == "transformers" and model is not None else origin


def _grown(origin: Source, model: ModelConfig) -> Source:
    """A whole model of this architecture that starts as the reasoner `origin`."""
    own, weights = origin.components["reasoner"]
    model = dataclasses.replace(model, vision=own.vision)
    whole = Grown(model, own, weights)
    eye = {k for k in whole.arrays if k[0] == "vit"}
    components = {
        "transformer": (model, Selected(whole, set(whole.arrays) - eye)), EYE: (model, Selected(whole, eye))
    }  # fmt: skip
    return dataclasses.replace(
        origin,
        components=components,
        layout="grown",
        naming="",
        lines=(
            f"grown from a reasoner: {len(whole.fresh)} parameters are fresh (seed {whole.seed}), see the manifest",
        ),
        fresh={"seed": whole.seed, "paths": ["/".join(k) for k in whole.fresh]},
    )


def _imported(path: Path) -> Source:
    table = manifest.read(path)
    items = {c["item"] for c in table["components"].values()}
    stores = {name: checkpoint.open_arrays(path / WEIGHTS, name) for name in items}
    components = {}
    for name, c in table["components"].items():
        cfg = from_dict(c["config"], CONFIGS.get(name, ModelConfig), name)
        paths = [tuple(k.split("/")) for k in c["paths"]]
        components[name] = (cfg, Stored({k: stores[c["item"]][k] for k in paths}, c["narrowed"]))
    files = {name: path / FILES / name for name in table["files"]}
    scheduler, prompts = table["scheduler"] or {}, table["prompts"] or {}
    index = dict(scheduler.get("index", {}))
    if prompts.get("stated"):
        index["default_use_system_prompt"] = prompts["use_system_prompt"]
    return Source(
        path, table["source"]["layout"], components, files, naming=table["source"]["naming"],
        scheduler=scheduler.get("config"), index=index, sha256=table["source"]["sha256"],
    )  # fmt: skip


def _run(path: Path, average: bool | None) -> Source:
    """The newest complete step of a training run: its transformer, and the eye of its reasoner."""
    config: Config = checkpoint.load_config(path / "checkpoints")
    step = checkpoint.find((path / "checkpoints").absolute())
    stores = checkpoint.open_arrays(step, "state")
    averaged = {k[1:]: x for k, x in stores.items() if k[0] == "ema"}
    if average and not averaged:
        raise ConversionError(f"{step} holds no average (optim.ema was 0); ask for --params=params.")
    params = {k[1:]: x for k, x in stores.items() if k[0] == "params"}
    if average is not False:
        params |= averaged
    which = "the averaged parameters" if averaged and average is not False else "the last parameters"
    components: dict[str, tuple[Any, Weights]] = {
        "transformer": (config.model, Stored({k: x for k, x in params.items() if k[0] != "vit"}))
    }
    if config.model.vision:
        components["vision_encoder"] = (config.model, Stored({k: x for k, x in params.items() if k[0] == "vit"}))
    return Source(path, "run", components, {}, (f"step {step.name}, {which}; the toy's tokenisers are not exported",))
