"""A fresh Cosmos 3 from a trained reasoner: the und tower is the reasoner, the gen tower starts as a copy of it.

In: parameters of a reasoner (conversion/reasoner.py). Out: a whole tree, in memory (`from_reasoner`) or read as it is
written (`Grown`). Spec training.md §3.6: `init_moe` of the framework copies every parameter of the gen tower from its
und twin; what has no twin keeps its fresh values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion.check import ConversionError
from conversion.weights import Path, Weights
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos

UND = (  # what a reasoner's files and the config of a whole model both state
    "layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "mlp_act", "norm_eps", "qk_norm_und", "rope_theta",
    "rope_sections", "vocab",
)  # fmt: skip


def from_reasoner(fresh: Mapping, reasoner: Mapping) -> tuple[dict, list[str]]:
    """(parameters, paths that stay fresh). fresh: a randomly initialised whole model; reasoner: of the same config.

    The result shares arrays with both. ConversionError if a parameter of the reasoner is unknown or has another shape.
    """
    out, taken = flatten_dict(dict(fresh)), flatten_dict(dict(reasoner))
    origin = _origins(out, taken)
    taken = {path: taken[source] for path, source in origin.items()}
    return unflatten_dict(out | taken), sorted("/".join(path) for path in set(out) - set(taken))


class Grown(Weights):
    """The same without holding it: a whole model of `cfg`, read from a reasoner and, where that has nothing, fresh.

    Fresh parameters are float32, drawn from `seed`; `fresh` lists their paths. ConversionError if the reasoner is of
    another architecture.
    """

    def __init__(self, cfg: ModelConfig, own: ModelConfig, reasoner: Weights, seed: int = 0):
        """own: the reasoner's config."""
        _same_und(cfg, own)
        target = flatten_dict(cosmos.abstract(cfg))
        self.reasoner, self.origin = reasoner, _origins(target, reasoner.arrays)
        self.arrays = {k: reasoner.arrays[self.origin[k]] if k in self.origin else x for k, x in target.items()}
        self.stacked = frozenset(k for k in target if k[:1] == ("layers",) or self.origin.get(k) in reasoner.stacked)
        self.narrowed = {}
        self.fresh, self.seed = sorted(set(target) - set(self.origin)), seed
        self.drawn = _draw(cfg, self.fresh, seed)

    def read(self, path: Path, layer: int | None = None) -> np.ndarray:
        if path in self.origin:
            return self.reasoner.read(self.origin[path], layer)
        x = self.drawn[path]
        return x if layer is None else x[layer]


def _draw(cfg: ModelConfig, paths: Iterable[Path], seed: int) -> dict[Path, np.ndarray]:
    """Fresh parameters; XLA leaves out all others. Those of layers are norms, the same for every layer."""
    one = dataclasses.replace(cfg, layers=1, vision=None)

    @jax.jit
    def draw(key):
        tree = flatten_dict(cosmos.init(one, key))
        return {"/".join(k): tree[k] for k in paths}

    out = {k: np.asarray(draw(jax.random.key(seed))["/".join(k)]) for k in paths}
    for path, x in out.items():
        if path[0] == "layers":
            if path[-2:] not in (("q_norm", "weight"), ("k_norm", "weight"), ("k_norm_for_gen", "weight")):
                raise ConversionError(f"the reasoner lacks {'/'.join(path)}, which no recipe starts afresh.")
            out[path] = np.repeat(x, cfg.layers, 0)
    return out


def _origins(target: Mapping[Path, Any], reasoner: Mapping[Path, Any]) -> dict[Path, Path]:
    """Parameter of the whole model → the reasoner's that it starts as."""
    origin = {}
    for path, x in reasoner.items():
        if path not in target or target[path].shape != x.shape:
            have = target[path].shape if path in target else "no such parameter"
            raise ConversionError(f"the reasoner's {'/'.join(path)} {x.shape} does not fit the model ({have}).")
        origin[path] = path
        twin = _twin(path)
        if twin is not None and twin in target:
            origin[twin] = path
    return origin


def _twin(path: Path) -> Path | None:
    """The parameter of the gen tower that starts as a copy of this one of the und tower."""
    if path[:2] == ("layers", "und"):
        return ("layers", "gen", *path[2:])
    return ("norm_gen", *path[1:]) if path[0] == "norm_und" else None


def _same_und(cfg: ModelConfig, own: ModelConfig) -> None:
    for name in UND:
        if getattr(cfg, name) != getattr(own, name):
            raise ConversionError(
                f"the reasoner has {name}={getattr(own, name)!r}, but the model that --config describes has "
                f"{getattr(cfg, name)!r}; choose the config that belongs to this reasoner."
            )
