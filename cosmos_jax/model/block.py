"""One MoT layer: two towers that share one attention (spec model.md §2.2).

In: und [B,U,D] and gen [B,G,D], either of which may be None. Out: the same, and the und keys and values gen saw.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from cosmos_jax import shard
from cosmos_jax.config import ModelConfig
from cosmos_jax.model.attention import KV_HEADS, Plan, Projections, attend, backend, gen_attend
from cosmos_jax.model.declare import normal
from cosmos_jax.model.mlp import MLP
from cosmos_jax.model.norm import RMSNorm
from cosmos_jax.precision import Precision


class Stream(NamedTuple):
    """What every layer needs to know about one stream: rotary tables [B,T,d], and who its queries see."""

    cos: jax.Array
    sin: jax.Array
    plans: tuple[Plan, ...]  # one, or one for each weighted control of gen
    control_weight: jax.Array | None = None  # of gen: [B,C,G] (`attention.gen_plans`)


class KV(NamedTuple):
    """Keys as gen queries see them, and values, of the und stream: [B,U,Hkv,d] (stacked over layers: [L, …])."""

    k: jax.Array
    v: jax.Array


class Tower(nnx.Module):
    """The parameters of one stream in one layer. Nothing is shared between towers but the attention softmax."""

    def __init__(self, rngs, cfg: ModelConfig, qk_norm: bool, k_norm_for_gen: bool = False):
        self.norm_in = RMSNorm(rngs, cfg.hidden, "hidden", cfg.norm_eps, cfg.norm_cast)
        self.attn = Projections(rngs, cfg, qk_norm, k_norm_for_gen)
        self.norm_post = RMSNorm(rngs, cfg.hidden, "hidden", cfg.norm_eps, cfg.norm_cast)
        self.mlp = MLP(rngs, cfg.hidden, cfg.mlp, cfg.mlp_act, normal(cfg.init_std))

    def qkv(self, h, stream: Stream, precision, for_gen: bool = True):
        x = shard.at_work(self.norm_in(h, precision))
        return self.attn.qkv(x, stream.cos, stream.sin, backend(stream.plans[0]), precision, for_gen)

    def finish(self, h, attended, precision):
        """Residual, MLP, residual; h stays where it lies."""
        h = h + self.attn.out(attended, precision, like=h)
        return h + self.mlp(self.norm_post(h, precision), precision, like=h)


class Block(nnx.Module):
    def __init__(self, cfg: ModelConfig, rngs):
        self.und = Tower(rngs, cfg, cfg.qk_norm_und, cfg.k_norm_und_for_gen)
        self.gen = Tower(rngs, cfg, qk_norm=True)

    def __call__(
        self,
        und: jax.Array | None,
        gen: jax.Array | None,
        und_stream: Stream | None,
        gen_stream: Stream | None,
        cache: KV | None,
        precision: Precision,
    ) -> tuple[jax.Array | None, jax.Array | None, KV]:
        """`cache` stands for the und stream's keys and values when `und` is None (denoising after the first pass)."""
        if und is not None and und_stream is not None:
            q, k, k_for_gen, v = self.und.qkv(und, und_stream, precision)
            k, k_for_gen, v = (shard.constrain(x, KV_HEADS) for x in (k, k_for_gen, v))  # whole, on every device
            cache = KV(k_for_gen, v)
            und = self.und.finish(und, attend(q, k, v, und_stream.plans[0], precision), precision)
        assert cache is not None, "a block without und needs the cache of its keys and values"
        if gen is not None and gen_stream is not None:
            q, k, _, v = self.gen.qkv(gen, gen_stream, precision)
            keys, values = (cache.k, k), (cache.v, v)
            o = gen_attend(q, keys, values, gen_stream.plans, gen_stream.control_weight, precision)
            gen = self.gen.finish(gen, o, precision)
        return und, gen, cache
