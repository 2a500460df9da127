"""The whole network, as pure functions of `params`.

In: a packed batch (data_pipelines/schema.py) and noised latents. Out: velocities, und hidden states, logits.
`cfg` and `precision` are static; `params` is a nested dict of float32 arrays. Spec model.md §2, §13.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from cosmos_jax import shard
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import rope, stack
from cosmos_jax.model.attention import gen_plans, und_plan
from cosmos_jax.model.block import KV, Stream
from cosmos_jax.model.declare import normal, param, project, use
from cosmos_jax.model.modality import Modalities, take_rows
from cosmos_jax.model.norm import RMSNorm
from cosmos_jax.model.vision import VisionTower
from cosmos_jax.model.vision_siglip import SiglipTower
from cosmos_jax.precision import Precision

EYES = {"qwen3vl": VisionTower, "siglip2": SiglipTower}


class Output(NamedTuple):
    velocity: dict[str, jax.Array]  # float32, shaped like `*_x0`
    hidden: jax.Array  # [B,U,D] after the und tower's final norm


class UndOutput(NamedTuple):
    hidden: jax.Array  # [B,U,D]
    cache: KV  # [L,B,U,Hkv,d]


class Cosmos(nnx.Module):
    """Declaration of every parameter; the functions below run it."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d = cfg.hidden
        self.embed_tokens = param(rngs, (cfg.vocab, d), ("vocab_in", "embed"), normal(cfg.init_std))
        self.layers = stack.init(cfg, rngs.params())
        self.norm_und = RMSNorm(rngs, d, "hidden", cfg.norm_eps, cfg.norm_cast)
        self.norm_gen = RMSNorm(rngs, d, "hidden", cfg.norm_eps, cfg.norm_cast)
        self.lm_head = param(rngs, (d, cfg.vocab), ("embed", "vocab"), normal(cfg.init_std))
        self.io = Modalities(cfg, rngs)
        self.attention = cfg.attention
        self.vit = EYES[cfg.vision.kind](cfg.vision, cfg.sequence.vit_patch_dim, d, rngs) if cfg.vision else None

    def embed_und(self, batch: dict, precision: Precision, axis: str = "token") -> tuple[jax.Array, jax.Array | None]:
        """Token embeddings with ViT features in place of the visual pads, and deep-stack features [n,B,U,D] or None.

        axis: the logical axis along which tokens lie.
        """
        table, tokens = use(self.embed_tokens, precision), ("batch", axis)
        ids = shard.constrain(batch["und_ids"], tokens)
        h = shard.rowwise(lambda ids, table: table[ids], ids, takes=(tokens,), gives=tokens, shared=(table,))
        if self.vit is None or not batch["vit_patches"].shape[1]:
            return h, None
        features, deepstack = self.vit(batch, precision, self.attention)
        index = shard.constrain(batch["und_vit_index"], tokens)
        h = jnp.where((index >= 0)[..., None], take_rows(features, index), h)
        if deepstack is not None:
            deepstack = jnp.stack([take_rows(x, index) for x in deepstack])
        return h, deepstack


@functools.lru_cache
def _skeleton(cfg: ModelConfig):
    """graphdef and abstract parameters, without allocating anything."""
    return nnx.split(nnx.eval_shape(lambda: Cosmos(cfg, nnx.Rngs(0))))


def _model(params: dict, cfg: ModelConfig) -> Cosmos:
    """Parameters that a job does without (`part`) become arrays without elements: using one is a shape error."""
    graphdef, state = _skeleton(cfg)
    whole = flatten_dict(nnx.to_pure_dict(state))
    absent = set(whole) - set(flatten_dict(params))
    if not absent:
        return nnx.merge(graphdef, params)
    empty = {k: jnp.zeros((cfg.layers if k[0] == "layers" else 0, 0)) for k in absent}
    return nnx.merge(graphdef, unflatten_dict(flatten_dict(params) | empty))


JOBS = {  # what of the parameters a job needs: tops of the tree, and the towers of its layers
    "reasoner": (("embed_tokens", "norm_und", "lm_head", "vit"), ("und",)),
    "captions": (("embed_tokens", "norm_und"), ("und",)),  # their keys and values: `und` without pictures
    "generator": (("io", "norm_gen"), ("gen",)),  # after the prompt's keys and values are cached: `gen`
}


def part(tree: dict, job: str) -> dict:
    """The branches of a tree of parameters (or shapes, or axes) that a job of `JOBS` needs."""
    tops, towers = JOBS[job]
    kept = {k: v for k, v in tree.items() if k in tops}
    return kept | {"layers": {k: v for k, v in tree["layers"].items() if k in towers}}


def init(cfg: ModelConfig, key: jax.Array) -> dict:
    """Random parameters (spec model.md §2.8), float32. Jit it with out_shardings to land them in place."""
    return nnx.to_pure_dict(nnx.state(Cosmos(cfg, nnx.Rngs(key))))


def abstract(cfg: ModelConfig) -> dict:
    """The same tree of `ShapeDtypeStruct`s."""
    return nnx.to_pure_dict(_skeleton(cfg)[1])


def logical_axes(cfg: ModelConfig) -> dict:
    """The same tree of axis-name tuples; scanned layers have a leading "layers" axis."""
    flat = []
    for path, p in nnx.to_flat_state(_skeleton(cfg)[1]):
        axes = p.get_metadata()["logical"]
        stacked = len(p.shape) > len(axes)
        flat.append((path, ("layers", *axes) if stacked else axes))
    return nnx.traversals.unflatten_mapping(dict(flat))


def _und_layout(cfg: ModelConfig, batch: dict) -> shard.Layout:
    layout = shard.SPREAD if cfg.und_tokens == "spread" else shard.REPLICATED
    return shard.fitting(layout, batch["und_ids"].shape[1])


def _gen_layout(batch: dict) -> shard.Layout:
    return shard.fitting(shard.SPREAD, batch["gen_source"].shape[1])


def _tables(cfg: ModelConfig, positions: jax.Array, layout: shard.Layout) -> tuple[jax.Array, jax.Array]:
    positions = shard.constrain(positions, ("batch", "feature", layout.work))
    return rope.tables(positions, cfg.rope_theta, cfg.rope_sections)


def _und_stream(cfg: ModelConfig, batch: dict, precision: Precision, layout: shard.Layout = shard.WHOLE) -> Stream:
    plan = und_plan(batch["und_segment_ids"], cfg.attention, precision, layout)
    return Stream(*_tables(cfg, batch["und_positions"], layout), (plan,))


def _gen_stream(cfg: ModelConfig, batch: dict, precision: Precision, layout: shard.Layout = shard.WHOLE) -> Stream:
    weight = batch["control_weight"] if batch["control_weight"].shape[1] else None
    ids = (batch["gen_segment_ids"], batch["und_segment_ids"])
    plans = gen_plans(*ids, cfg.attention, precision, weight, layout, cfg.context)
    if weight is not None:
        weight = shard.constrain(weight, ("batch", "token", layout.work))
    return Stream(*_tables(cfg, batch["gen_positions"], layout), plans, weight)


def apply(
    params: dict, cfg: ModelConfig, batch: dict, noised: dict, timesteps: jax.Array, *, precision: Precision
) -> Output:
    """Both towers in one pass (training). timesteps [B,N] float32 = 1000·sigma per segment. Returns `Output`."""
    model, und, gen = _model(params, cfg), _und_layout(cfg, batch), _gen_layout(batch)
    h, deepstack = model.embed_und(batch, precision, und.rest)
    g = model.io.embed(batch, noised, timesteps, cfg.timestep_scale, precision, gen.rest)
    streams = _und_stream(cfg, batch, precision, und), _gen_stream(cfg, batch, precision, gen)
    h, g, _ = stack.run(model.layers, cfg, h, g, *streams, precision, deepstack=deepstack)
    velocity = model.io.velocity(batch, model.norm_gen(g, precision), cfg.patch, precision)
    return Output(velocity, model.norm_und(h, precision))


def see(params: dict, cfg: ModelConfig, batch: dict, *, precision: Precision) -> tuple[jax.Array, jax.Array | None]:
    """The vision encoder alone: features [B,P/4,D] and deep-stack features [n,B,P/4,D] (None without taps)."""
    if cfg.vision is None:
        raise ValueError(f"model {cfg.name!r} has no vision encoder; set model.vision.")
    return _model(params, cfg).vit(batch, precision, cfg.attention)


def und(params: dict, cfg: ModelConfig, batch: dict, *, precision: Precision) -> UndOutput:
    """The reasoner alone. Its cache is all that the generator needs of the text, at every denoising step."""
    model, layout = _model(params, cfg), _und_layout(cfg, batch)
    h, deepstack = model.embed_und(batch, precision, layout.rest)
    stream = _und_stream(cfg, batch, precision, layout)
    h, _, cache = stack.run(model.layers, cfg, h, None, stream, None, precision, deepstack=deepstack, want_cache=True)
    return UndOutput(model.norm_und(h, precision), cache)


def gen(
    params: dict, cfg: ModelConfig, batch: dict, noised: dict, timesteps: jax.Array, cache: KV, *, precision: Precision
) -> dict[str, jax.Array]:
    """The generator alone, over cached und keys and values. Returns float32 velocities."""
    model, layout = _model(params, cfg), _gen_layout(batch)
    h = model.io.embed(batch, noised, timesteps, cfg.timestep_scale, precision, layout.rest)
    stream = _gen_stream(cfg, batch, precision, layout)
    _, h, _ = stack.run(model.layers, cfg, None, h, None, stream, precision, cache=cache)
    return model.io.velocity(batch, model.norm_gen(h, precision), cfg.patch, precision)


def logits(params: dict, cfg: ModelConfig, hidden: jax.Array, *, precision: Precision) -> jax.Array:
    """hidden [B,T,D] (normalised) → [B,T,vocab] float32."""
    h, w = shard.at_work(hidden), _model(params, cfg).lm_head
    return project("btd,dv->btv", h, w, precision, out=("batch", shard.SAME, "vocab"), result="float32")
