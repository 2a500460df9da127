"""Formulas on tiles of tokens, for Hopper (Mosaic GPU, jax ≥ 0.11).

A warpgroup takes 64 tokens and walks over their features, straight from memory to registers and back: nothing is used
twice, so nothing is staged. In the layout of a matmul's result, four neighbouring threads read 32 bytes of a token, and
a number per token has its place in the thread that needs it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TOKENS, FEATURES = 64, 32  # of a tile: 16 registers of a thread for each buffer
UNIT = 8  # features come in whole sectors of memory
TILE, LINE = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


def run(formula, buffers, columns, numbers, name: str, results, interpret: bool) -> list[jax.Array]:
    """`rows.run` for [N, P] float32 or int8 (a truth), [N], and [K] numbers or None. Odd sizes are padded by a copy."""
    n, p = buffers[0].shape
    down, right = -n % TOKENS, -p % UNIT
    buffers = [jnp.pad(b, ((0, down), (0, right))) if down or right else b for b in buffers]
    columns = [jnp.pad(c, (0, down)) if down else c for c in columns]
    table = [] if numbers is None else [numbers]
    rows, width = buffers[0].shape
    step = max(f for f in range(UNIT, FEATURES + 1, UNIT) if width % f == 0)
    count = len(buffers) + len(columns)

    def body(*refs):
        here = pl.ds(jax.lax.axis_index("tile") * TOKENS, TOKENS)
        lines = [plgpu.load(ref.at[here], layout=LINE, optimized=False) for ref in refs[len(buffers) : count]]
        k = [refs[count][i] for i in range(len(numbers))] if table else ()

        def chunk(f, sums):
            place = (here, pl.ds(f * step, step))
            tiles = [_value(ref.at[place]) for ref in refs[: len(buffers)]]
            spread = [jax.lax.broadcast_in_dim(line, (TOKENS, step), (0,)) for line in lines]
            out = formula(*tiles, *spread, k)
            for ref, y, how in zip(refs[count + len(table) :], out, results, strict=True):
                if how == "each":
                    ref[place] = y
            new = [y.sum(1) for y, how in zip(out, results, strict=True) if how == "sum"]
            return tuple(old + more for old, more in zip(sums, new, strict=True))

        # A loop, not a list: unrolled, the loads of all chunks would be alive at once.
        totals = [ref for ref, how in zip(refs[count + len(table) :], results, strict=True) if how == "sum"]
        nothing = tuple(plgpu.layout_cast(jnp.zeros((TOKENS,), jnp.float32), LINE) for _ in totals)
        for ref, total in zip(totals, jax.lax.fori_loop(0, width // step, chunk, nothing), strict=True):
            ref[here] = total

    body.__name__ = name  # what compilers and profilers call the kernel
    out = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((rows,) if how == "sum" else (rows, width), jnp.float32) for how in results],
        grid=(rows // TOKENS,),
        grid_names=("tile",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,  # type: ignore[attr-defined]  # jax ≥ 0.11
    )(*buffers, *columns, *table)
    return [y[:n] if how == "sum" else y[:n, :p] for y, how in zip(out, results, strict=True)]


def _value(ref):
    x = plgpu.load(ref, layout=TILE, optimized=False)
    return x.astype(jnp.int32) != 0 if x.dtype == jnp.int8 else x
