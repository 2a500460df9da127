"""The fused norm and rotation equals the model's own two functions, and so do its gradients; TPU kernel simulated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from cosmos_jax.model import rope
from cosmos_jax.model.norm import RMSNorm
from cosmos_jax.precision import HIGHEST, Precision
from pallas_kernels import norm_rope as front
from pallas_kernels import platform
from pallas_kernels.norm_rope import norm_rope, reference, tpu

LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}
EPS, HEADS = 1e-6, (2, 1)


def case(tokens, d, dtype, norms=(True, True), heads=HEADS, seed=0):
    """Slabs, weights, tables, and a cotangent for each result."""
    rng = np.random.RandomState(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    xs = tuple(draw(tokens, h * d) for h in heads)
    weights = tuple(1 + draw(d) if n else None for n in norms)
    phase = np.tile(rng.uniform(0, 3000, (tokens, d // 2)).astype(np.float32), 2)
    return xs, weights, jnp.cos(phase), jnp.sin(phase)


def run(xs, weights, cos, sin, impl, dys=None, **how):
    """Results, and the gradients of slabs and weights for the cotangents `dys` (default: fixed random ones)."""

    def both(xs, weights):
        ys, back = jax.vjp(lambda xs, ws: norm_rope(xs, ws, cos, sin, eps=EPS, impl=impl, **how), xs, weights)
        rng = np.random.RandomState(9)
        cotangents = tuple(jnp.asarray(rng.standard_normal(y.shape), y.dtype) for y in ys) if dys is None else dys
        return ys, *back(cotangents)

    if impl == "xla":
        return jax.jit(both)(xs, weights)
    with platform.interpreted():
        return jax.jit(both)(xs, weights)


def error(got, want):
    """Largest difference, relative to the largest value."""
    got, want = (np.asarray(x.astype(jnp.float32)) for x in (got, want))
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("cast", front.CASTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_definition_is_the_models_norm_and_rotation_bit_for_bit(dtype, cast):
    xs, weights, cos, sin = case(9, 16, dtype, (True, False))
    with jax.disable_jit():
        ys = norm_rope(xs, weights, cos, sin, eps=EPS, cast=cast, impl="xla")
        for x, w, y in zip(xs, weights, ys, strict=True):
            x = x.reshape(1, 9, -1, 16)
            if w is not None:
                norm = RMSNorm(nnx.Rngs(0), 16, "head_dim", EPS, cast)
                norm.weight.value = w.astype(jnp.float32)
                x = norm(x, HIGHEST if dtype == "float32" else Precision("bfloat16", "default"))
            want = rope.rotate(x, cos[None], sin[None])
            np.testing.assert_array_equal(y.swapaxes(0, 1)[None].astype(jnp.float32), want.astype(jnp.float32))


CASES = {  # tokens, head_dim, with norms, heads, cast, length of the results
    "nano": (37, 128, (True, True), HEADS, "before_weight", 70),  # tiles of 16: the last two have no token
    "edge": (37, 128, (False, False, True), (2, 1, 1), "after_weight", None),  # und: k once more, normed, for gen
    "narrow": (37, 32, (True, True), (2, 1), "after_weight", 48),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_equals_the_definition(name, dtype, monkeypatch):
    """Results as the definition rounds them; gradients as float32 makes them from the same numbers."""
    monkeypatch.setattr(tpu, "ROWS", (16, 16))
    tokens, d, norms, heads, cast, length = CASES[name]
    args = case(tokens, d, dtype, norms, heads)
    how = dict(cast=cast, tokens=length, factors=(0.2, *(1.0,) * (len(heads) - 1)))
    got, exact = run(*args, "mosaic_tpu", **how), run(*jax.tree.map(jnp.float32, args), "xla", **how)
    want = jax.jit(lambda a: norm_rope(*a, eps=EPS, impl="xla", **how))(args)
    for y, w in zip(got[0], want, strict=True):
        assert y.dtype == w.dtype and y.shape[1] == (length or tokens) and not np.asarray(y[:, tokens:]).any()
        # equal but where the order of a sum of squares decides a rounding
        assert error(y, w) <= 1e-6 if dtype == "float32" else np.asarray(y != w).mean() < 2e-3 and error(y, w) < 2**-7
    for g, w in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(exact[1:]), strict=True):
        assert g.dtype == dtype and error(g, w) <= LIMIT[dtype]


def test_what_lies_past_the_end_cannot_be_seen():
    """Cotangents of the padding are NaN: nothing of them arrives. (Simulated blocks past the end are NaN as well.)"""
    xs, weights, cos, sin = case(37, 128, "float32")
    dys = tuple(jnp.ones((h, 96, 128)).at[:, 37:].set(jnp.nan) for h in HEADS)
    got = run(xs, weights, cos, sin, "mosaic_tpu", dys, tokens=96)
    want = run(xs, weights, cos, sin, "xla", tuple(dy.at[:, 37:].set(0) for dy in dys), tokens=96)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(g, w) <= 1e-5


def test_no_races_and_nothing_is_read_before_it_is_written(monkeypatch):
    monkeypatch.setattr(tpu, "ROWS", (16, 16))
    xs, weights, cos, sin = case(24, 128, "float32", heads=(1,), norms=(True,))
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    how = reference.How(128, EPS, "before_weight", (1.0,), 32, simulated)

    def slopes(f):
        return jax.jit(jax.grad(lambda xs, ws: (f(xs, ws, cos, sin, how)[0] ** 2).sum(), (0, 1)))(xs, weights)

    for g, w in zip(*(jax.tree.leaves(slopes(m.norm_rope)) for m in (tpu, reference)), strict=True):
        assert error(g, w) <= 1e-5
    assert not races_found()


def races_found():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    return simulator.races.races_found


MISTAKES = {
    "sign of the rotation": lambda how, m: m.setattr(tpu, "signed", lambda sin, width: sin),
    "order of the casts": lambda how, m: how.update(cast="after_weight"),
    "factor": lambda how, m: how.update(factors=(0.21, 1.0)),
    "halves not exchanged": lambda how, m: m.setattr(tpu, "_swap", lambda x, d: x),
    "no weight": lambda how, m: m.setattr(tpu, "normed", lambda x, w, *a: reference.normed(x, jnp.ones_like(w), *a)),
    "epsilon": lambda how, m: m.setattr(tpu, "normed", lambda x, w, e, *a: reference.normed(x, w, 1e-2, *a)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_plausible_mistakes_are_visible(mistake, monkeypatch):
    xs, weights, cos, sin = case(16, 128, "bfloat16", heads=(1, 1))
    how = dict(cast="before_weight", factors=(0.2, 1.0))
    want = norm_rope(xs, weights, cos, sin, eps=EPS, impl="xla", **how)
    MISTAKES[mistake](how, monkeypatch)
    with platform.interpreted():
        got = norm_rope(xs, weights, cos, sin, eps=EPS, impl="mosaic_tpu", **how)
    assert np.asarray(got[0] != want[0]).mean() > 2e-2


def test_tables_are_data():
    xs, weights, cos, sin = case(4, 16, "float32")

    def f(cos):
        return sum(y.sum() for y in norm_rope(xs, weights, cos, sin, eps=EPS, impl="xla"))

    assert not jax.grad(f)(cos).any()


def test_a_kernel_that_cannot_run_and_shapes_that_do_not_fit_are_refused():
    xs, weights, cos, sin = case(4, 16, "float32")
    assert front.choose("auto") == "xla" and front.choose("auto", platform.Device("tpu", "TPU v5p")) == "mosaic_tpu"
    with pytest.raises(ValueError, match="needs a TPU, this is cpu"):
        norm_rope(xs, weights, cos, sin, eps=EPS, impl="mosaic_tpu")
    with pytest.raises(ValueError, match="'triton' does not exist"):
        norm_rope(xs, weights, cos, sin, eps=EPS, impl="triton")
    with pytest.raises(ValueError, match="cast 'never'"):
        norm_rope(xs, weights, cos, sin, eps=EPS, cast="never")
    with pytest.raises(ValueError, match="2 slabs, 1 weights"):
        norm_rope(xs, weights[:1], cos, sin, eps=EPS)
    with pytest.raises(ValueError, match="tables"):
        norm_rope(xs, weights, cos, sin[:3], eps=EPS)
    with pytest.raises(ValueError, match=r"it is \[T, H·D\]"):
        norm_rope((xs[0][:, :-1], xs[1]), weights, cos, sin, eps=EPS)
