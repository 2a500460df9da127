"""One formula, three ways: the kernels for TPU (simulated here) equal XLA's form, values and gradients.

The XLA form is what trains and samples; tests/unit/test_flow.py, tests/parity/test_solver.py and test_sampling.py hold
it against the definition and the reference. Kernels for Hopper: tests/kernels/gpu/test_flow_kernels.py.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import ROW, SHAPES, buffers, compare, error_program, noise_program, update_program
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flow, platform, traffic
from pallas_kernels.flow import noising, programs, rows
from pallas_kernels.flow import tpu as runner


@pytest.mark.parametrize("shape", SHAPES)
def test_noising_and_its_gradients(shape):
    compare(noise_program, (*buffers(4, shape)[:3], buffers(1, shape)[0][..., 0]), "mosaic_tpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_error_and_its_gradient(shape):
    compare(error_program, (*buffers(3, shape), *(b[..., 0] for b in buffers(2, shape))), "mosaic_tpu")


@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond"), ("cond", "free"), ("cond", "uncond", "free")])
def test_update_for_every_set_of_branches(branches):
    compare(functools.partial(update_program, branches), tuple(buffers(9, SHAPES[0])), "mosaic_tpu")


def test_gradients_are_autodiffs():
    """The rules written by hand against jax's own derivatives of the formulas."""
    x0, e, predicted, dx_t = buffers(4, (1, 7, 5))
    sigma, weight, noisy = jax.nn.sigmoid(x0[..., 0]), e[..., 0] ** 2, predicted > 0

    def plain(x0, e, sigma):
        return jnp.where(noisy, sigma[..., None] * e + (1 - sigma[..., None]) * x0, x0)

    got = jax.vjp(lambda *a: flow.noise(*a, noisy), x0, e, sigma)[1](dx_t)
    for g, w in zip(got, jax.vjp(plain, x0, e, sigma)[1](dx_t), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)

    def squares(p):
        return (jnp.where(noisy, p - (e - x0), 0) ** 2).sum(-1) * weight

    token, back = jax.vjp(lambda p: flow.squared_error(p, x0, e, noisy, weight), predicted)
    want, wants = jax.vjp(squares, predicted)
    np.testing.assert_allclose(token, want, rtol=1e-6)
    np.testing.assert_allclose(back(sigma)[0], wants(sigma)[0], rtol=1e-6, atol=1e-6)
    data = jax.grad(lambda x0, e, w: flow.squared_error(predicted, x0, e, noisy, w).sum(), (0, 1, 2))(x0, e, weight)
    assert not any(d.any() for d in data)


def test_clean_elements_are_exact_and_their_errors_are_nothing():
    """Where nothing is noisy, noise and predictions may be NaN: x0 comes back bit-equal, losses and gradients are 0."""
    x0, e, predicted = buffers(3, (1, 9, 6))
    noisy = x0 > 0.3
    bad = jnp.where(noisy, e, jnp.nan)
    for impl in ("xla", "mosaic_tpu"):
        with platform.interpreted():
            x_t = flow.noise(x0, bad, jnp.full((1, 9), 0.7), noisy, impl=impl)
            np.testing.assert_array_equal(np.where(noisy, 0, x_t), np.where(noisy, 0, x0))
            wrong = jnp.where(noisy, predicted, jnp.nan)
            token, back = jax.vjp(lambda p: flow.squared_error(p, x0, bad, noisy, x0[..., 0], impl=impl), wrong)  # noqa: B023
            slope = back(token)[0]
        assert np.isfinite(token).all() and not np.asarray(slope)[~np.asarray(noisy)].any()
        assert np.asarray(slope)[np.asarray(noisy)].any()


def test_no_races_and_nothing_is_read_before_it_is_written(monkeypatch):
    """All kernels are one runner: an update has every kind of operand, noising's slopes every kind of result."""
    monkeypatch.setattr(runner, "BUFFERS", 1)  # tiles of 128 tokens
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    bs = buffers(3, (160, 8))
    args = (noising._slopes, (*bs, bs[0] > 0), (bs[1][:, 0],), (2.0,))
    how = dict(name="races", results=("each", "each", "sum"))
    got = rows.run(*args, impl="mosaic_tpu", interpret=simulated, **how)
    for g, w in zip(got, rows.run(*args, **how), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    assert not simulator.races.races_found


def test_the_update_sees_every_number_of_its_row():
    """Each weight moves the result of a step: none is read from the place of another."""
    bs = buffers(9, (1, 4, 3))
    names = [(n, i) for n in ROW for i in (range(len(ROW[n])) if np.ndim(ROW[n]) else (None,))]
    base = update_program(("cond", "uncond", "free"), *bs, impl="xla")
    seen = set()
    for name, i in names:
        value = np.array(ROW[name], np.float32)
        value[() if i is None else i] += 0.5
        moved = update_program(("cond", "uncond", "free"), *bs, impl="xla", row=ROW | {name: value})
        seen.add(tuple(float(jnp.abs(a - b).sum()) for a, b in zip(moved, base, strict=True)))
    assert len(seen) == len(names) == 12 and (0.0, 0.0, 0.0) not in seen


def test_traffic_counts_operands_results_padding_and_what_stays_on_the_chip():
    def compiled(text):
        return types.SimpleNamespace(as_text=lambda: text)

    counted = dict(traffic.by_instruction(compiled(TEXT)))
    padded = 104 * 256 * 4  # [100,200] in tiles of 8 × 128
    assert counted == {"f": 2 * padded, "prefetch": padded, "kernel": 200 * 128 + padded}
    assert traffic.moved(compiled(TEXT)) == sum(counted.values())
    with pytest.raises(ValueError, match="loop is a while"):
        traffic.moved(compiled(TEXT.replace("custom-call(", "while(").replace("kernel", "loop")))


TEXT = """
HloModule m
%inner (p: f32[100,200]) -> f32[100,200] {
  ROOT %n = f32[100,200]{1,0:T(8,128)} negate(%p)
}
ENTRY %main (a: f32[100,200]) -> pred[100,200] {
  %a = f32[100,200]{1,0:T(8,128)} parameter(0)
  %f = f32[100,200]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%inner
  %prefetch = (f32[100,200]{1,0:T(8,128)S(1)}, f32[100,200]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%f)
  %done = f32[100,200]{1,0:T(8,128)S(1)} copy-done(%prefetch)
  ROOT %kernel = pred[100,200]{0,1:T(8,128)(4,1)} custom-call(%done, %f), custom_call_target="x"
}
"""


def test_no_program_is_counted_below_the_least_that_it_could_move():
    """(XLA for CPU sums apart from what it sums. For TPU and H200: docs/kernels.md, from the same functions.)"""
    for name, (f, args) in programs.programs(1280).items():
        moved, least = traffic.moved(jax.jit(f).lower(*args).compile()), programs.least(f, args)
        assert least <= moved <= 3 * least, name


def test_what_cannot_run_or_does_not_fit_is_refused():
    x, line = jnp.zeros((4, 3)), jnp.zeros(4)
    assert all(flow.choose("auto", platform.Device(p, p)) == "xla" for p in ("cpu", "gpu", "tpu"))
    with pytest.raises(ValueError, match="mosaic_tpu cannot run: it needs a TPU, this is cpu"):
        flow.noise(x, x, line, x > 0, impl="mosaic_tpu")
    with pytest.raises(ValueError, match="mosaic_gpu cannot run: it needs (a Hopper GPU|jax)"):
        flow.noise(x, x, line, x > 0, impl="mosaic_gpu")
    with pytest.raises(ValueError, match="'cuda' does not exist"):
        flow.choose("cuda")
    with pytest.raises(ValueError, match="flow_noise: buffers .* differ in shape"):
        flow.noise(x, x[:2], line, x > 0)
    with pytest.raises(ValueError, match="flow_noise: numbers per token"):
        flow.noise(x, x, line[:2], x > 0)
