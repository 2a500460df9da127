"""Projections of one stream, and THE attention call of the project.

In: normalised hidden states, RoPE tables, segment ids. Out: attended hidden states. Nothing else in the project calls
an attention kernel; which one runs is decided behind `pallas_kernels.attention`. Plans (who sees whom) are made once
per step and shared by all layers, forward and backward.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels.attention as kernels
from cosmos_jax import shard
from cosmos_jax.config import ConfigError, ModelConfig
from cosmos_jax.model import rope
from cosmos_jax.model.declare import normal, param, use
from cosmos_jax.model.norm import RMSNorm
from cosmos_jax.precision import Precision
from pallas_kernels.attention import Plan, Segments
from pallas_kernels.norm_rope import norm_rope

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

    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array, backend: str, precision: Precision, for_gen=True):
        """x [B,T,D] → q [B,T,Hq,d], k, k_for_gen, v [B,T,Hkv,d], all rotated but v.

        `k_for_gen` is the key that gen queries see: Edge normalises the raw und key for them alone (spec §2.2).
        for_gen=False: there are none, and a reasoner that comes alone has no such norm; it is k then.
        backend: of the attention that they are for (`rotated`).
        """

        def project(w, out):
            return shard.einsum("btd,dhk->bthk", x, use(w, precision), out=out, matmul=precision.matmul)

        q, k, v = project(self.q, HEADS), project(self.k, KV_HEADS), project(self.v, KV_HEADS)
        of = [(q, self.q_norm), (k, self.k_norm)]
        if for_gen and self.k_norm_for_gen is not None:
            of.append((k, self.k_norm_for_gen))
        q, k, *k_for_gen = rotated(of, cos, sin, backend, precision)
        return q, k, (*k_for_gen, k)[0], v

    def out(self, x: jax.Array, precision: Precision) -> jax.Array:
        """x [B,T,Hq,d] → [B,T,D]."""
        return shard.einsum(
            "bthk,hkd->btd", x, use(self.o, precision), out=("batch", "token", "act"), matmul=precision.matmul
        )


def rotated(of: list[tuple[jax.Array, RMSNorm | None]], cos, sin, backend: str, precision: Precision):
    """Each x [B,T,H,d] normalised, where a norm comes with it, then rotated; cos, sin [B,T,d].

    The attention of TPUs reads heads first: for it one kernel does both on the way and leaves them so in memory.
    """
    if backend != "mosaic_tpu":
        return [rope.rotate(x if norm is None else norm(x, precision), cos, sin) for x, norm in of]
    norms = [norm for _, norm in of if norm is not None]
    how = dict(eps=norms[0].eps, cast=norms[0].cast) if norms else dict(eps=0.0)
    weights = tuple(None if norm is None else use(norm.weight, precision) for _, norm in of)

    def kernel(xs, cos, sin, weights):
        b, t, _, d = xs[0].shape
        slabs, (cos, sin) = (x.reshape(b * t, -1) for x in xs), (x.reshape(b * t, d) for x in (cos, sin))
        found = norm_rope(tuple(slabs), weights, cos, sin, impl="mosaic_tpu", **how)
        return [y.swapaxes(0, 1).reshape(b, t, -1, d) for y in found]  # a change of names: memory keeps heads first

    xs = tuple(x for x, _ in of)
    return shard.rowwise(kernel, xs, cos, sin, heads=(0,), out_heads=True, shared=(weights,), kernel=True)


def check(cfg: ModelConfig, precision: Precision) -> None:
    """Refuse, before anything compiles, a kernel that cannot run here. ConfigError."""
    try:
        kernels.choose(cfg.attention, precision.dtype)
    except ValueError as e:
        raise ConfigError(f"model.attention={cfg.attention!r}: {e} Set model.attention=auto to take what can.") from e


def _plan(make, of, attention: str, precision: Precision) -> Plan:
    """Made on each device from its own rows: a plan of a whole batch would name rows that a device does not have."""
    return shard.rowwise(functools.partial(make, impl=attention, dtype=precision.dtype), of)


def und_plan(segment_ids: jax.Array, attention: str, precision: Precision) -> Plan:
    """Causal inside each segment. attention: a backend of `pallas_kernels.attention`, or auto."""
    return _plan(kernels.und_plan, Segments(segment_ids), attention, precision)


def gen_plans(
    segment_ids: jax.Array, und_segment_ids: jax.Array, attention: str, precision: Precision,
    control_weight: jax.Array | None = None,
) -> tuple[Plan, ...]:  # fmt: skip
    """Gen queries over [und; gen] keys of their segment: one plan, or one for each weighted control.

    control_weight [B,C,G] float32: C attentions instead of one. Token g takes part in number c, as query and as key,
    where control_weight[:,c,g] > 0; its output is the weighted sum (spec model.md §5, multi_control_two_way).
    """
    ids = [segment_ids]
    if control_weight is not None:  # who is not here is as padding is: unseen, answered 0
        ids = [shard.rowwise(_here, segment_ids, control_weight[:, c]) for c in range(control_weight.shape[1])]
    return tuple(_plan(kernels.gen_plan, Segments(und_segment_ids, i), attention, precision) for i in ids)


def _here(segment_ids, weight):
    return jnp.where(weight > 0, segment_ids, -1)


def full_plan(segment_ids: jax.Array, attention: str, precision: Precision) -> Plan:
    """Unmasked inside each segment (vision encoder)."""
    return _plan(kernels.full_plan, segment_ids, attention, precision)


def attend(q, k, v, plan: Plan, precision: Precision) -> jax.Array:
    """THE attention call: q [B,T,Hq,d] over the key sets k and v of a plan (`pallas_kernels.attention.attention`)."""
    f = functools.partial(kernels.attention, scale=q.shape[-1] ** -0.5, precision=precision.matmul)
    return shard.rowwise(f, q, k, v, plan, heads=(0, 1, 2), out_heads=True, kernel=plan.backend != "xla")


def gen_attend(q, k, v, plans: tuple[Plan, ...], weight: jax.Array | None, precision: Precision) -> jax.Array:
    """`attend`, once for each plan of `gen_plans`; several are summed with their weights [B,C,G] in float32."""
    if weight is None:
        return attend(q, k, v, plans[0], precision)
    f = functools.partial(kernels.attention, scale=q.shape[-1] ** -0.5, precision=precision.matmul)

    def weighted(q, k, v, plans, weight):
        out = jnp.zeros(q.shape, jnp.float32)
        for c, plan in enumerate(plans):
            out += weight[:, c, :, None, None] * f(q, k, v, plan)
        return out.astype(q.dtype)

    kernel = plans[0].backend != "xla"
    return shard.rowwise(weighted, q, k, v, plans, weight, heads=(0, 1, 2), out_heads=True, kernel=kernel)
