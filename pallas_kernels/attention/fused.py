"""What the fused backends share: buffers instead of rows, one derivative, one list of who can run where.

A backend is a module with

    HEAD_DIM     multiple that head_dim is padded to
    HEADS_FIRST  True: q, k, v, o are [heads, tokens, d]; False: [tokens, heads, d]
    tiles(queries, keys, kind) -> Tiles     hashable, for buffers of at least so many tokens on a device of this kind;
                                            Tiles.pad: the multiples that both buffers are padded to; str(): for a log
    plan(flat, tiles) -> lists              what to visit, forward and backward: a pytree of arrays
    forward(q, k, v, flat, lists, tiles, scale, interpret) -> (o, lse [Hq,Tq] float32, natural, −inf: nothing seen)
    backward(q, k, v, o, do, lse, delta, flat, lists, tiles, scale, interpret) -> (dq, dk, dv)

interpret is `platform.interpreting()`. What comes in is 0 on padding (do: 0 for queries that see nothing), whatever the
model left there: a NaN would survive the mask. What goes out must be 0 there. Neither function knows what a row, a
stream or a sample is. The gradient of the log-sum-exp costs nothing: it enters where rowsum(do · o) does (spec
kernels.md a.1).
"""

from __future__ import annotations

import functools
import importlib
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform
from pallas_kernels.attention.segments import Flat, Masks, flatten

BACKENDS = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}  # name → module beside this file
DEFAULT = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}  # platform → what `auto` takes if it can run
SAVED = ("attn_out", "attn_lse")  # names under which rematerialisation may keep them (`save_only_these_names`)


def refusal(name: str, dtype, device: platform.Device) -> str | None:
    """Why this backend cannot run for operands of `dtype` on `device`; None if it can."""
    if why := platform.refusal(name, device):
        return why
    if name == "mosaic_gpu" and jnp.dtype(dtype) != jnp.bfloat16 and not platform.interpreting():
        return f"it multiplies bfloat16, not {jnp.dtype(dtype)}"
    return None


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(f"pallas_kernels.attention.{BACKENDS[name]}")


def tiles(name: str, queries: int, keys: int):
    """The backend's tiles for buffers of so many tokens on the device that is traced for."""
    return _module(name).tiles(queries, keys, platform.device().kind)


def plan(masks: Masks, name: str, sizes=None):
    """(`Flat`, the backend's lists, its tiles). sizes: tiles to take instead of the tuned ones."""
    sizes = sizes or tiles(name, masks.q_ids.size, sum(ids.size for ids in masks.k_ids))
    flat = flatten(masks, *sizes.pad)
    return flat, _module(name).plan(flat, sizes), sizes


def named(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both under the names by which rematerialisation can keep them."""
    return checkpoint_name(out, SAVED[0]), checkpoint_name(lse, SAVED[1])


def attend(q, k: tuple, v: tuple, flat: Flat, lists, sizes, name: str, scale: float):
    """[B,Tq,Hq,d], key sets [B,Tk,Hkv,d] each → ([B,Tq,Hq,d], log-sum-exp [B,Hq,Tq])."""
    backend = _module(name)
    b, tq, hq, d = q.shape
    buffers = _buffers(q, k, v, backend, flat)
    out, lse = _kernel(*buffers, flat, lists, (name, sizes, scale, platform.interpreting()))
    out = out.swapaxes(0, 1) if backend.HEADS_FIRST else out
    return out[: b * tq, :, :d].reshape(b, tq, hq, d), lse[:, : b * tq].reshape(hq, b, tq).swapaxes(0, 1)


def gradient(q, k: tuple, v: tuple, of: tuple, flat: Flat, lists, sizes, name: str, scale: float):
    """What `attention.gradient` says: the backward kernels alone, under an out, lse, do and delta from outside."""
    backend = _module(name)
    out, lse, do, delta = of
    tokens = len(flat.q_ids)
    lse, delta = (_of_queries(x, tokens, fill) for x, fill in ((lse, -jnp.inf), (delta, 0.0)))
    out, do = (_buffer(x, tokens, backend) for x in (out, do))
    do = _kept(do, (lse > -jnp.inf).any(0), name)
    buffers, back = jax.vjp(lambda q, k, v: _buffers(q, k, v, backend, flat), q, k, v)
    buffers = (_kept(x, ids >= 0, name) for x, ids in zip(buffers, (flat.q_ids, flat.k_ids, flat.k_ids), strict=True))
    return back(backend.backward(*buffers, out, do, lse, delta, flat, lists, sizes, scale, platform.interpreting()))


def _buffers(q, k: tuple, v: tuple, backend, flat: Flat):
    keys, values = (x[0] if len(x) == 1 else jnp.concatenate(x, 1) for x in (k, v))
    tokens = (len(flat.q_ids), len(flat.k_ids), len(flat.k_ids))
    return tuple(_buffer(x, n, backend) for x, n in zip((q, keys, values), tokens, strict=True))


def _buffer(x: jax.Array, tokens: int, backend) -> jax.Array:
    """[B,T,H,d] → one buffer of so many tokens, as the backend reads it."""
    x = x.reshape(-1, *x.shape[2:])
    x = jnp.pad(x, ((0, tokens - x.shape[0]), (0, 0), (0, -x.shape[2] % backend.HEAD_DIM)))
    return x.swapaxes(0, 1) if backend.HEADS_FIRST else x


def _of_queries(x: jax.Array, tokens: int, fill: float) -> jax.Array:
    """[B,H,T] → [H, tokens]."""
    x = x.swapaxes(0, 1).reshape(x.shape[1], -1)
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1])), constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kernel(q, k, v, flat: Flat, lists, how: tuple):
    """how: (backend, its tiles, scale, whether it is simulated)."""
    return _forward(q, k, v, flat, lists, how)[0]


def _forward(q, k, v, flat, lists, how):
    # Named here, inside the rule: a name outside would keep a copy, and the kernel would run again all the same.
    name, *rest = how
    q, k, v = (_kept(x, ids >= 0, name) for x, ids in ((q, flat.q_ids), (k, flat.k_ids), (v, flat.k_ids)))
    out, lse = named(*_module(name).forward(q, k, v, flat, lists, *rest))
    return (out, lse), (q, k, v, flat, lists, out, lse)


def _backward(how, saved, cotangents):
    q, k, v, flat, lists, out, lse = saved
    do, dlse = cotangents
    name, *rest = how
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), -1)
    delta = (delta if _module(name).HEADS_FIRST else delta.swapaxes(0, 1)) - dlse  # [Hq,Tq]
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)  # a query that sees nothing passes no gradient, whatever comes in
    do = _kept(do, (lse > -jnp.inf).any(0), name)
    return *_module(name).backward(q, k, v, out, do, lse, delta, flat, lists, *rest), None, None


def _kept(x: jax.Array, tokens: jax.Array, name: str) -> jax.Array:
    """x where `tokens` [T] says so, 0 elsewhere; XLA fuses it with the copy that makes the buffer."""
    return jnp.where(tokens[:, None] if _module(name).HEADS_FIRST else tokens[:, None, None], x, 0)


_kernel.defvjp(_forward, _backward)
