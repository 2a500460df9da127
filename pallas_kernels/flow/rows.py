"""A formula on tokens, run by XLA or tile by tile by a kernel.

A formula takes arrays of the same shape, one for each buffer and each number per token, then what can be indexed for
the numbers of the step; it returns a tuple of such arrays. It must be elementwise: what sums over a token's features is
said in `results`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import platform

MODULES = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}  # name → module beside this file
IMPLS = ("xla", *MODULES)


def choose(impl: str = "auto", device: platform.Device | None = None) -> str:
    """The implementation: `auto` is xla. ValueError when `impl` is none, or cannot run on `device`."""
    device = device or platform.device()
    if impl == "auto":
        return "xla"
    if impl not in IMPLS:
        raise ValueError(f"flow implementation {impl!r} does not exist; choose one of {', '.join(IMPLS)} or auto.")
    if why := impl != "xla" and platform.refusal(impl, device):
        raise ValueError(f"flow implementation {impl} cannot run: {why}.")
    return impl


def run(
    formula: Callable[..., tuple],
    buffers: Sequence[jax.Array],
    columns: Sequence[jax.Array] = (),
    numbers: Sequence[jax.Array | float] = (),
    *,
    name: str,
    results: tuple[str, ...] = ("each",),
    impl: str = "xla",
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """formula(*buffers [..., N, P], *columns [..., N], numbers) → its results, float32.

    results: for each of them "each", [..., N, P] as it is, or "sum" over the features, [..., N]. Buffers are float32 or
    bool. impl: one that `choose` returned. name: what the kernel is called.
    """
    shape = buffers[0].shape
    for b in buffers:
        if b.shape != shape:
            raise ValueError(f"{name}: buffers {[b.shape for b in buffers]} differ in shape.")
    for c in columns:
        if c.shape != shape[:-1]:
            raise ValueError(f"{name}: numbers per token {[c.shape for c in columns]} for buffers {shape}.")
    if impl == "xla":
        out = formula(*buffers, *(c[..., None] for c in columns), numbers)
        return tuple(y.sum(-1) if how == "sum" else y for y, how in zip(out, results, strict=True))
    # Kernels see [N, P]; a truth is a byte in memory.
    buffers = [(b.astype(jnp.int8) if b.dtype == bool else b).reshape(-1, shape[-1]) for b in buffers]
    columns = [c.reshape(-1) for c in columns]
    table = jnp.stack([jnp.float32(n) for n in numbers]) if numbers else None
    module = importlib.import_module(f"pallas_kernels.flow.{MODULES[impl]}")
    out = module.run(formula, buffers, columns, table, name, results, interpret)
    return tuple(y.reshape(shape[:-1] if how == "sum" else shape) for y, how in zip(out, results, strict=True))
