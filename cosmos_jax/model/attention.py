"""Projections of one stream, and THE attention call of the project.

In: normalised hidden states, RoPE tables, segment ids. Out: attended hidden states. Nothing else in the project calls
an attention kernel; a fused one slots in behind `pallas_kernels.attention`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels.attention as kernels
from cosmos_jax import shard
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import rope
from cosmos_jax.model.declare import normal, param, use
from cosmos_jax.model.norm import RMSNorm
from cosmos_jax.precision import Precision

HEADS = ("batch", "token", "heads", "head_dim")
KV_HEADS = ("batch", "token", "kv_heads", "head_dim")


class Projections(nnx.Module):
    """q, k, v, o of one tower, without biases, with per-head RMSNorm on q and k where the family has it."""

    def __init__(self, rngs, cfg: ModelConfig, qk_norm: bool, k_norm_for_gen: bool = False):
        d, hd, init = cfg.hidden, cfg.head_dim, normal(cfg.init_std)
        self.q = param(rngs, (d, cfg.heads, hd), ("embed", "heads", "head_dim"), init)
        self.k = param(rngs, (d, cfg.kv_heads, hd), ("embed", "kv_heads", "head_dim"), init)
        self.v = param(rngs, (d, cfg.kv_heads, hd), ("embed", "kv_heads", "head_dim"), init)
        self.o = param(rngs, (cfg.heads, hd, d), ("heads", "head_dim", "embed"), init)

        def norm():
            return RMSNorm(rngs, hd, "head_dim", cfg.norm_eps, cfg.norm_cast)

        self.q_norm = norm() if qk_norm else None
        self.k_norm = norm() if qk_norm else None
        self.k_norm_for_gen = norm() if k_norm_for_gen else None

    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array, precision: Precision, for_gen: bool = True):
        """x [B,T,D] → q [B,T,Hq,d], k, k_for_gen, v [B,T,Hkv,d], all rotated but v.

        `k_for_gen` is the key that gen queries see: Edge normalises the raw und key for them alone (spec §2.2).
        for_gen=False: there are none, and a reasoner that comes alone has no such norm; it is k then.
        """

        def project(w, out):
            return shard.einsum("btd,dhk->bthk", x, use(w, precision), out=out, matmul=precision.matmul)

        q, k, v = project(self.q, HEADS), project(self.k, KV_HEADS), project(self.v, KV_HEADS)
        raw = k
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, precision), self.k_norm(k, precision)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        k_for_gen = k
        if for_gen and self.k_norm_for_gen is not None:
            k_for_gen = rope.rotate(self.k_norm_for_gen(raw, precision), cos, sin)
        return q, k, k_for_gen, v

    def out(self, x: jax.Array, precision: Precision) -> jax.Array:
        """x [B,T,Hq,d] → [B,T,D]."""
        return shard.einsum(
            "bthk,hkd->btd", x, use(self.o, precision), out=("batch", "token", "act"), matmul=precision.matmul
        )


def und_attention(q, k, v, segment_ids, precision: Precision) -> jax.Array:
    """Causal inside each segment. Shapes as in `pallas_kernels.attention.und_attention`."""
    f = functools.partial(kernels.und_attention, scale=q.shape[-1] ** -0.5, precision=precision.matmul)
    return shard.rowwise(f, q, k, v, segment_ids, heads=(0, 1, 2), out_heads=True)


def gen_attention(
    q, k, v, segment_ids, k_und, v_und, und_segment_ids, precision: Precision, control_weight: jax.Array | None = None
) -> jax.Array:
    """Gen queries over [und; gen] keys of their segment.

    control_weight [B,C,G] float32: C such attentions instead of one. Token g takes part in number c, as query and as
    key, where control_weight[:,c,g] > 0; its output is the weighted sum (spec model.md §5, multi_control_two_way).
    """
    f = functools.partial(kernels.gen_attention, scale=q.shape[-1] ** -0.5, precision=precision.matmul)

    def weighted(q, k, v, segment_ids, k_und, v_und, und_segment_ids, weight):
        out = jnp.zeros(q.shape, jnp.float32)
        for c in range(weight.shape[1]):
            here = jnp.where(weight[:, c] > 0, segment_ids, -1)  # who is not here is as padding is: unseen, answered 0
            out += weight[:, c, :, None, None] * f(q, k, v, here, k_und, v_und, und_segment_ids)
        return out.astype(q.dtype)

    args = (q, k, v, segment_ids, k_und, v_und, und_segment_ids)
    if control_weight is None:
        return shard.rowwise(f, *args, heads=(0, 1, 2, 4, 5), out_heads=True)
    return shard.rowwise(weighted, *args, control_weight, heads=(0, 1, 2, 4, 5), out_heads=True)


def full_attention(q, k, v, segment_ids, precision: Precision) -> jax.Array:
    """Unmasked inside each segment (vision encoder)."""
    f = functools.partial(kernels.full_attention, scale=q.shape[-1] ** -0.5, precision=precision.matmul)
    return shard.rowwise(f, q, k, v, segment_ids, heads=(0, 1, 2), out_heads=True)
