"""The training state: a plain dict, born in its place on the mesh.

In: `Config`. Out: {"step", "params", "opt", "ema", "rng"}:

* step    int32 scalar: optimiser steps taken
* params  nested dict of float32 parameters
* opt     optax state over the trained parameters; every moment lies where its parameter lies
* ema     float32 average of the trained parameters ({} when optim.ema = 0); frozen ones are their own average
* rng     uint32 [2]: key data from which the noise of step n is drawn (fold_in(rng, n)); never advanced

With optim.offload the parts of `WAITING` lie in host memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cosmos_jax import optim, shard
from cosmos_jax.config import Config, ModelConfig
from cosmos_jax.model import cosmos

WAITING = ("opt", "ema")  # parts that only the end of a step needs


def rest(cfg: Config, state: dict) -> dict:
    """The state as it is between steps: what waits, in host memory if the config says so."""
    return state | {k: shard.on_host(state[k]) for k in WAITING} if cfg.optim.offload else state


def wake(cfg: Config, state: dict) -> dict:
    """The state with everything on its devices."""
    return state | {k: shard.on_device(state[k]) for k in WAITING} if cfg.optim.offload else state


def init_params(cfg: ModelConfig, key: jax.Array) -> dict:
    """Random parameters, each drawn where it will live (no device ever holds a whole one). Call it inside jit."""
    if shard.no_mesh():
        return cosmos.init(cfg, key)
    specs = jax.tree.map(shard.spec, cosmos.logical_axes(cfg), is_leaf=lambda a: isinstance(a, tuple))
    return jax.sharding.auto_axes(functools.partial(cosmos.init, cfg), out_sharding=specs)(key)


def _assemble(cfg: Config, params: dict, key: jax.Array) -> dict:
    trained, _ = optim.select(cfg.optim, params)
    state = {
        "step": jnp.int32(0),
        "params": params,
        "opt": optim.build(cfg.optim, cfg.train.steps, trained).init(trained),
        "ema": jax.tree.map(jnp.copy, trained) if cfg.optim.ema else {},
        "rng": jax.random.key_data(jax.random.fold_in(key, 1)),
    }
    return rest(cfg, state)


def _fresh(cfg: Config, key: jax.Array) -> dict:
    return _assemble(cfg, init_params(cfg.model, jax.random.fold_in(key, 0)), key)


def init(cfg: Config, params: dict | None = None) -> dict:
    """The state at step 0, from cfg.train.seed; or around given parameters (fine-tuning), which are donated to it.

    Raises ConfigError when optim.trainable, frozen or lr_scale name no parameter.
    """
    optim.select(cfg.optim, cosmos.abstract(cfg.model))  # a typo fails before anything is allocated
    key = jax.random.key(cfg.train.seed)
    if params is None:
        return jax.jit(functools.partial(_fresh, cfg))(key)
    return jax.jit(functools.partial(_assemble, cfg), donate_argnums=0)(params, key)


def abstract(cfg: Config) -> dict:
    """The same tree of ShapeDtypeStructs with shardings on the current mesh (or the first device): for restoring.

    Nothing is computed, not even a key: the chips of the mesh need not be here (`plan`).
    """
    tree = jax.eval_shape(lambda: _fresh(cfg, jax.random.key(0)))
    memory = dict.fromkeys(WAITING, "pinned_host") if cfg.optim.offload else {}
    return {k: jax.tree.map(functools.partial(_placed, memory=memory.get(k)), v) for k, v in tree.items()}


def abstract_params(cfg: ModelConfig, dtype=jnp.float32) -> dict:
    """The parameters alone, in the dtype wanted at inference."""
    tree = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return jax.tree.map(lambda x: _placed(x, dtype), tree)


def _placed(x: jax.ShapeDtypeStruct, dtype=None, memory: str | None = None) -> jax.ShapeDtypeStruct:
    place: jax.sharding.Sharding = SingleDeviceSharding(jax.devices()[0])
    if not shard.no_mesh():
        place = NamedSharding(jax.sharding.get_mesh(), x.sharding.spec if x.sharding else P())
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place.with_memory_kind(memory) if memory else place)
