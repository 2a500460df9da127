"""Attention of the gen stream when its tokens are spread over the devices of a mesh axis.

In: inside a full-manual `jax.shard_map`, this device's share of the gen tokens and all und keys. Out: its share of what
one device would compute, gradients included. The local work is the front door's, with any of its backends.

    Segments ─► context.plan (once per step) ─► context.attention (every layer)

| how | what travels | what a device holds at once | wants |
|---|---|---|---|
| `all_gather` | k, v; back: dk, dv (reduce-scatter) | k, v of all gen tokens | nothing |
| `ring` | k, v in cp hops, computed meanwhile; back: k, v and dk, dv with them | k, v of two shards | nothing |
| `ulysses` | q, k, v, o (all-to-all) | all gen tokens of 1/cp of the heads | cp divides the key heads |

Everything about a mask belongs to a query (its segment, its limit), so tokens may lie on any device. Two orders keep
rising runs, hence few visible tiles, and limits that mean the same as on one device: `blocks` (device r holds the r-th
piece of the stream) and `stripes` (token t is on device t mod cp), which shares the work of several samples evenly.

The ring has a derivative of its own, because ordinary differentiation would keep every shard that passed, more than
`all_gather` holds: the backward pass sends k and v round again. Each step is the local backward pass under the log-sum-
exp of all keys. Ring attention: Liu et al. (arXiv:2310.01889); all-to-all: DeepSpeed-Ulysses (arXiv:2309.14509).
Design: spec kernels.md a.7.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels.attention as kernels
from pallas_kernels.attention import fused
from pallas_kernels.attention.merge import merge
from pallas_kernels.attention.segments import Masks, Segments, gen_masks

HOW = ("all_gather", "ring", "ulysses")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Who sees whom on this device. Leaves have an axis 0, so they can leave one shard_map and enter others, each with
    the spec P((axes of the batch …, axis)) for every leaf.
    """

    local: kernels.Plan  # all_gather: own queries, all keys; ring: own queries, und and own keys; ulysses: all, all
    rest: kernels.Plan | None  # ring: own queries, keys of the shards as they arrive, stacked
    axis: str = dataclasses.field(metadata={"static": True})
    how: str = dataclasses.field(metadata={"static": True})
    stripes: bool = dataclasses.field(metadata={"static": True})


def plan(s: Segments, *, axis: str, how: str, stripes: bool = False, **options: Any) -> Plan:
    """Of a packed batch whose gen tokens are spread over `axis`; call it inside the shard_map, once per step.

    s: und [B,U], the same on each device of the axis; gen and gen_limit [B,G/cp], this device's. A limit is a position
    in the whole gen stream. how: see above. stripes: token t is on device t mod cp, not t // (G/cp). options: of
    `attention.make_plan`.
    """
    if how not in HOW:
        raise ValueError(f"context parallel attention by {how!r} does not exist; choose one of {', '.join(HOW)}.")

    def make(masks: Masks) -> kernels.Plan:
        return kernels.make_plan(masks, **options)

    if how == "ring":
        local, rest = _ring_plans(s, axis, stripes, make)
        return Plan(local, rest, axis, how, stripes)
    ids = _whole(s.gen, axis, stripes)
    if how == "all_gather":
        return Plan(make(Masks(s.gen, (s.und, ids), (None, s.gen_limit))), None, axis, how, stripes)
    limit = None if s.gen_limit is None else _whole(s.gen_limit, axis, stripes)
    return Plan(make(gen_masks(Segments(s.und, ids, limit))), None, axis, how, stripes)


def _ring_plans(s: Segments, axis: str, stripes: bool, make) -> tuple[kernels.Plan, kernels.Plan]:
    """Of step 0, and of the steps after it, stacked."""
    shards = jax.lax.all_gather(s.gen, axis)
    count, here = len(shards), jax.lax.axis_index(axis)

    def arriving(step):
        shard = (here - step) % count
        return make(Masks(s.gen, (shards[shard],), (_limit(s.gen_limit, shard, count, stripes),)))

    local = make(Masks(s.gen, (s.und, s.gen), (None, _limit(s.gen_limit, here, count, stripes))))
    if local.backend == "cudnn":
        raise ValueError("context parallel attention by ring merges by log-sum-exp, and cudnn gives none: use another.")
    return local, jax.lax.map(arriving, jnp.arange(1, count))


def _limit(limit: jax.Array | None, shard, count: int, stripes: bool) -> jax.Array | None:
    """[B,n] positions in the stream → how many tokens of the shard come before them."""
    if limit is None:
        return None
    n = limit.shape[1]
    return jnp.clip(-((shard - limit) // count) if stripes else limit - shard * n, 0, n)


def attention(q, k, v, plan: Plan, *, scale: float, precision=None, return_lse: bool = False):
    """This device's queries over und and all gen keys of their samples, in one softmax → [B,G/cp,Hq,d].

    q [B,G/cp,Hq,d]; k = (und [B,U,Hkv,d], the same on each device of the axis; gen [B,G/cp,Hkv,d], this device's), v
    alike. Differentiate through the shard_map: it adds up the devices' shares of the gradients of und. The rest is as
    in `attention.attention`. Raises ValueError when `ulysses` cannot split the key heads.
    """
    options = dict(scale=scale, precision=precision)
    if plan.how == "ring":
        out, lse = _ring(q, k, v, plan, tuple(options.items()))
        return (out, lse) if return_lse else out
    if plan.how == "all_gather":
        k, v = ((und, _whole(gen, plan.axis, plan.stripes)) for und, gen in (k, v))
        return kernels.attention(q, k, v, plan.local, return_lse=return_lse, **options)
    _check_heads(k[1].shape[2], plan.axis)
    split = functools.partial(_tokens_to_heads, axis=plan.axis, stripes=plan.stripes)
    join = functools.partial(_heads_to_tokens, axis=plan.axis, stripes=plan.stripes)
    k, v = ((_own_heads(und, plan.axis), split(gen)) for und, gen in (k, v))
    if not return_lse:
        return join(kernels.attention(split(q), k, v, plan.local, **options))
    out, lse = kernels.attention(split(q), k, v, plan.local, return_lse=True, **options)
    return join(out), join(lse.swapaxes(1, 2)[..., None])[..., 0].swapaxes(1, 2)


def _whole(x: jax.Array, axis: str, stripes: bool) -> jax.Array:
    """[B,n,…] of each device → [B,n·cp,…] in the order of the stream."""
    x = jax.lax.all_gather(x, axis, axis=2 if stripes else 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


# ulysses


def _check_heads(heads: int, axis: str) -> None:
    if heads % jax.lax.axis_size(axis):
        raise ValueError(
            f"context parallel attention by ulysses: {jax.lax.axis_size(axis)} devices of axis {axis!r} cannot share "
            f"{heads} key heads evenly; use all_gather or ring, or an axis whose size divides {heads}."
        )


def _own_heads(x: jax.Array, axis: str) -> jax.Array:
    """[B,T,H,d] → [B,T,H/cp,d]: this device's share."""
    size = x.shape[2] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, 2)


def _tokens_to_heads(x: jax.Array, axis: str, stripes: bool) -> jax.Array:
    """[B,n,H,d] → [B,n·cp,H/cp,d]: all tokens in the order of the stream, this device's heads."""
    b, n, h, d = x.shape
    x = x.reshape(b, n, jax.lax.axis_size(axis), -1, d)
    x = _exchange(x, axis, 2, 2 if stripes else 1)
    return x.reshape(b, -1, *x.shape[3:])


def _heads_to_tokens(x: jax.Array, axis: str, stripes: bool) -> jax.Array:
    """The way back."""
    b, t, h, d = x.shape
    count = jax.lax.axis_size(axis)
    x = x.reshape(b, t // count, count, h, d) if stripes else x.reshape(b, count, t // count, h, d)
    return _exchange(x, axis, 2 if stripes else 1, 2).reshape(b, t // count, count * h, d)


def _exchange(x: jax.Array, axis: str, before: int, after: int) -> jax.Array:
    """Piece i of axis `before` goes to device i; what device i sent becomes piece i of axis `after`.

    Both moves are spelled out: jax 0.10 and 0.11 transpose an all_to_all over two different axes wrongly.
    """
    x = jax.lax.all_to_all(jnp.moveaxis(x, before, 0), axis, 0, 0)
    return jnp.moveaxis(x, 0, after)


# ring: at step t a device has the gen keys of the shard t places before its own


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q, k, v, plan: Plan, options: tuple):
    """options: scale and precision, as items."""
    return _ring_forward(q, k, v, plan, options)[0]


def _ring_forward(q, k, v, plan, options):
    hop = functools.partial(_hop, axis=plan.axis)
    attend = functools.partial(kernels.attention, q, return_lse=True, **dict(options))
    own = k[1], v[1]

    def step(carry, arrived):
        partial, kv = carry
        following = hop(kv)  # before the work that hides it
        return (merge(partial, attend(*kv, arrived)), following), None

    following = hop(own)
    out, lse = attend(k, v, plan.local)
    # One hop more than needed, at the last step: the price of compiling one step, not cp of them.
    ((out, lse), _), _ = jax.lax.scan(step, ((out.astype(jnp.float32), lse), following), plan.rest)
    out, lse = fused.named(out.astype(q.dtype), lse)
    return (out, lse), (q, k, v, plan, out, lse)


def _ring_backward(options, saved, cotangents):
    q, k, v, plan, out, lse = saved
    do, dlse = cotangents
    hop = functools.partial(_hop, axis=plan.axis)
    delta = jnp.einsum("bqhd,bqhd->bhq", do, out, preferred_element_type=jnp.float32) - dlse
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    gradient = functools.partial(kernels.gradient, q, of=(out, lse, do, delta), **dict(options))

    def step(carry, arrived):
        dq, kv, dkv = carry
        following, dkv = hop(kv), hop(dkv)  # dk and dv follow their keys, one step behind
        more, *share = gradient(*kv, arrived)
        return (dq + more, following, _added(dkv, share)), None

    following = hop((k[1], v[1]))
    dq, (dk_und, dk), (dv_und, dv) = gradient(k, v, plan.local)
    start = dq.astype(jnp.float32), following, _added((jnp.zeros(dk.shape), jnp.zeros(dv.shape)), (dk, dv))
    (dq, _, dkv), _ = jax.lax.scan(step, start, plan.rest)
    dk, dv = (x.astype(k[1].dtype) for x in hop(dkv))
    return dq.astype(q.dtype), (dk_und, dk), (dv_und, dv), None


_ring.defvjp(_ring_forward, _ring_backward)


def _added(a, b):
    """Sums in float32, whatever the shares come in."""
    return tuple(x + y.astype(jnp.float32) for x, y in zip(a, b, strict=True))


def _hop(x, axis: str):
    """To the next device, from the one before."""
    count = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % count) for i in range(count)])
