"""Packed attention by cuDNN: NVIDIA's own kernels, behind the same front door.

In: q, k, v and the masks of a plan. Out: attended values, 0 where nothing is seen; no log-sum-exp.

    plan (once per step): tokens of each row in order of their sample; start and length of each sample
    attend: sort rows of q and of [k sets] ─► cuDNN, sample by sample (causal or full) ─► back into place

cuDNN takes samples as runs, each with its own length, so gen keys are gathered as [und; gen] of each sample. One sample
in a row (`samples=1`) is a dense call. It has never run on a GPU here, only been compiled for one; `auto` does not take
it. What it cannot do, it refuses:

| what | why |
|---|---|
| jax < 0.11 | key offsets are scaled by the number of query heads there: wrong keys, where heads are grouped |
| a gen_limit | its masks are causal or full |
| return_lse | jax drops the cotangent of cuDNN's log-sum-exp: gradients through a merge would be wrong, silently |

A row with more samples than `samples` comes out as NaN: the number is part of the program, the ids are not.
Rematerialisation runs the forward kernel again: jax names none of what it keeps. Source: spec kernels.md K3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as internal  # packed offsets are not in jax.nn

from pallas_kernels import platform
from pallas_kernels.attention.segments import Masks
from pallas_kernels.platform import HOPPER

SAMPLES = 64  # of a row; cuDNN's own statistics take 4 · samples · heads · tokens bytes of each row
LAST = jnp.iinfo(jnp.int32).max  # sorts after every sample


class Packing(NamedTuple):
    """What of a plan the program is compiled for."""

    samples: int
    causal: bool

    def __str__(self):
        return f"at most {self.samples} samples of a row"


class Lists(NamedTuple):
    """Of each row. A listed sample has queries and keys; starts and lengths of absent ones are −1."""

    q_order: jax.Array  # [B,Tq]: token at each place, listed samples first, each a run
    k_order: jax.Array  # [B,Tk]
    q_place: jax.Array  # [B,Tq]: the inverse of q_order
    q_listed: jax.Array  # bool [B,Tq], by token
    k_listed: jax.Array  # bool [B,Tk]
    q_starts: jax.Array  # [B,samples+1], the last always −1
    k_starts: jax.Array
    q_lengths: jax.Array  # [B,samples]
    k_lengths: jax.Array
    fits: jax.Array  # bool [B]: no more samples than that


def refusal(dtype, device: platform.Device) -> str | None:
    """Why it cannot run for operands of `dtype` on `device`; None if it can."""
    if jax.__version_info__ < (0, 11):
        return f"it needs jax ≥ 0.11 (before, grouped heads read wrong keys), here is {jax.__version__}"
    if platform.interpreting():
        return "nothing simulates it"
    if not any(h in device.kind for h in HOPPER):
        return f"packed samples need a Hopper GPU (sm_90), this is {device.kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 or float16, not {jnp.dtype(dtype)}"
    return None


def plan(masks: Masks, samples: int | None, causal: bool) -> tuple[Lists, Packing]:
    """causal: that the masks' limits are those of `segments.causal`. Raises ValueError for any others."""
    if not causal and any(limit is not None for limit in masks.limits):
        raise ValueError("attention backend cudnn knows no key limits (gen_limit, frame-causal): use auto or xla.")
    k_ids = jnp.concatenate(masks.k_ids, 1)
    samples = samples or min(SAMPLES, masks.q_ids.shape[1])
    return jax.vmap(lambda q, k: _row(q, k, samples))(masks.q_ids, k_ids), Packing(samples, causal)


def _row(q_ids: jax.Array, k_ids: jax.Array, samples: int) -> Lists:
    q_sample = jnp.where((q_ids >= 0) & _within(q_ids, k_ids), q_ids, LAST)
    k_sample = jnp.where((k_ids >= 0) & _within(k_ids, q_ids), k_ids, LAST)
    q_order, k_order = (jnp.argsort(x, stable=True).astype(jnp.int32) for x in (q_sample, k_sample))
    q_sorted, k_sorted = q_sample[q_order], k_sample[k_order]
    first = (q_sorted != jnp.roll(q_sorted, 1)).at[0].set(True) & (q_sorted < LAST)
    (at,) = jnp.nonzero(first, size=samples, fill_value=len(q_ids))
    sample = jnp.append(q_sorted, LAST)[at]
    q_starts, q_lengths = _runs(q_sorted, sample)
    k_starts, k_lengths = _runs(k_sorted, sample)
    return Lists(
        q_order, k_order, jnp.argsort(q_order).astype(jnp.int32), q_sample < LAST, k_sample < LAST,
        q_starts, k_starts, q_lengths, k_lengths, fits=first.sum() <= samples,
    )  # fmt: skip


def _runs(ids: jax.Array, sample: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the run of each sample starts in the sorted ids, with a last −1, and how long it is; −1 if absent."""
    start, end = (jnp.searchsorted(ids, sample, side=side).astype(jnp.int32) for side in ("left", "right"))
    return jnp.append(jnp.where(sample < LAST, start, -1), -1), jnp.where(sample < LAST, end - start, -1)


def _within(ids: jax.Array, others: jax.Array) -> jax.Array:
    """Which of the ids are among the others."""
    others = jnp.sort(others)
    return jnp.searchsorted(others, ids, side="left") < jnp.searchsorted(others, ids, side="right")


def attend(q, k: tuple, v: tuple, lists: Lists, packing: Packing, scale: float) -> jax.Array:
    """[B,Tq,Hq,d], key sets [B,Tk,Hkv,d] each → [B,Tq,Hq,d]."""
    # Places that belong to no listed sample are never written, neither in the output nor in the gradients.
    keys, values = (_moved(_zero_but(lists.k_listed, jnp.concatenate(x, 1)), lists.k_order) for x in (k, v))
    q = _moved(_zero_but(lists.q_listed, q), lists.q_order)
    out = _call(q, keys, values, lists.q_lengths, lists.k_lengths, lists.q_starts, lists.k_starts, packing, scale)
    out = _zero_but(lists.q_listed, _moved(out, lists.q_place))
    return jnp.where(lists.fits[:, None, None, None], out, jnp.nan)


def _zero_but(listed: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(listed[:, :, None, None], x, 0)


def _moved(x: jax.Array, order: jax.Array) -> jax.Array:
    """[B,T,…] by a permutation [B,T] of each row."""
    return jax.vmap(lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds"))(x, order)


def _call(q, k, v, q_lengths, k_lengths, q_starts, k_starts, packing: Packing, scale: float) -> jax.Array:
    """cuDNN: within each run of queries and the run of keys beside it; causal from the first of both."""
    mask = internal.MaskType.PADDING_CAUSAL if packing.causal else internal.MaskType.PADDING
    if packing.samples == 1:  # sorted first, hence at 0
        q_length, k_length = (jnp.maximum(x[:, 0], 0) for x in (q_lengths, k_lengths))
        return internal.dot_product_attention(
            q, k, v, q_seqlen=q_length, kv_seqlen=k_length, mask_type=mask, scale=scale
        )  # fmt: skip
    return internal.dot_product_attention(
        q, k, v, q_seqlen=q_lengths, kv_seqlen=k_lengths, q_offsets=q_starts, kv_offsets=k_starts,
        mask_type=mask, scale=scale,
    )  # fmt: skip
