"""The attention kernels' front door.

In: `impl` ("auto" or a backend's name) and the operands. Out: the result of that backend. Today there is one backend,
`xla`; asking for another by name is an error, never a silent fallback. It has two forms with one result: all scores at
once (`reference`, the definition) up to `WHOLE` of them, else tile by tile (`blocked`); `form` says which.
"""

from __future__ import annotations

import math

import jax

from pallas_kernels.attention import blocked, reference

BACKENDS = ("xla",)
WHOLE = 2**25  # scores that may exist at once: 128 MiB in float32


def choose(impl: str) -> str:
    """Resolve `auto` for this platform; raise ValueError for a backend that does not exist here."""
    if impl == "auto":
        return "xla"
    if impl not in BACKENDS:
        raise ValueError(f"attention backend {impl!r} is not available; choose one of {', '.join(BACKENDS)} or auto.")
    return impl


def form(rows: int, heads: int, queries: int, keys: int) -> str:
    """ "whole" or "blocked", from static sizes alone. keys: of all key sets together."""
    return "whole" if math.prod((rows, heads, queries, keys)) <= WHOLE else "blocked"


def tiles() -> blocked.Tiles:
    """The tiles of this platform."""
    return blocked.CPU if jax.default_backend() == "cpu" else blocked.ACCELERATOR


def describe(rows: int, heads: int, queries: int, keys: int) -> str:
    """What `form` decides, as a sentence for a log."""
    if form(rows, heads, queries, keys) == "whole":
        return f"attention: all {queries} × {keys} scores of a head at once"
    t = tiles()
    return f"attention: {queries} × {keys} scores of a head in tiles of at most {t.queries} × {t.keys}"


def und_attention(q, k, v, segment_ids, *, scale, impl="auto", precision=None):
    """Causal attention inside each segment. q [B,U,Hq,d], k, v [B,U,Hkv,d], ids [B,U] → [B,U,Hq,d]."""
    choose(impl)
    return _attend(q, segment_ids, [(k, v, segment_ids)], scale, precision, causal=True)


def gen_attention(q, k, v, segment_ids, k_und, v_und, und_segment_ids, *, scale, impl="auto", precision=None):
    """Gen queries over [und keys; gen keys] of their own segment, one softmax. q [B,G,Hq,d] → [B,G,Hq,d]."""
    choose(impl)
    return _attend(q, segment_ids, [(k_und, v_und, und_segment_ids), (k, v, segment_ids)], scale, precision)


def full_attention(q, k, v, segment_ids, *, scale, impl="auto", precision=None):
    """Unmasked attention inside each segment (the vision encoder: one segment per frame)."""
    choose(impl)
    return _attend(q, segment_ids, [(k, v, segment_ids)], scale, precision)


def _attend(q, q_ids, parts, scale, precision, causal=False):
    rows, queries, heads, _ = q.shape
    if form(rows, heads, queries, sum(k.shape[1] for k, _, _ in parts)) == "blocked":
        return blocked.attend(q, q_ids, parts, scale, tiles=tiles(), causal=causal, precision=precision)
    masks = [reference.same_segment(q_ids, ids) for _, _, ids in parts]
    if causal:
        masks = [m & reference.causal(queries) for m in masks]
    return reference.attend(q, [(k, v, m) for (k, v, _), m in zip(parts, masks, strict=True)], scale, precision)
