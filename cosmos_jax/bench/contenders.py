"""Attention, computed by each library that is here, as forward and backward programs over the same operands.

In: a `Pack` and its operands. Out: a `Contender` each. Libraries that know no packed samples (cuDNN through jax.nn,
PyTorch) get what is best for them: samples of equal size as one dense batch, without mask or padding, gathered before
the clock starts.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels.attention as kernels
from cosmos_jax.bench import packs
from cosmos_jax.bench.clock import Timed
from cosmos_jax.bench.packs import Operands, Pack

SCALE = packs.HEAD_DIM**-0.5
DENSE = "cudnn_dense"  # jax's own call; our backend `cudnn` hands the samples over packed


class Contender(NamedTuple):
    """forward, backward: what is timed. results: output, dq, dk, dv in the packed order, to be compared."""

    name: str
    forward: Timed
    backward: Timed
    results: Callable[[], dict[str, np.ndarray]]


def names(dtype: str) -> tuple[list[str], dict[str, str]]:
    """(who can run here, `xla` first; who cannot → why)."""
    here, absent = [], {}
    for name in kernels.BACKENDS:
        try:
            here.append(kernels.choose(name, dtype)[0])
        except ValueError as e:
            absent[name] = str(e)
    if jax.default_backend() != "gpu":
        absent[DENSE] = "cuDNN needs a GPU."
    else:
        here.append(DENSE)
    if why := _torch_absent():
        absent["torch"] = why
    else:
        here.append("torch")
    return here, absent


def _torch_absent() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed."
    from cosmos_jax.parity import sdpa

    return sdpa.refusal(jax.default_backend())


def make(name: str, pack: Pack, x: Operands) -> Contender:
    if name == "torch":
        from cosmos_jax.parity import sdpa

        return _grouped(name, pack, x, sdpa.Attention)
    if name == DENSE:
        return _grouped(name, pack, x, _Cudnn)
    return _ours(name, pack, x)


def _ours(name: str, pack: Pack, x: Operands) -> Contender:
    of = packs.segments(pack)
    make = kernels.und_plan if pack.causal else kernels.gen_plan
    plan = jax.jit(functools.partial(make, impl=name, dtype=x.q.dtype))(of)

    def attend(q, k, v, plan):
        return kernels.attention(q, k, v, plan, scale=SCALE)

    forward = jax.jit(attend)
    out, pull = jax.jit(lambda q, k, v, plan: jax.vjp(functools.partial(attend, plan=plan), q, k, v))(*x[:3], plan)
    backward = jax.jit(lambda pull, do: pull(do))

    def results():
        dq, dk, dv = backward(pull, x.do)
        return _named(out, dq, jnp.concatenate(dk, 1), jnp.concatenate(dv, 1))

    return Contender(name, Timed(lambda: forward(*x[:3], plan)), Timed(lambda: backward(pull, x.do)), results)


def _named(*arrays) -> dict[str, np.ndarray]:
    return {n: np.asarray(a, np.float32) for n, a in zip(("output", "dq", "dk", "dv"), arrays, strict=True)}


class _Cudnn:
    """Batches (q, k, v, do) of equal samples → one program for all of them."""

    wait = staticmethod(jax.block_until_ready)

    def __init__(self, batches: list[tuple], causal: bool):
        def attend(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=causal, implementation="cudnn")

        self.qkv, self.do = [b[:3] for b in batches], [b[3] for b in batches]
        self._forward = jax.jit(lambda qkv: [attend(*b) for b in qkv])
        out, self._pull = jax.jit(lambda qkv: jax.vjp(lambda qkv: [attend(*b) for b in qkv], qkv))(self.qkv)
        self._backward = jax.jit(lambda pull, do: pull(do)[0])

    def forward(self):
        return self._forward(self.qkv)

    def backward(self):
        return self._backward(self._pull, self.do)

    numpy = staticmethod(np.asarray)


def _grouped(name: str, pack: Pack, x: Operands, library: Any) -> Contender:
    where = packs.rows(pack)
    k, v = (jnp.concatenate(t, 1)[0] for t in (x.k, x.v))
    batches = [(x.q[0][q], k[keys], v[keys], x.do[0][q]) for q, keys in where]
    it = library(batches, pack.causal)

    def results():
        found = [np.zeros(a.shape, np.float32) for a in (x.q[0], x.q[0], k, v)]
        for (q, keys), out, grads in zip(where, it.forward(), it.backward(), strict=True):
            for to, at, value in zip(found, (q, q, keys, keys), (out, *grads), strict=True):
                to[at] = it.numpy(value).astype(np.float32)
        return _named(*(a[None] for a in found))

    return Contender(name, Timed(it.forward, it.wait), Timed(it.backward, it.wait), results)
