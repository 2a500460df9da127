"""Words that the Hopper kernels are written in: rings of shared memory, products of tensor cores, masks of a tile.

In: references of a Mosaic GPU kernel. Out: the same arithmetic on the chip and in jax's simulator, which knows neither
`run_state` nor a product whose left side is in registers: in `accumulate` the two differ, and in a fence (`release`).

A kernel here is three warpgroups: two compute, the third only copies. Copies into a slot of the ring complete its
`ready` barrier; both compute warpgroups arrive at its `free` barrier when they have read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

COMPUTE, COPY = 2, 2  # compute warpgroups are 0 and 1, the copying one is 2
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # of a thread: 2 · 240 + 24 = 3 · 168, what 384 threads start with
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number per row of a tile in registers
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def call(body: Callable, name: str, grid: dict[str, int], out, scratch: dict, interpret) -> Callable:
    """`body(*inputs, *outputs, **scratch)` on every cell of the grid, whose last axis runs fastest.

    interpret: False, True or the simulator's parameters.
    """

    def kernel(*refs):
        body(*refs[:-1], **refs[-1])

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=[scratch],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,  # type: ignore[attr-defined]
    )


def tile(*shape: int, dtype) -> Any:
    """Shared memory as tensor cores and the copy engine want it: rows of 128 bytes, swizzled."""
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def numbers(*shape: int, dtype=jnp.int32) -> Any:
    """Shared memory for numbers per token."""
    return plgpu.SMEM(shape, dtype)


def fetch(*copies: tuple, barrier) -> None:
    """Begin copies (from, to); `barrier` completes with as many arrivals as there are copies."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)


def produce(first, last, stages: int, free, load: Callable) -> None:
    """The copying warpgroup: `load(step, slot)` for steps first … last, each after its slot was freed."""

    @pl.loop(first, last)
    def _(step):
        slot = lax.rem(step, stages)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        load(step, slot)


def release(free, interpret) -> None:
    """This warpgroup has read the slot.

    The arrival orders its reads before the copy that overwrites them; the simulator's search for races, which knows two
    ways to memory, wants to see a fence between them too.
    """
    if interpret:
        plgpu.commit_smem()
    plgpu.barrier_arrive(free)


def drain(steps, stages: int, *free) -> None:
    """Wait until every slot was freed, so that no arrival is left unobserved."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(step, stages)])


def product(a, b, after: Callable = lambda: None) -> jax.Array:
    """a · b of shared memory, float32 in registers. after: runs once the product is under way."""

    def body(accumulator):
        plgpu.wgmma(accumulator, a, b)
        after()
        return accumulator[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def two_products(a, b, then: Callable, c, d) -> tuple:
    """(then(a · b), c · d) as `product`; `then` computes while the second product is under way."""

    def body(first, second):
        plgpu.wgmma(first, a, b)
        plgpu.wgmma(second, c, d)
        done = lax.optimization_barrier(plgpu.wgmma_accumulator_load(first, wait_n=1))  # nothing moves before the wait
        return then(done), second[...]

    shapes = (plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32) for x, y in ((a, b), (c, d)))
    return pl.run_scoped(body, *shapes)


def accumulate(*terms: tuple[jax.Array, Callable, Any], interpret) -> tuple[jax.Array, ...]:
    """(total, a, b) each → total + a() · b: total and a in registers, b in shared memory; a is rounded to b's dtype.

    a is called when its turn comes: what it computes, it computes while the product before is under way.
    """
    if interpret:
        return tuple(
            total + jnp.dot(a().astype(b.dtype), b[...], preferred_element_type=jnp.float32) for total, a, b in terms
        )

    def body(totals):
        for total, (_, a, b) in zip(totals, terms, strict=True):
            plgpu.wgmma(total, a().astype(b.dtype), b)

    return tuple(pl.run_state(body)(tuple(plgpu.ACC.init(total) for total, _, _ in terms)))


def zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def filled(rows: int, value: float) -> jax.Array:
    """A number per row."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROWS)


def over_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A number per row → the whole tile."""
    return lax.broadcast_in_dim(x, shape, [0])


def over_columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])


def position(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
