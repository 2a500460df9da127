"""The same in one pass over memory, forward and backward, for TPU.

A program takes a tile of tokens with all heads of all slabs: whole rows come in, each head leaves for its own place,
and the tables are read once for q and k together. The backward pass makes the norm again from the slab, so nothing is
saved but what came in; the gradient of a norm's weight leaves as one partial sum per tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.norm_rope.reference import How, normed, rotated, signed, unweighted

LANES = 128
BUFFERS = 2**24  # bytes of VMEM for the blocks of a program, each of which is there twice
VMEM = 2**25  # bytes it may take in all
ROWS = (16, 512)  # least and most tokens of a tile


def norm_rope(xs, weights, cos, sin, how: How) -> tuple[jax.Array, ...]:
    """As the front door says. head_dim is padded to whole lanes, at the price of a copy of everything."""
    d, pad = how.head_dim, -how.head_dim % LANES

    def widen(x):
        heads = jnp.pad(x.reshape(len(x), -1, d), ((0, 0), (0, 0), (0, pad)))
        return heads.reshape(len(x), -1)

    if not pad:
        return _kernel(xs, weights, cos, sin, how)
    weights = tuple(None if w is None else jnp.pad(w, (0, pad)) for w in weights)
    ys = _kernel(tuple(map(widen, xs)), weights, widen(cos), widen(sin), how)
    return tuple(y[..., :d] for y in ys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kernel(xs, weights, cos, sin, how: How):
    width, (t, count) = cos.shape[1], (cos.shape[0], len(xs))
    rows = _rows(sum(2 * x.shape[1] * x.dtype.itemsize for x in xs), how.tokens)
    last = pl.cdiv(t, rows) - 1
    slab = [pl.BlockSpec((rows, x.shape[1]), lambda i: (jnp.minimum(i, last), 0)) for x in xs]
    heads = [jax.ShapeDtypeStruct((x.shape[1] // width, how.tokens, width), x.dtype) for x in xs]

    def body(*refs):
        x_refs, y_refs = refs[:count], refs[-count:]
        weight, cos, sin = _read(refs[count:-count], weights)
        row = pl.program_id(0) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, width), 0)
        for x_ref, w, y_ref, factor in zip(x_refs, weight, y_refs, how.factors, strict=True):
            c, s = cos.astype(x_ref.dtype), signed(sin, how.head_dim).astype(x_ref.dtype)
            for h in range(len(y_ref)):
                x = x_ref[:, h * width : (h + 1) * width]
                x = x if w is None else normed(x, w, how.eps, how.cast, how.head_dim)
                y = rotated(x, _swap(x, how.head_dim), c, s, factor)
                y_ref[h] = y if how.tokens == t else jnp.where(row < t, y, jnp.zeros_like(y))

    return pl.pallas_call(
        body,
        grid=(pl.cdiv(how.tokens, rows),),
        in_specs=slab + _tables(weights, rows, width, lambda i: (jnp.minimum(i, last), 0)),
        out_specs=tuple(pl.BlockSpec((y.shape[0], rows, width), lambda i: (0, i, 0)) for y in heads),
        out_shape=tuple(heads),
        compiler_params=_params(),
        interpret=how.interpret,
        name="norm_rope",
    )(*xs, *_present(weights), cos, sin)


def _forward(xs, weights, cos, sin, how: How):
    # A slab that is rotated only is not needed again, but for its dtype, which the gradient has too.
    kept = tuple(None if w is None else x for x, w in zip(xs, weights, strict=True))
    return _kernel(xs, weights, cos, sin, how), (kept, weights, cos, sin)


def _backward(how: How, saved, dys):
    kept, weights, cos, sin = saved
    width, t, count = cos.shape[1], cos.shape[0], len(dys)
    xs = _present(kept)
    arrays = [2 if x is None else 3 for x in kept]  # dy, dx and, of a norm, x
    rows = _rows(sum(a * len(dy) * width * dy.dtype.itemsize for a, dy in zip(arrays, dys, strict=True)), t)
    tiles = pl.cdiv(t, rows)
    dxs = [jax.ShapeDtypeStruct((t, dy.shape[0] * width), dy.dtype) for dy in dys]
    dws = [jax.ShapeDtypeStruct((tiles * 8, width), jnp.float32) for _ in xs]

    def body(*refs):
        dy_refs, x_refs, rest = refs[:count], refs[count : count + len(xs)], refs[count + len(xs) :]
        dx_refs, dw_refs = rest[-count - len(dws) : len(rest) - len(dws)], rest[len(rest) - len(dws) :]
        weight, cos, sin = _read(rest, weights)
        inside = pl.program_id(0) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, width), 0) < t
        x_left, dw_left = iter(x_refs), iter(dw_refs)
        for dy_ref, w, dx_ref, factor in zip(dy_refs, weight, dx_refs, how.factors, strict=True):
            x_ref, dw_ref = (None, None) if w is None else (next(x_left), next(dw_left))
            c, s = (table.astype(dy_ref.dtype).astype(jnp.float32) for table in (cos, signed(sin, how.head_dim)))
            total = jnp.zeros((8, width), jnp.float32)
            for h in range(len(dy_ref)):
                here = slice(h * width, (h + 1) * width)
                dy = dy_ref[h].astype(jnp.float32) * factor
                dz = dy * c + _swap(dy * s, how.head_dim)
                if w is None:
                    dx_ref[:, here] = dz.astype(dx_ref.dtype)
                    continue
                x = x_ref[:, here].astype(jnp.float32)
                if t % rows:  # what lies beyond the end may be anything
                    x, dz = jnp.where(inside, x, 0.0), jnp.where(inside, dz, 0.0)
                y, scale = unweighted(x, how.eps, how.head_dim)
                dy_hat = dz * w.astype(jnp.float32)
                along = jnp.sum(dy_hat * y, -1, keepdims=True) / how.head_dim
                dx_ref[:, here] = (scale * (dy_hat - y * along)).astype(dx_ref.dtype)
                y = y.astype(x_ref.dtype).astype(jnp.float32) if how.cast == "before_weight" else y
                total += (dz * y).reshape(rows // 8, 8, width).sum(0)
            if dw_ref is not None:
                dw_ref[...] = total

    out = pl.pallas_call(
        body,
        grid=(tiles,),
        in_specs=[pl.BlockSpec((dy.shape[0], rows, width), lambda i: (0, i, 0)) for dy in dys]
        + [pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0)) for x in xs]
        + _tables(weights, rows, width, lambda i: (i, 0)),
        out_specs=tuple(
            [pl.BlockSpec((rows, dx.shape[1]), lambda i: (i, 0)) for dx in dxs]
            + [pl.BlockSpec((8, width), lambda i: (i, 0)) for _ in dws]
        ),
        out_shape=(*dxs, *dws),
        compiler_params=_params(),
        interpret=how.interpret,
        name="norm_rope_backward",
    )(*dys, *xs, *_present(weights), cos, sin)
    sums = iter(out[count:])
    dweights = tuple(None if w is None else next(sums).sum(0).astype(w.dtype) for w in weights)
    return out[:count], dweights, None, None


_kernel.defvjp(_forward, _backward)


def _present(arrays) -> list:
    return [a for a in arrays if a is not None]


def _read(refs, weights):
    """Refs of `_tables`, and maybe others after them → the norms' weights, None where there is none; cos; sin."""
    left = iter(refs)
    return [None if w is None else next(left)[...] for w in weights], next(left)[...], next(left)[...]


def _tables(weights, rows: int, width: int, place) -> list:
    """Blocks of the weights, cos and sin."""
    whole = [pl.BlockSpec((width,), lambda i: (0,)) for _ in _present(weights)]
    return whole + [pl.BlockSpec((rows, width), place)] * 2


def _swap(x, head_dim: int):
    """Halves exchanged; what is past head_dim does not matter."""
    half, width = head_dim // 2, x.shape[-1]
    x32 = x.astype(jnp.float32)
    ahead = pltpu.roll(x32, half, 1)
    if head_dim < width:
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        ahead = jnp.where(lane < half, pltpu.roll(x32, width - half, 1), ahead)
    return ahead.astype(x.dtype)


def _rows(row_bytes: int, tokens: int) -> int:
    """Tokens of a tile: as many as fit, no more than there are."""
    least, most = ROWS
    rows = most
    while rows > least and (2 * rows * row_bytes > BUFFERS or rows // 2 >= tokens):
        rows //= 2
    return rows


def _params():
    return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM)
