"""Packed two-stream attention: one call, several backends, one result.

In: q, k, v as the projections make them and a `Plan` of who sees whom. Out: attended values, exactly 0 on padding, and
on request the log-sum-exp, both differentiable.

    Segments ─► make_plan (once per step: masks, lists of visible tiles) ─► attention (every layer, forward, backward)

| backend | what it is | where |
|---|---|---|
| `xla` | `reference.py`, the definition, up to `WHOLE` scores; beyond that `blocked.py`, tile by tile | everywhere |
| `mosaic_tpu` | `tpu.py`: fused, visits visible tiles only | TPU |
| `mosaic_gpu` | `gpu.py`: the same for Hopper (sm_90), bfloat16, jax ≥ 0.11 | H100, H200 |
| `cudnn` | `cudnn.py`: NVIDIA's kernels; no limits, no log-sum-exp, jax ≥ 0.11; never taken by `auto` | H100, H200 |

`auto` is decided by `choose` and never silently: callers print its sentence. A backend asked for by name that cannot
run is an error. Design and measurements: docs/kernels.md; contract: spec kernels.md a.2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.attention import blocked, cudnn, fused, reference, segments
from pallas_kernels.attention.segments import Flat, Masks, Segments

__all__ = [
    "BACKENDS", "SAVED", "Plan", "Plans", "Segments", "attention", "choose", "denoise_attention", "describe", "form",
    "full_plan", "gen_plan", "gradient", "make_plan", "mot_attention", "und_plan",
]  # fmt: skip
BACKENDS = ("xla", *fused.BACKENDS, "cudnn")
SAVED = fused.SAVED  # names of outputs and log-sum-exps, for a policy of `jax.checkpoint`
WHOLE = 2**25  # scores that may exist at once: 128 MiB in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Who sees whom, ready for a backend. A pytree; every leaf has rows (or what rows became) on axis 0."""

    masks: Masks
    flat: Flat | None = None  # of the fused backends: all rows as one buffer
    lists: Any = None  # theirs too: the tiles to visit
    tiles: Any = dataclasses.field(default=None, metadata={"static": True})  # theirs too
    backend: str = dataclasses.field(default="xla", metadata={"static": True}, kw_only=True)


class Plans(NamedTuple):
    """Of both streams of a packed batch."""

    und: Plan
    gen: Plan


def choose(impl: str, dtype=jnp.bfloat16, device: platform.Device | None = None) -> tuple[str, str]:
    """(backend, why) for operands of `dtype` on `device` (default: the one that is traced for).

    Raises ValueError when `impl` is no backend, or one that cannot run there.
    """
    device = device or platform.device()
    if impl == "auto":
        name, said = fused.DEFAULT.get(device.platform), f"auto on {device.kind}"
        if name is None:
            return "xla", said
        why = fused.refusal(name, dtype, device)
        return ("xla", f"{said}; {why}") if why else (name, said)
    if impl not in BACKENDS:
        raise ValueError(f"attention backend {impl!r} does not exist; choose one of {', '.join(BACKENDS)} or auto.")
    refusal = cudnn.refusal(dtype, device) if impl == "cudnn" else fused.refusal(impl, dtype, device)
    if impl != "xla" and (why := refusal):
        raise ValueError(f"attention backend {impl} cannot run: {why}.")
    return impl, "asked for"


def make_plan(
    masks: Masks, *, impl: str = "auto", dtype=jnp.bfloat16, tiles=None, samples: int | None = None,
    causal: bool = False,
) -> Plan:  # fmt: skip
    """What every layer needs to attend under these masks; O(tiles), built once per step and closed over.

    impl: see `choose`. dtype: of q, k and v. tiles: of a fused backend, instead of the tuned ones. Fused backends want
    segment ids below 65,536 in rising order; other orders are right but slower. For `cudnn` alone: samples, the most
    that a row may have (64), and causal, that the limits are those of `segments.causal`; it raises ValueError for
    others.
    """
    backend, _ = choose(impl, dtype)
    if backend == "xla":
        return Plan(masks)
    if backend == "cudnn":
        lists, packing = cudnn.plan(masks, samples, causal)
        return Plan(masks, None, lists, packing, backend=backend)
    return Plan(masks, *fused.plan(masks, backend, tiles), backend=backend)


def und_plan(s: Segments, **how) -> Plan:
    """Causal inside each sample: und queries, und keys."""
    return make_plan(segments.und_masks(s), causal=True, **how)


def gen_plan(s: Segments, **how) -> Plan:
    """gen queries over [und; gen] keys of their sample: `attention` takes (k_und, k_gen) and (v_und, v_gen)."""
    return make_plan(segments.gen_masks(s), **how)


def full_plan(ids: jax.Array, **how) -> Plan:
    """Unmasked inside each segment (the vision encoder: one segment per frame). ids [B,T]."""
    return make_plan(segments.full_masks(ids), **how)


def attention(q, k, v, plan: Plan, *, scale: float, precision=None, return_lse: bool = False):
    """q [B,Tq,Hq,d] over one or more key sets, one softmax → [B,Tq,Hq,d] in q's dtype.

    k, v: [B,Tk,Hkv,d], or a tuple of them in the order of the plan's key sets. Query head h reads key head
    h // (Hq / Hkv). Scores, softmax and sums are float32. precision: of the matmuls in the `xla` backend; the others
    multiply bfloat16 exactly and float32 in full precision. A query that sees nothing gets 0 and passes no gradient.
    return_lse: also the natural log-sum-exp [B,Hq,Tq] float32, −inf for a query that sees nothing; ValueError where
    the backend has none that can be differentiated (`cudnn`).
    """
    k, v = _sets(k, v)
    m = plan.masks
    _check(q, k, v, m)
    if plan.backend == "cudnn":
        if return_lse:
            raise ValueError(
                "attention backend cudnn gives no log-sum-exp: jax drops its cotangent, so gradients through it would "
                "be wrong. Choose another backend."
            )
        return cudnn.attend(q, k, v, plan.lists, plan.tiles, scale)
    if plan.backend != "xla":
        out, lse = fused.attend(q, k, v, plan.flat, plan.lists, plan.tiles, plan.backend, scale)
    elif form(q.shape[0], q.shape[2], q.shape[1], sum(x.shape[1] for x in k)) == "blocked":
        parts = list(zip(k, v, m.k_ids, m.limits, strict=True))
        out, lse = blocked.attend(q, m.q_ids, parts, scale, tiles=xla_tiles(), precision=precision)
    else:
        seen = [reference.seen(m.q_ids, ids, limit) for ids, limit in zip(m.k_ids, m.limits, strict=True)]
        out, lse = reference.attend(q, list(zip(k, v, seen, strict=True)), scale, precision)
    if plan.backend == "xla":
        out, lse = fused.named(out, lse)
    return (out, lse) if return_lse else out


def gradient(q, k, v, plan: Plan, *, of: tuple, scale: float, precision=None):
    """What the keys at hand add to the gradients of an attention that had others too → (dq, dk, dv), as q, k and v are.

    of: of that attention, (out [B,Tq,Hq,d], lse [B,Hq,Tq], out's cotangent, delta [B,Hq,Tq] = Σ_d out · its cotangent −
    lse's cotangent, 0 where lse is −inf). For passes that meet their keys in turns (`context.py`).
    """
    if plan.backend != "xla":
        ks, vs = _sets(k, v)
        dq, dk, dv = fused.gradient(q, ks, vs, of, plan.flat, plan.lists, plan.tiles, plan.backend, scale)
        return (dq, dk[0], dv[0]) if isinstance(k, jax.Array) else (dq, dk, dv)
    # Of out = Σ_s w_s·out_s with w_s = exp(lse_s − lse), by the chain rule; the forward pass of the share is run again.
    attend = functools.partial(attention, plan=plan, scale=scale, precision=precision, return_lse=True)
    (share, share_lse), back = jax.vjp(attend, q, k, v)
    _, lse, do, delta = of
    weight = jnp.where(share_lse == -jnp.inf, 0.0, jnp.exp(share_lse - lse))
    dlse = weight * (jnp.einsum("bqhd,bqhd->bhq", do, share, preferred_element_type=jnp.float32) - delta)
    return back(((do * weight.swapaxes(1, 2)[..., None]).astype(share.dtype), dlse))


def _sets(*of) -> list[tuple]:
    """Keys, values as tuples of key sets."""
    return [(x,) if isinstance(x, jax.Array) else tuple(x) for x in of]


def _check(q, k, v, m: Masks) -> None:
    """Shapes that do not belong together, in a sentence instead of a broadcasting error."""
    if len(k) != len(m.k_ids) or len(v) != len(m.k_ids):
        raise ValueError(f"attention: {len(k)} keys and {len(v)} values for a plan of {len(m.k_ids)} key sets.")
    for what, x, ids in (("q", q, m.q_ids), *(("k", *x) for x in zip(k, m.k_ids, strict=True))):
        if x.shape[:2] != ids.shape:
            raise ValueError(f"attention: {what} has rows and tokens {x.shape[:2]}, its segment ids {ids.shape}.")
    for x, y in zip(k, v, strict=True):
        if x.shape != y.shape or q.shape[2] % x.shape[2] or q.shape[3] != x.shape[3]:
            raise ValueError(f"attention: q {q.shape}, k {x.shape} and v {y.shape} do not fit (heads, head_dim).")


def mot_attention(q_und, k_und, v_und, q_gen, k_gen, v_gen, plans: Plans, *, scale, k_und_for_gen=None, precision=None):
    """Both streams of a layer (spec model.md §2.2) → (und [B,U,Hq,d], gen [B,G,Hq,d]).

    k_und_for_gen: the und keys as gen queries see them, where that differs (Edge normalises them for gen alone).
    """
    seen = k_und if k_und_for_gen is None else k_und_for_gen
    und = attention(q_und, k_und, v_und, plans.und, scale=scale, precision=precision)
    return und, denoise_attention(q_gen, k_gen, v_gen, (seen, v_und), plans.gen, scale=scale, precision=precision)


def denoise_attention(q_gen, k_gen, v_gen, kv_cache, plan: Plan, *, scale, precision=None):
    """The gen stream over the frozen keys and values of und: kv_cache = (k_und, v_und) [B,U,Hkv,d]."""
    k_und, v_und = kv_cache
    return attention(q_gen, (k_und, k_gen), (v_und, v_gen), plan, scale=scale, precision=precision)


def form(rows: int, heads: int, queries: int, keys: int) -> str:
    """ "whole" or "blocked": how `xla` computes, from static sizes alone. keys: of all key sets together."""
    return "whole" if math.prod((rows, heads, queries, keys)) <= WHOLE else "blocked"


def xla_tiles() -> blocked.Tiles:
    """The tiles of `xla` on this platform."""
    return blocked.CPU if platform.device().platform == "cpu" else blocked.ACCELERATOR


def describe(rows: int, heads: int, queries: int, keys: int, *, impl: str = "auto", dtype=jnp.bfloat16) -> str:
    """What is computed how, as a sentence for a log."""
    backend, why = choose(impl, dtype)
    if backend == "cudnn":
        return f"attention: cudnn ({why}), {queries} × {keys} scores of a head"
    if backend != "xla":
        sizes = fused.tiles(backend, rows * queries, rows * keys)
        return f"attention: {backend} ({why}), {queries} × {keys} scores of a head in {sizes}"
    if form(rows, heads, queries, keys) == "whole":
        return f"attention: xla ({why}), all {queries} × {keys} scores of a head at once"
    t = xla_tiles()
    return f"attention: xla ({why}), {queries} × {keys} scores of a head in tiles of at most {t.queries} × {t.keys}"
