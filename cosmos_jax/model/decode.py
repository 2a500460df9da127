"""The reasoner one token at a time: a key/value cache instead of the whole prompt.

In: a packed batch with one prompt per row, right-padded; then one new token per row. Out: logits. A new token's
attention is the generator's: one query over cached und keys and its own key, in one softmax. Spec model.md §2.2, §3.4.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from cosmos_jax import shard
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos, rope, stack
from cosmos_jax.model.attention import KV_HEADS, attend, gen_plans
from cosmos_jax.model.block import KV, Stream, Tower
from cosmos_jax.model.declare import use
from cosmos_jax.precision import Precision


def prefill(params: dict, cfg: ModelConfig, batch: dict, room: int, *, precision: Precision) -> tuple[jax.Array, KV]:
    """The prompts in one pass: (normalised hidden states [B,U,D], cache [L,B,U+room,Hkv,d] of the und tower's keys).

    It differs from `cosmos.und` in its keys: Edge's und queries see other keys than gen queries do.
    """
    model = cosmos._model(params, cfg)
    h, deepstack = model.embed_und(batch, precision)
    stream = cosmos._und_stream(cfg, batch, precision)

    def layer(tower, h, i, _):
        q, k, _, v = tower.qkv(h, stream, precision, for_gen=False)
        h = tower.finish(h, attend(q, k, v, stream.plans[0], precision), precision)
        if deepstack is not None:
            h = h + stack._tap(deepstack, i)
        return h, jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))), KV(k, v))

    h, cache = _run(model, h, layer, None)
    return model.norm_und(h, precision), cache


def decode_step(
    params: dict,
    cfg: ModelConfig,
    ids: jax.Array,
    positions: jax.Array,
    cache: KV,
    lengths: jax.Array,
    *,
    precision: Precision,
) -> tuple[jax.Array, KV]:
    """One token per row: ids [B] int32, positions [B,3] float32, lengths [B] int32 = tokens already in the cache.

    Returns (logits [B,vocab] float32 for the token after it, the cache with the new keys at slot `lengths`). A slot
    past the end is clamped to the last by XLA: make `room` as large as the number of new tokens.
    """
    model = cosmos._model(params, cfg)
    table = use(model.embed_tokens, precision)
    h = shard.rowwise(lambda ids, table: table[ids], ids[:, None], shared=(table,))
    own = jnp.zeros_like(ids)[:, None]
    filled = jnp.where(jnp.arange(cache.k.shape[2]) < lengths[:, None], 0, -1)
    plans = gen_plans(own, filled, "xla", precision)  # one query a row: nothing for a kernel of tiles to do
    stream = Stream(*rope.tables(positions[:, :, None], cfg.rope_theta, cfg.rope_sections), plans)

    def layer(tower, h, _, kv):
        q, k, _, v = tower.qkv(h, stream, precision, for_gen=False)
        h = tower.finish(h, attend(q, (kv.k, k), (kv.v, v), plans[0], precision), precision)
        return h, KV(k, v)

    h, new = _run(model, h, layer, cache)
    cache = jax.tree.map(lambda old, new: jax.vmap(_write, (0, 0, None))(old, new, lengths), cache, new)
    logits = cosmos.logits(params, cfg, model.norm_und(h, precision), precision=precision)
    return logits[:, 0], cache


def _run(model: cosmos.Cosmos, h: jax.Array, layer: Callable[[Tower, jax.Array, jax.Array, KV | None], tuple], cache):
    """Scan `layer` over the und towers. Returns (h, its second results stacked over layers)."""
    graphdef, state = nnx.split(model.layers)

    def body(carry, xs):
        h, i = carry
        state, kv = xs
        h, new = layer(nnx.merge(graphdef, state).und, h, i, kv)
        return (h, i + 1), new

    (h, _), result = jax.lax.scan(body, (h, jnp.int32(0)), (state, cache))
    return h, result


def _write(cache: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """cache [B,T,Hkv,d] with new [B,1,Hkv,d] at slot lengths[b] of row b."""

    def write(cache, new, lengths):
        return jax.vmap(lambda c, n, i: jax.lax.dynamic_update_slice_in_dim(c, n, i, 0))(cache, new, lengths)

    return shard.rowwise(write, cache, new, lengths, takes=(KV_HEADS, KV_HEADS), gives=KV_HEADS)
