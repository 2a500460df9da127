"""Our network layer by layer, through its own blocks, so that every hidden state can be looked at or replaced.

In: params, config, one batch. Out: the two streams before each layer and after the last; or what one layer makes of
streams that somebody else computed. `Network.heads` of the last streams must equal `cosmos.apply`: a row of the report.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos, stack
from cosmos_jax.model.attention import full_plan
from cosmos_jax.model.block import Stream
from cosmos_jax.precision import Precision
from pallas_kernels.attention import Plan


class Start(NamedTuple):
    """What enters the layers."""

    und: jax.Array  # [B,U,D]
    gen: jax.Array | None  # [B,G,D]; None: the reasoner alone
    und_stream: Stream
    gen_stream: Stream | None
    deepstack: jax.Array | None  # [n,B,U,D]


@functools.partial(jax.jit, static_argnames=("cfg", "precision", "alone"))
def start(params: dict, cfg: ModelConfig, batch: dict, timesteps, *, precision: Precision, alone: bool = False):
    """Embeddings, rotary tables. `alone`: without the generator."""
    model = cosmos._model(params, cfg)
    und, deepstack = model.embed_und(batch, precision)
    if alone:
        return Start(und, None, cosmos._und_stream(cfg, batch, precision), None, deepstack)
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    gen = model.io.embed(batch, noised, timesteps, cfg.timestep_scale, precision)
    streams = cosmos._und_stream(cfg, batch, precision), cosmos._gen_stream(cfg, batch, precision)
    return Start(und, gen, *streams, deepstack)


@functools.partial(jax.jit, static_argnames=("graph", "precision"))
def _layer(graph, weights, i, und, gen, at: Start, precision: Precision):
    und, gen, _ = nnx.merge(graph, weights)(und, gen, at.und_stream, at.gen_stream, None, precision)
    if at.deepstack is not None:
        und = und + stack._tap(at.deepstack, i)
    return und, gen


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def heads(params: dict, cfg: ModelConfig, batch: dict, und, gen, *, precision: Precision) -> tuple[Any, jax.Array]:
    """The last streams → (velocity or None, normalised und)."""
    model = cosmos._model(params, cfg)
    velocity = None
    if gen is not None:
        velocity = model.io.velocity(batch, model.norm_gen(gen, precision), cfg.patch, precision)
    return velocity, model.norm_und(und, precision)


class Layers:
    """The layers of one set of parameters, one at a time."""

    def __init__(self, params: dict, cfg: ModelConfig, at: Start, precision: Precision):
        self.graph, self.weights = nnx.split(cosmos._model(params, cfg).layers)
        self.count, self.at, self.precision = cfg.layers, at, precision

    def __call__(self, i: int, und, gen=None):
        """Layer i of these streams."""
        weights = jax.tree.map(lambda x: x[i], self.weights)
        return _layer(self.graph, weights, i, und, gen, self.at, self.precision)

    def walk(self) -> list[tuple[jax.Array, jax.Array | None]]:
        """(und, gen) before layer 0, 1, … and after the last."""
        path = [(self.at.und, self.at.gen)]
        for i in range(self.count):
            path.append(self(i, *path[-1]))
        return path


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def see_start(params: dict, cfg: ModelConfig, batch: dict, *, precision: Precision):
    """What enters the vision encoder's blocks [B,P,D], their rotary tables (None for Edge), who sees whom."""
    eye: Any = cosmos._model(params, cfg).vit
    return *eye.embed(batch, precision), full_plan(batch["vit_segment_ids"], cfg.attention, precision)


@functools.partial(jax.jit, static_argnames=("graph", "precision"))
def _block(graph, weights, x, rotary, plan: Plan, precision: Precision):
    return nnx.merge(graph, weights)(x, rotary, plan, precision)


class Blocks:
    """The vision encoder's blocks, one at a time."""

    def __init__(self, params: dict, cfg: ModelConfig, batch: dict, precision: Precision):
        self.start, self.rotary, self.plan = see_start(params, cfg, batch, precision=precision)
        eye: Any = cosmos._model(params, cfg).vit
        self.graph, self.weights = nnx.split(eye.layers)
        self.count, self.precision = cfg.vision.layers, precision

    def __call__(self, i: int, x):
        """Block i of x [B,P,D]."""
        weights = jax.tree.map(lambda w: w[i], self.weights)
        return _block(self.graph, weights, x, self.rotary, self.plan, self.precision)
