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
from cosmos_jax.model.declare import normal, param, project, use
from cosmos_jax.model.norm import RMSNorm
from cosmos_jax.precision import Precision
from pallas_kernels.attention import Segments, context, segments
from pallas_kernels.norm_rope import norm_rope

HEADS = ("batch", "token", "heads", "head_dim")
KV_HEADS = ("batch", "token", "kv_heads", "head_dim")
Plan = kernels.Plan | context.Plan  # the second where gen tokens are spread over `cp`


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

        def into(w, heads):
            return project("btd,dhk->bthk", x, w, precision, out=("batch", shard.SAME, heads, "head_dim"))

        q, k, v = into(self.q, "heads"), into(self.k, "kv_heads"), into(self.v, "kv_heads")
        of = [(q, self.q_norm), (k, self.k_norm)]
        if for_gen and self.k_norm_for_gen is not None:
            of.append((k, self.k_norm_for_gen))
        q, k, *k_for_gen = rotated(of, cos, sin, backend, precision)
        return q, k, (*k_for_gen, k)[0], v

    def out(self, x: jax.Array, precision: Precision, like: jax.Array) -> jax.Array:
        """x [B,T,Hq,d] → [B,T,D], tokens where those of `like` lie."""
        return project("bthk,hkd->btd", x, self.o, precision, out=("batch", shard.SAME, "act"), like=like)


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
    tokens = ("batch", shard.token_axis(cos))
    heads = (*tokens, "heads")
    return shard.rowwise(
        kernel, xs, cos, sin, takes=(heads, tokens, tokens), gives=heads, shared=(weights,), kernel=True
    )


def check(cfg: ModelConfig, precision: Precision) -> None:
    """Refuse, before anything compiles, a kernel that cannot run here. ConfigError."""
    try:
        kernels.choose(cfg.attention, precision.dtype)
    except ValueError as e:
        raise ConfigError(f"model.attention={cfg.attention!r}: {e} Set model.attention=auto to take what can.") from e


# Plans are made on each device from its own part: a plan of a whole batch would name rows that a device does not have.


def und_plan(ids: jax.Array, attention: str, precision: Precision, layout: shard.Layout = shard.WHOLE) -> Plan:
    """Causal inside each segment [B,U]; queries lie as `layout` says. attention: a backend of the kernels, or auto."""
    how = dict(impl=attention, dtype=precision.dtype)
    if layout.work == "token" or shard.size("cp") == 1:
        return shard.rowwise(lambda ids: kernels.und_plan(Segments(ids), **how), ids, gives=_planned(layout.work))
    whole, queries = segments.causal(ids), ("batch", layout.work)
    limit = shard.constrain(whole.limits[0], queries)  # of a query among all keys, wherever it lies

    def make(q_ids, limit, k_ids):
        return kernels.make_plan(segments.Masks(q_ids, (k_ids,), (limit,)), **how)

    own = shard.constrain(ids, queries)
    return shard.rowwise(make, own, limit, ids, takes=(queries, queries), gives=_planned(layout.work), kernel=True)


def gen_plans(
    segment_ids: jax.Array, und_segment_ids: jax.Array, attention: str, precision: Precision,
    control_weight: jax.Array | None = None, layout: shard.Layout = shard.WHOLE, how: str = "all_gather",
) -> tuple[Plan, ...]:  # fmt: skip
    """Gen queries over [und; gen] keys of their segment: one plan, or one for each weighted control.

    control_weight [B,C,G] float32: C attentions instead of one. Token g takes part in number c, as query and as key,
    where control_weight[:,c,g] > 0; its output is the weighted sum (spec model.md §5, multi_control_two_way).
    layout: of the gen tokens; where they are spread over cp, `how` they meet (`pallas_kernels.attention.context`).
    """
    tokens = ("batch", layout.work)
    ids = [shard.constrain(segment_ids, tokens)]
    if control_weight is not None:  # who is not here is as padding is: unseen, answered 0
        weights = [shard.constrain(control_weight[:, c], tokens) for c in range(control_weight.shape[1])]
        ids = [jnp.where(w > 0, ids[0], -1) for w in weights]
    options = dict(impl=attention, dtype=precision.dtype)
    spread = layout.work != "token" and shard.size("cp") > 1
    make = functools.partial(context.plan, axis="cp", how=how) if spread else kernels.gen_plan

    def plan(und, gen):
        return make(Segments(und, gen), **options)

    takes, gives = (shard.ROWS, tokens), _planned(layout.work)
    return tuple(shard.rowwise(plan, und_segment_ids, i, takes=takes, gives=gives, kernel=spread) for i in ids)


def full_plan(segment_ids: jax.Array, attention: str, precision: Precision) -> Plan:
    """Unmasked inside each segment (vision encoder)."""
    return shard.rowwise(lambda ids: kernels.full_plan(ids, impl=attention, dtype=precision.dtype), segment_ids)


def backend(plan: Plan) -> str:
    """The kernel a plan is for."""
    return (plan.local if isinstance(plan, context.Plan) else plan).backend


def _planned(tokens: str) -> tuple[str]:
    """Where the parts of a plan lie whose queries lie along `tokens`."""
    return ("device",) if tokens == "token_cp" else shard.ROWS


def attend(q, k, v, plan: Plan, precision: Precision) -> jax.Array:
    """THE attention call: q [B,T,Hq,d] over the key sets k and v of a plan (`pallas_kernels.attention.attention`)."""
    return _attend(_one(q, plan, precision), q, k, v, plan)


def gen_attend(q, k, v, plans: tuple[Plan, ...], weight: jax.Array | None, precision: Precision) -> jax.Array:
    """`attend`, once for each plan of `gen_plans`; several are summed with their weights [B,C,G] in float32."""
    if weight is None:
        return attend(q, k, v, plans[0], precision)
    f = _one(q, plans[0], precision)

    def weighted(q, k, v, plans, weight):
        out = jnp.zeros(q.shape, jnp.float32)
        for c, plan in enumerate(plans):
            out += weight[:, c, :, None, None] * f(q, k, v, plan)
        return out.astype(q.dtype)

    return _attend(weighted, q, k, v, plans, weight)


def _one(q, plan: Plan, precision: Precision):
    """The call itself, on a device's own part."""
    of = context if isinstance(plan, context.Plan) else kernels
    return functools.partial(of.attention, scale=q.shape[-1] ** -0.5, precision=precision.matmul)


def _attend(f, q, k, v, plans, *weight) -> jax.Array:
    tokens = shard.token_axis(q)
    heads = ("batch", tokens, "heads")

    def keys(x):
        return tuple(keys(y) for y in x) if isinstance(x, tuple) else ("batch", shard.token_axis(x), "kv_heads")

    takes = (heads, keys(k), keys(v), _planned(tokens), *(("batch", "token", tokens) for _ in weight))
    plan = plans[0] if isinstance(plans, tuple) else plans
    kernel = backend(plan) != "xla" or isinstance(plan, context.Plan)
    return shard.rowwise(f, q, k, v, plans, *weight, takes=takes, gives=heads, kernel=kernel)
