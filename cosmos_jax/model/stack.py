"""The layers: initialised by `vmap`, run by `lax.scan`, rematerialised by a named policy.

In: embedded und and gen streams. Out: their last hidden states and the und keys and values of every layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels.attention as kernels
from cosmos_jax.config import ModelConfig
from cosmos_jax.model.block import KV, Block, Stream
from cosmos_jax.precision import Precision

_policies = jax.checkpoint_policies
REMAT = {  # what the backward pass may keep
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "attn": _policies.save_only_these_names(*kernels.SAVED),
}


def init(cfg: ModelConfig, key: jax.Array) -> Block:
    """One `Block` whose every parameter has a leading layer axis."""
    return jax.vmap(lambda k: Block(cfg, nnx.Rngs(k)))(jax.random.split(key, cfg.layers))


def run(
    layers: Block,
    cfg: ModelConfig,
    und: jax.Array | None,
    gen: jax.Array | None,
    und_stream: Stream | None,
    gen_stream: Stream | None,
    precision: Precision,
    cache: KV | None = None,
    deepstack: jax.Array | None = None,
    want_cache: bool = False,
) -> tuple[Any, Any, Any]:
    """Run all layers.

    und [B,U,D] or None (then `cache` [L,B,U,Hkv,d] must be given), gen [B,G,D] or None, deepstack [n,B,U,D] or None:
    feature i is added to und after layer i (Qwen3-VL, spec model.md §3.1). Returns (und, gen, cache), each an
    array or None.
    """
    graphdef, state = nnx.split(layers)

    def body(carry, xs):
        und, gen, i = carry
        state, kv = xs
        und, gen, kv = nnx.merge(graphdef, state)(und, gen, und_stream, gen_stream, kv, precision)
        if deepstack is not None:
            und = und + _tap(deepstack, i)
        return (und, gen, i + 1), kv if want_cache else None

    if cfg.remat != "none":
        body = jax.checkpoint(body, prevent_cse=not cfg.scan, policy=REMAT[cfg.remat])
    if cfg.scan:
        (und, gen, _), kvs = jax.lax.scan(body, (und, gen, jnp.int32(0)), (state, cache))
        return und, gen, kvs
    carry, kvs = (und, gen, 0), []
    for i in range(cfg.layers):
        carry, kv = body(carry, jax.tree.map(lambda x, i=i: x[i], (state, cache)))
        kvs.append(kv)
    return carry[0], carry[1], jax.tree.map(lambda *x: jnp.stack(x), *kvs) if want_cache else None


def _tap(deepstack: jax.Array, i) -> jax.Array:
    """deepstack[i], or zeros past the last tap."""
    n = deepstack.shape[0]
    feature = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(i, n - 1), 0, keepdims=False)
    return jnp.where(i < n, feature, jnp.zeros_like(feature))
