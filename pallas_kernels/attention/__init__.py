"""The attention kernels' front door.

In: `impl` ("auto" or a backend's name) and the operands. Out: the result of that backend. Today there is one backend,
`xla`; asking for another by name is an error, never a silent fallback.
"""

from __future__ import annotations

from pallas_kernels.attention import reference

BACKENDS = ("xla",)


def choose(impl: str) -> str:
    """Resolve `auto` for this platform; raise ValueError for a backend that does not exist here."""
    if impl == "auto":
        return "xla"
    if impl not in BACKENDS:
        raise ValueError(f"attention backend {impl!r} is not available; choose one of {', '.join(BACKENDS)} or auto.")
    return impl


def und_attention(q, k, v, segment_ids, *, scale, impl="auto", precision=None):
    """Causal attention inside each segment. q [B,U,Hq,d], k, v [B,U,Hkv,d], ids [B,U] → [B,U,Hq,d]."""
    choose(impl)
    mask = reference.same_segment(segment_ids, segment_ids) & reference.causal(q.shape[1])
    return reference.attend(q, [(k, v, mask)], scale, precision)


def gen_attention(q, k, v, segment_ids, k_und, v_und, und_segment_ids, *, scale, impl="auto", precision=None):
    """Gen queries over [und keys; gen keys] of their own segment, one softmax. q [B,G,Hq,d] → [B,G,Hq,d]."""
    choose(impl)
    over_und = reference.same_segment(segment_ids, und_segment_ids)
    over_gen = reference.same_segment(segment_ids, segment_ids)
    return reference.attend(q, [(k_und, v_und, over_und), (k, v, over_gen)], scale, precision)


def full_attention(q, k, v, segment_ids, *, scale, impl="auto", precision=None):
    """Unmasked attention inside each segment (the vision encoder: one segment per frame)."""
    choose(impl)
    return reference.attend(q, [(k, v, reference.same_segment(segment_ids, segment_ids))], scale, precision)
