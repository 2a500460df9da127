"""Formulas on tiles of tokens, for TPU.

Tokens lie along the lanes. XLA stores [N, P] with P = 192 that way on TPU (the other way round, 128 lanes would pad it
to 256), so the turn is no copy; a number per token is a row of lanes instead of a column padded to 128; and a sum over
features stays in its lane (spec kernels.md (b), "TPU trap").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BUFFERS = 2**23  # bytes of VMEM for the blocks of a program, each of which is there twice
LANES = 128


def run(formula, buffers, columns, numbers, name: str, results, interpret) -> list[jax.Array]:
    """`rows.run` for [N, P] float32 or int8 (a truth), [N], and [K] numbers or None."""
    n, p = buffers[0].shape
    each = sum(r == "each" for r in results)
    width = _width(2 * p * (4 * each + sum(b.dtype.itemsize for b in buffers)), n)
    tile, line = pl.BlockSpec((p, width), lambda i: (0, i)), pl.BlockSpec((1, width), lambda i: (0, i))
    table = [] if numbers is None else [numbers]
    count = len(buffers) + len(columns)

    def body(*refs):
        out = formula(*map(_value, refs[:count]), refs[count] if table else ())
        for ref, y, how in zip(refs[count + len(table) :], out, results, strict=True):
            ref[...] = y.sum(0, keepdims=True) if how == "sum" else y

    out = pl.pallas_call(
        body,
        grid=(pl.cdiv(n, width),),
        in_specs=[tile] * len(buffers) + [line] * len(columns) + [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(table),
        out_specs=[line if how == "sum" else tile for how in results],
        out_shape=[jax.ShapeDtypeStruct((1 if how == "sum" else p, n), jnp.float32) for how in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=name,
    )(*(b.T for b in buffers), *(c[None] for c in columns), *table)
    return [y.T for y in out]


def _value(ref):
    return ref[...].astype(jnp.int32) != 0 if ref.dtype == jnp.int8 else ref[...]


def _width(token_bytes: int, tokens: int) -> int:
    """Tokens of a tile: whole lanes, as many as fit, no more than there are."""
    return min(max(BUFFERS // token_bytes // LANES, 1), pl.cdiv(tokens, LANES)) * LANES
