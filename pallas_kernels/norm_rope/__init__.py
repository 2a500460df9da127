"""RMSNorm per head, then rotary embedding, of everything that one stream projects to heads.

In: projection slabs [T, H·D], token-major as the matmul leaves them. Out: [H, T, D], head-major as the fused attention
of TPU reads them (`pallas_kernels/attention/fused.py`, HEADS_FIRST), scaled on request by what its softmax would
multiply with. On TPU this is one pass over memory where XLA makes several (docs/kernels.md); elsewhere XLA fuses it
well, so there is no kernel for GPU (spec kernels.md a.11).

| impl | what it is | where |
|---|---|---|
| `xla` | `reference.py`, the definition | everywhere |
| `mosaic_tpu` | `tpu.py`: forward and backward | TPU |
"""

from __future__ import annotations

import jax

from pallas_kernels import platform
from pallas_kernels.norm_rope import reference, tpu
from pallas_kernels.norm_rope.reference import CASTS, How

__all__ = ["CASTS", "IMPLS", "choose", "norm_rope"]
IMPLS = ("xla", "mosaic_tpu")


def choose(impl: str = "auto", device: platform.Device | None = None) -> str:
    """The implementation for `device` (default: the one that is traced for): the kernel on TPU, XLA elsewhere.

    Raises ValueError when `impl` is none, or cannot run there.
    """
    device = device or platform.device()
    if impl == "auto":
        return "mosaic_tpu" if device.platform == "tpu" else "xla"
    if impl not in IMPLS:
        raise ValueError(f"norm_rope implementation {impl!r} does not exist; choose one of {', '.join(IMPLS)} or auto.")
    if why := impl != "xla" and platform.refusal(impl, device):
        raise ValueError(f"norm_rope implementation {impl} cannot run: {why}.")
    return impl


def norm_rope(
    xs: tuple[jax.Array, ...],
    weights: tuple[jax.Array | None, ...],
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    cast: str = "before_weight",
    factors: tuple[float, ...] | None = None,
    tokens: int | None = None,
    impl: str = "auto",
) -> tuple[jax.Array, ...]:
    """Slabs [T, H_i·D] of one stream (its q and k, say) → [H_i, tokens, D] each, in its slab's dtype.

    weights: of the norm of each slab, [D]; None: it is rotated only. cos, sin: [T, D], cast to the slab's dtype; no
    gradient flows to them. eps, cast: of the norm ("before_weight": rounded, then weighted; "after_weight": the
    reverse). factors: what each result is multiplied with, in float32 before its last rounding. tokens: length of the
    results, at least T (default); rows past T are 0. Raises ValueError for shapes that do not belong together.
    """
    d = cos.shape[-1]
    factors = (1.0,) * len(xs) if factors is None else tuple(map(float, factors))
    tokens = cos.shape[0] if tokens is None else tokens
    if cast not in CASTS:
        raise ValueError(f"norm_rope: cast {cast!r} is not one of {', '.join(CASTS)}.")
    if not len(xs) == len(weights) == len(factors):
        raise ValueError(f"norm_rope: {len(xs)} slabs, {len(weights)} weights and {len(factors)} factors.")
    if cos.shape != sin.shape or cos.ndim != 2 or d % 2 or tokens < cos.shape[0]:
        raise ValueError(f"norm_rope: tables {cos.shape}, {sin.shape} for {tokens} tokens; they are [T, even D] alike.")
    for x, w in zip(xs, weights, strict=True):
        if x.ndim != 2 or x.shape[0] != cos.shape[0] or x.shape[1] % d or (w is not None and w.shape != (d,)):
            what = "no norm" if w is None else f"a norm of {w.shape}"
            raise ValueError(f"norm_rope: a slab {x.shape} with {what} for tables {cos.shape}; it is [T, H·D].")
    cos, sin = jax.lax.stop_gradient((cos, sin))
    how = How(d, float(eps), cast, factors, tokens, platform.interpreting())
    return (tpu if choose(impl) == "mosaic_tpu" else reference).norm_rope(tuple(xs), tuple(weights), cos, sin, how)
