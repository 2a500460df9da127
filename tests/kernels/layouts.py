"""Who may see whom, in every way that breaks attention kernels, and the comparison with the reference.

In: sizes of a packed batch. Out: `layouts`, ids and limits by name, all of one shape so that they share a compile;
`operands`, random q, k, v and cotangents; `evaluate`, output, log-sum-exp and gradients under a plan of any
backend through the front door; `errors`, how far two of them are apart.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Plan, Segments, attention, make_plan
from pallas_kernels.attention.segments import Masks, causal, gen_masks, und_masks

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # largest error over the largest value of the reference
SCALE = 0.3


class Operands(NamedTuple):
    q: jax.Array  # [B,Tq,Hq,d]
    k: tuple[jax.Array, ...]  # [B,Tk,Hkv,d] each
    v: tuple[jax.Array, ...]
    do: jax.Array  # cotangent of the output, as q
    dlse: jax.Array  # cotangent of the log-sum-exp, [B,Hq,Tq] float32


class Result(NamedTuple):
    """In the order of `errors`; keys and values of all key sets side by side."""

    o: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def layouts(rows: int, und: int, gen: int, seed: int = 0) -> dict[str, Segments]:
    """Packed batches [rows, und], [rows, gen] by name; odd sizes make odd lengths. `gen_limit` is always there."""
    rng = np.random.default_rng(seed)

    def cut(tokens: int, samples: int) -> np.ndarray:
        """A row of `samples` runs (some may be empty) that fill it."""
        ends = np.sort(rng.integers(0, tokens + 1, samples - 1))
        return np.repeat(np.arange(samples), np.diff([0, *ends, tokens]))

    def pack(one_row, limit=None):
        ids_und, ids_gen = (np.stack([one_row(n) for _ in range(rows)]).astype(np.int32) for n in (und, gen))
        limits = np.full((rows, gen), gen) if limit is None else np.stack([limit(row) for row in ids_gen])
        return Segments(jnp.asarray(ids_und), jnp.asarray(ids_gen), jnp.asarray(limits, jnp.int32))

    def frames(ids: np.ndarray) -> np.ndarray:
        """Frame-causal: a token sees up to the end of its frame of 7 tokens, counted in its sample."""
        start = np.maximum.accumulate(np.where(np.diff(ids, prepend=ids[0] - 1) != 0, np.arange(len(ids)), 0))
        return np.minimum(start + ((np.arange(len(ids)) - start) // 7 + 1) * 7, len(ids))

    def padded(front: float, middle: float, back: float):
        def one_row(n):
            a, b, c = (int(n * x) for x in (front, middle, back))
            ids = cut(n - a - b - c, 3)
            half = len(ids) // 2
            return np.concatenate([np.full(a, -1), ids[:half], np.full(b, -1), ids[half:], np.full(c, -1)])

        return one_row

    def mixed(n):  # sound after video: the ids of a row fall again
        ids = cut(n - n // 4, 4)
        return np.concatenate([ids, np.repeat(np.arange(4), n // 16 + 1)[: n // 4]])

    made = {
        "one sample": pack(lambda n: np.zeros(n)),
        "two samples": pack(lambda n: cut(n, 2)),
        "five samples": pack(lambda n: cut(n, 5)),
        "64 samples": pack(lambda n: cut(n, 64)),
        "one token each": pack(lambda n: np.arange(n)),
        "one-token samples between long ones": pack(lambda n: np.r_[0, np.full(n // 2, 1), 2, 3, np.full(n, 4)][:n]),
        "frame-causal": pack(lambda n: cut(n, 3), frames),
        "frame-causal, one sample": pack(lambda n: np.zeros(n), frames),
        "limits of zero": pack(lambda n: cut(n, 3), lambda ids: np.where(np.arange(len(ids)) % 3 == 0, 0, len(ids))),
        "random limits": pack(lambda n: cut(n, 3), lambda ids: rng.integers(0, len(ids) + 1, len(ids))),
        "leading padding": pack(padded(0.6, 0, 0)),
        "middle padding": pack(padded(0, 0.5, 0)),
        "trailing padding": pack(padded(0, 0, 0.6)),
        "padding everywhere, frame-causal": pack(padded(0.2, 0.3, 0.2), frames),
        "padding alone": pack(lambda n: np.full(n, -1)),
        "unsorted": pack(mixed),
        "shuffled": pack(lambda n: rng.integers(-1, 4, n)),
    }
    s = made["five samples"]
    made["und of other samples than gen"] = s._replace(und=s.und + 3)
    s = made["unsorted"]
    made["an empty row"] = s._replace(und=s.und.at[0].set(-1), gen=s.gen.at[0].set(-1))
    return made


def masks(s: Segments) -> dict[str, Masks]:
    """What a layer asks of these ids: und causal, gen over [und; gen], gen alone as if causal too."""
    return {"und": und_masks(s), "gen": gen_masks(s), "causal gen": causal(s.gen)}


def operands(m: Masks, heads: int, group: int, dim: int = 128, dtype=jnp.float32, seed: int = 0) -> Operands:
    """Random normal operands; q of `heads`, k and v of heads // group."""
    rng = np.random.default_rng(seed)

    def normal(ids, heads):
        return jnp.asarray(rng.standard_normal((*ids.shape, heads, dim)), dtype)

    k, v = (tuple(normal(ids, heads // group) for ids in m.k_ids) for _ in range(2))
    rows, queries = m.q_ids.shape
    dlse = jnp.asarray(rng.standard_normal((rows, heads, queries)), jnp.float32)
    return Operands(normal(m.q_ids, heads), k, v, normal(m.q_ids, heads), dlse)


plan_for = jax.jit(make_plan, static_argnames=("impl", "dtype", "tiles"))  # (masks, impl=, dtype=, tiles=) → Plan


@functools.partial(jax.jit, static_argnames="scale")
def _evaluate(x: Operands, plan: Plan, scale: float):
    attend = functools.partial(attention, plan=plan, scale=scale, return_lse=True, precision="highest")
    (o, lse), back = jax.vjp(attend, x.q, x.k, x.v)
    return o, lse, *back((x.do, x.dlse))


def evaluate(x: Operands, plan: Plan, scale: float = SCALE) -> Result:
    """Forward and backward; for fused backends make the plan and call this inside `platform.interpreted()`.

    How a backend is simulated is decided at the first call for these shapes: `_evaluate.clear_cache()` forgets it.
    """
    o, lse, dq, dk, dv = _evaluate(x, plan, scale)
    return Result(*map(np.asarray, (o, lse, dq, jnp.concatenate(dk, 1), jnp.concatenate(dv, 1))))


def truth(x: Operands, m: Masks, scale: float = SCALE) -> Result:
    """The reference in float32, of operands in whose padding and blind queries there is nothing but zeros."""
    x = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    x, plan = poison(x, m, 0.0), plan_for(m, impl="xla")
    lse = evaluate(x, plan, scale).lse
    blind = jnp.asarray(lse == -np.inf)
    x = x._replace(do=jnp.where(blind.swapaxes(1, 2)[..., None], 0, x.do), dlse=jnp.where(blind, 0, x.dlse))
    return evaluate(x, plan, scale)


def poison(x: Operands, m: Masks, value: float) -> Operands:
    """The same with `value` in every padding row of q, k, v and of both cotangents."""

    def put(a, ids):
        return jnp.where((ids < 0)[..., None, None], jnp.asarray(value, a.dtype), a)

    k, v = (tuple(put(a, ids) for a, ids in zip(y, m.k_ids, strict=True)) for y in (x.k, x.v))
    dlse = jnp.where((m.q_ids < 0)[:, None], value, x.dlse)
    return Operands(put(x.q, m.q_ids), k, v, put(x.do, m.q_ids), dlse)


def errors(got: Result, want: Result) -> dict[str, float]:
    """Largest error of each over the largest value of the reference (at least 1e-3); NaN counts as infinite.

    A query that sees nothing in one of them only is an infinite error of `lse`.
    """
    found = {}
    for name, a, b in zip(Result._fields, got, want, strict=True):
        if name == "lse":
            if (np.isneginf(a) != np.isneginf(b)).any():
                found[name] = np.inf
                continue
            a, b = (np.where(np.isneginf(b), 0, x) for x in (a, b))
        off = np.abs(a.astype(np.float32) - b.astype(np.float32)).max()
        found[name] = float(off / max(np.abs(b).max(), 1e-3)) if np.isfinite(off) else np.inf
    return found


def assert_close(got: Result, want: Result, dtype, what: str = "") -> None:
    """Within `TOLERANCE`, the same blind queries, and exactly nothing where nothing is seen or padding stands."""
    found = errors(got, want)
    assert max(found.values()) <= TOLERANCE[jnp.dtype(dtype).name], f"{what}: {found}"
    blind = np.isneginf(want.lse).swapaxes(1, 2)
    for name in ("o", "dq"):
        assert not getattr(got, name)[blind].any(), f"{what}: {name} of queries that see nothing"
    for name in ("dk", "dv"):
        unseen = (np.abs(want.dv).sum((2, 3)) == 0) & (np.abs(want.dk).sum((2, 3)) == 0)
        assert not getattr(got, name)[unseen].any(), f"{what}: {name} of keys that nobody sees"
