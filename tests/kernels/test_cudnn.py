"""The cuDNN backend without a GPU: the call itself is stood in for, everything around it is real."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as internal

import pallas_kernels.attention as kernels
from pallas_kernels import platform
from pallas_kernels.attention import Segments, attention, context, cudnn, fused, make_plan, reference
from pallas_kernels.attention.segments import Masks, full_masks, gen_masks, und_masks

H200 = platform.Device("gpu", "NVIDIA H200")
NEW = jax.__version_info__ >= (0, 11)


def by_offsets(q, k, v, q_lengths, k_lengths, q_starts, k_starts, packing, scale):
    """What cuDNN promises of its arguments, in formulas; whatever it does not write, gradients too, is NaN."""

    def places(starts, lengths, count):  # [B,T] → number of the sample, −1 for none; position in it
        starts, at = starts[:, : lengths.shape[1], None], jnp.arange(count)
        inside = (starts >= 0) & (starts <= at) & (at < starts + lengths[:, :, None])
        sample = jnp.where(inside.any(1), inside.argmax(1), -1)
        return sample, (jnp.where(inside, at - starts, 0)).sum(1)

    if packing.samples == 1:
        q_starts, k_starts = (jnp.where(x >= 0, 0, x) for x in (q_starts, k_starts))
    (q_ids, q_at), (k_ids, k_at) = places(q_starts, q_lengths, q.shape[1]), places(k_starts, k_lengths, k.shape[1])
    seen = reference.same_segment(q_ids, k_ids)
    if packing.causal:
        seen &= q_at[:, :, None] >= k_at[:, None]

    def unwritten(x, ids):
        return jnp.where((ids < 0)[:, :, None, None], jnp.nan, x)

    @jax.custom_vjp
    def call(q, k, v):
        return unwritten(reference.attend(q, [(k, v, seen)], scale, None)[0], q_ids)

    def backward(saved, do):
        _, back = jax.vjp(lambda q, k, v: reference.attend(q, [(k, v, seen)], scale, None)[0], *saved)
        return tuple(unwritten(x, ids) for x, ids in zip(back(do), (q_ids, k_ids, k_ids), strict=True))

    call.defvjp(lambda q, k, v: (call(q, k, v), (q, k, v)), backward)
    return call(q, k, v)


@pytest.fixture
def here(monkeypatch):
    """As if this were an H200 with its cuDNN."""
    monkeypatch.setattr(cudnn, "_call", by_offsets)
    monkeypatch.setattr(cudnn, "refusal", lambda *_: None)


IDS = {  # und [2,6], gen [2,9]
    "runs and padding": ([0, 0, 1, 1, 2, -1], [0, 0, 0, 1, -1, 2, 2, 2, -1]),
    "one sample": ([0] * 6, [0] * 9),
    "samples without und or gen": ([0, 0, 2, 2, 3, 3], [0, 1, 1, 1, 3, 3, 4, 4, 4]),
    "ids that fall": ([0, 1, 2, 0, 1, 2], [2, 2, 1, 0, -1, 0, 1, 2, 2]),
    "padding alone": ([-1] * 6, [-1] * 9),
}


def operands(rows=2, seed=0):
    random = np.random.default_rng(seed)

    def normal(tokens, heads):
        return jnp.asarray(random.standard_normal((rows, tokens, heads, 16)), jnp.float32)

    return normal(6, 4), normal(6, 2), normal(6, 2), normal(9, 4), normal(9, 2), normal(9, 2)


@functools.partial(jax.jit, static_argnames=("causal", "samples"))
def both(q, k, v, masks, causal=False, samples=None):
    """(o, dq, dk, dv) of cudnn and of xla."""
    do = jnp.sin(jnp.arange(q.size)).reshape(q.shape)

    def results(**how):
        plan = make_plan(masks, causal=causal, samples=samples, **how)
        assert plan.backend == how["impl"]
        out, back = jax.vjp(lambda *x: attention(*x, plan, scale=0.3), q, k, v)
        return jax.tree.leaves((out, back(do)))

    return results(impl="cudnn"), results(impl="xla")


@pytest.mark.parametrize("of", ["und", "gen", "gen over und alone", "full"])
@pytest.mark.parametrize("case", IDS)
def test_sorted_samples_equal_the_reference(here, case, of):
    """Output and gradients; a row of the case beside another row."""
    s = Segments(*(jnp.array([x, y], jnp.int32) for x, y in zip(IDS[case], IDS["runs and padding"], strict=True)))
    q_und, k_und, v_und, q_gen, k_gen, v_gen = operands()
    if of == "und":
        got, want = both(q_und, (k_und,), (v_und,), und_masks(s), causal=True)
    elif of == "full":
        got, want = both(q_gen, (k_gen,), (v_gen,), full_masks(s.gen))
    elif of == "gen":
        got, want = both(q_gen, (k_und, k_gen), (v_und, v_gen), gen_masks(s))
    else:  # some queries see nothing
        got, want = both(q_gen, (k_und,), (v_und,), Masks(s.gen, (s.und,), (None,)))
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-3)
        assert not a[np.asarray(b) == 0].any()


def test_one_sample_in_a_row_is_dense(here):
    """Where some keys belong to nobody, and come first."""
    s = Segments(jnp.array([[0, 0, 1, 1, -1, 2]] * 2), jnp.array([[-1, 1, 1, 1, 1, 1, 1, 1, -1]] * 2))
    _, k_und, v_und, q, k, v = operands()
    got, want = both(q, (k_und, k), (v_und, v), gen_masks(s), samples=1)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_more_samples_than_planned_come_out_as_nan(here):
    q, k, v, *_ = operands()
    (out, *_), _ = both(q, (k,), (v,), full_masks(jnp.array([[0, 0, 1, 1, 2, -1], [0, 0, 0, 1, 1, 1]])), samples=2)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_what_it_cannot_do_is_refused(here):
    ids = jnp.array([[0, 0, 0, 1, 1, 1]])
    q, k, v, *_ = operands(rows=1)
    with pytest.raises(ValueError, match="cudnn knows no key limits"):
        kernels.gen_plan(Segments(ids, ids, ids), impl="cudnn")
    plan = jax.eval_shape(lambda: kernels.full_plan(ids, impl="cudnn"))
    with pytest.raises(ValueError, match="cudnn gives no log-sum-exp: jax drops its cotangent"):
        jax.eval_shape(functools.partial(attention, scale=0.3, return_lse=True), q, k, v, plan)
    mesh = jax.make_mesh((1,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    ring = jax.shard_map(
        lambda ids: context.plan(Segments(ids, ids), axis="cp", how="ring", impl="cudnn"),
        mesh=mesh, in_specs=jax.P(), out_specs=jax.P("cp"), check_vma=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="by ring merges by log-sum-exp, and cudnn gives none"):
        jax.eval_shape(ring, ids)


def test_where_it_cannot_run_is_said():
    why = {name: cudnn.refusal(*x) for name, x in {
        "fine": (jnp.bfloat16, H200), "cpu": (jnp.bfloat16, platform.Device("cpu", "cpu")),
        "ampere": (jnp.bfloat16, platform.Device("gpu", "NVIDIA A100")), "float32": (jnp.float32, H200),
    }.items()}  # fmt: skip
    if NEW:
        assert why["fine"] is None and "sm_90" in why["cpu"] and "A100" in why["ampere"] and "float32" in why["float32"]
    else:
        assert all("jax ≥ 0.11" in x for x in why.values())
    with pytest.raises(ValueError, match="attention backend cudnn cannot run: "):
        kernels.choose("cudnn")
    with platform.interpreted(), pytest.raises(ValueError, match="cudnn cannot run: (nothing simulates|it needs jax)"):
        kernels.choose("cudnn")
    assert "cudnn" not in kernels.choose("auto", device=H200)[0] and "cudnn" not in fused.DEFAULT["gpu"]


def test_jax_drops_the_cotangent_of_its_log_sum_exp(monkeypatch):
    """The trap for which `return_lse` is refused: the day that it is gone, this fails and the refusal can go."""
    given = []

    class Recorder:
        def bind(self, *operands, **_):
            given.extend(operands)
            return operands[:3]

    monkeypatch.setattr(internal, "_dot_product_attention_bwd_p_wrapper", Recorder())
    rule = internal._dot_product_attention_bwd_rule
    options = dict.fromkeys(list(inspect.signature(rule).parameters)[:-2])
    saved, do, dlse = tuple(np.full(3, float(i)) for i in range(12)), np.full(3, 12.0), np.full(3, 13.0)
    rule(**options | {"return_residual": True}, res=saved, grad_output=(do, dlse))
    assert any(x is do for x in given) and not any(x is dlse for x in given)


def test_jax_below_0_11_misplaces_keys_of_grouped_heads():
    """The reason why older versions are refused: offsets of keys count the query's heads."""
    q, k = np.zeros((1, 8, 4, 16)), np.zeros((1, 8, 2, 16))
    lengths, starts = jnp.array([[3, 5]]), jnp.array([[0, 3, -1]])
    _, _, q_starts, k_starts = jax.jit(internal._fix_seqlen_offsets)(lengths, lengths, starts, starts, q, k)
    assert q_starts[0, 1] == 3 * 4 * 16 and k_starts[0, 1] == 3 * (2 if NEW else 4) * 16
