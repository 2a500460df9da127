"""A checkpoint folder as everything that generating needs: configs, tokenizer, scheduler, and weights still in files.

In: a PyTorch folder (diffusers layout) or an imported Orbax checkpoint. Out: `Bundle`. Opening reads headers and small
files only; `generator`, `reasoner`, `video`, `sound` bring weights straight from the files to the current mesh (or the
first device), in the compute dtype, each when it is needed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion import reasoner
from conversion.check import ConversionError
from conversion.source import ITEMS, Source, open_source
from cosmos_jax import state as states
from cosmos_jax.codecs import avae, wan
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import scheduler_config
from data_pipelines import preprocessor
from data_pipelines.reasoner import Frontend
from data_pipelines.tokenizer import ChatTokenizer
from data_pipelines.vision import Eyes

TOKENIZER = "text_tokenizer"
CHUNK = 4  # latent frames that the video VAE decodes at a time; any number gives the same bits
FLOAT32 = ("time",)  # parameters below "io" that stay float32 in a bfloat16 model (spec model.md §11)


@dataclass(frozen=True)
class Bundle:
    path: Path
    source: Source
    config: ModelConfig

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """ConversionError or ValueError, one sentence, unless the folder holds a transformer, or a reasoner."""
        source = open_source(path)
        for name in ("transformer", "reasoner"):
            if name in source.components:
                return cls(Path(path), source, source.components[name][0])
        raise ConversionError(f"{path} holds {', '.join(source.components)}, but neither a transformer nor a reasoner.")

    @property
    def generates(self) -> bool:
        return "transformer" in self.source.components

    @property
    def index(self) -> dict:
        return self.source.index

    @cached_property
    def video_config(self) -> wan.WanConfig:
        return self._part("vae")

    @cached_property
    def sound_config(self) -> avae.AVAEConfig:
        return self._part("sound_tokenizer")

    def has(self, component: str) -> bool:
        return component in self.source.components

    def _part(self, name: str) -> Any:
        if not self.has(name):
            raise ConversionError(f"{self.path} has no {name}, which this request needs; take the whole repository.")
        return self.source.components[name][0]

    @cached_property
    def scheduler(self) -> dict:
        if self.source.scheduler is None:
            raise ConversionError(f"{self.path} has no scheduler/scheduler_config.json, which says how to denoise.")
        return self.source.scheduler

    @property
    def fixed_sigmas(self) -> list[float] | None:
        """Of a distilled checkpoint."""
        return scheduler_config.fixed_sigmas(self.scheduler, self.index)

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Of text_tokenizer/, or of the folder itself."""
        inside = self.source.root / TOKENIZER
        return ChatTokenizer.load(inside if inside.is_dir() else self.source.root)

    @cached_property
    def frontend(self) -> Frontend:
        """How the reasoner reads: by the tokenizer at the top, or that of text_tokenizer/. It has no eyes yet."""
        top = self.source.root
        return Frontend(ChatTokenizer.load(top) if (top / "tokenizer.json").is_file() else self.tokenizer)

    @cached_property
    def eyes(self) -> Eyes:
        """How the reasoner's pictures are prepared. ValueError, one sentence, for a folder that does not say."""
        return preprocessor.load(self.source.root)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's, and those that generation_config.json names. ConversionError."""
        file, more = self.source.root / "generation_config.json", []
        if file.is_file():
            try:
                told = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError) as e:
                raise ConversionError(f"{file} is not a table in JSON ({e}); download it again.") from None
            more = told if isinstance(told, list) else [] if told is None else [told]
        if any(type(i) is not int for i in more):
            raise ConversionError(f"{file}: eos_token_id = {more} must be ids of tokens; download it again.")
        return tuple(dict.fromkeys((self.frontend.tokenizer.eos, *more)))

    def _params(self, job: str, precision: Precision) -> dict:
        whole = cosmos.part(states.abstract_params(self.config, precision.dtype), job)
        if not self.has("vision_encoder") and not self.has("reasoner"):
            whole.pop("vit", None)
        if not self.generates:
            whole = reasoner.part(whole)
        kept = {
            k: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) if k[:2] == ("io", *FLOAT32) else x
            for k, x in flatten_dict(whole).items()
        }
        return unflatten_dict(kept)

    def abstract(self, job: str, precision: Precision, vision: bool = False) -> dict:
        """Shapes, dtypes and places of a job's parameters. vision: with the eye."""
        tree = self._params(job, precision)
        return tree if vision or job != "reasoner" else {k: v for k, v in tree.items() if k != "vit"}

    def load(self, job: str, precision: Precision, vision: bool = False) -> dict:
        """Parameters of a job of `cosmos.JOBS` ("captions", "generator", "reasoner"), on their devices."""
        return self.source.place(ITEMS.get("transformer", "model"), self.abstract(job, precision, vision))

    def video(self, precision: Precision, chunk: int = CHUNK, tile: int | None = None) -> wan.WanCodec:
        params = self._codec("vae", wan.abstract(self.video_config), precision)
        return wan.WanCodec(self.video_config, params, precision, chunk, tile)

    def sound(self, precision: Precision) -> avae.AVAECodec:
        return avae.AVAECodec(
            self._codec("sound_tokenizer", avae.abstract(self.sound_config), precision), self.sound_config, precision
        )

    def _codec(self, name: str, tree: dict, precision: Precision) -> dict:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return self.source.place(
            name, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, precision.dtype, sharding=place), tree)
        )

    def identity(self) -> dict[str, Any]:
        """What run.json says about the checkpoint: where, which layout, and hashes of what decides the numbers.

        An imported checkpoint brings the sha256 of every file it came from. Of a PyTorch folder only small files are
        hashed (reading tens of gigabytes would take longer than generating); weights are named with their sizes.
        """
        said = {"path": str(self.path), "layout": self.source.layout}
        if self.source.sha256:
            return said | {"sha256": self.source.sha256}
        small = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in sorted(self.source.files.items())}
        return said | {"sha256": small, "weights": self._sizes()}

    def _sizes(self) -> dict[str, int]:
        folder = self.source.folder
        paths = {p for c in folder.components.values() for p in c.tensors.files} if folder else set()
        return {str(p.relative_to(self.path)): p.stat().st_size for p in sorted(paths)}
