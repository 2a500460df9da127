"""The Mosaic TPU backend of packed attention, simulated: it equals the reference wherever anyone may look."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from kernels import layouts
from kernels.layouts import assert_close, errors, evaluate, masks, operands, plan_for, poison, truth

from pallas_kernels import platform
from pallas_kernels.attention import segments, tpu, tpu_lists
from pallas_kernels.attention.tpu_lists import Tiles

SMALL = Tiles(128, 128)
TWO_ROWS = layouts.layouts(rows=2, und=61, gen=203)
ONE_ROW = layouts.layouts(rows=1, und=53, gen=150)


@pytest.fixture(autouse=True, scope="module")
def simulated():
    with platform.interpreted():
        yield


def planned(m, dtype=jnp.float32, sizes=SMALL):
    return plan_for(m, impl="mosaic_tpu", dtype=jnp.dtype(dtype), tiles=sizes)


def check(m, heads, group, dtype=jnp.float32, dim=128, sizes=SMALL, what=""):
    x = operands(m, heads, group, dim, dtype)
    assert_close(evaluate(x, planned(m, dtype, sizes)), truth(x, m), dtype, what)


@pytest.mark.parametrize("name", TWO_ROWS)
def test_output_and_gradients_equal_the_reference(name):
    check(masks(TWO_ROWS[name])["gen"], 4, 2)


@pytest.mark.parametrize("name", TWO_ROWS)
def test_bfloat16_equals_the_reference_of_the_same_numbers(name):
    check(masks(TWO_ROWS[name])["gen"], 4, 2, jnp.bfloat16)


def test_causal_attention_equals_the_reference():
    for name, s in ONE_ROW.items():
        check(masks(s)["causal gen"], 8, 4, what=name)


def test_tiles_of_unequal_sides_and_ragged_chunks_equal_the_reference():
    for name in ("padding everywhere, frame-causal", "unsorted"):
        check(masks(ONE_ROW[name])["gen"], 8, 8, dim=80, sizes=Tiles(256, 384, chunk=256), what=name)


def test_lists_visit_the_tiles_in_which_something_is_seen_and_no_others():
    long = layouts.layouts(rows=1, und=301, gen=1403)
    cases = [(f"{name}, {which}", m) for name, s in long.items() for which, m in masks(s).items() if which != "und"]
    for name, m in cases + [(name, masks(s)["gen"]) for name, s in TWO_ROWS.items()]:
        plan = planned(m)
        seen = np.asarray(segments.visible(plan.flat, 128, 128))
        for entries, steps, axis in (
            (plan.lists.by_query, plan.lists.query_steps, 0),
            (plan.lists.by_key, plan.lists.key_steps, 1),
        ):
            found = tpu_lists.read(np.asarray(entries)[: int(steps[0])])
            outer, inner = (found.query, found.key) if axis == 0 else (found.key, found.query)
            assert (np.diff(outer * 10**6 + inner) > 0).all(), f"{name}: out of order"
            assert set(outer) == set(range(seen.shape[axis])), f"{name}: an output is not written"
            np.testing.assert_array_equal(found.first, np.diff(outer, prepend=-1) != 0)
            np.testing.assert_array_equal(found.last, np.diff(outer, append=-1) != 0)
            computed = np.zeros_like(seen)
            computed[found.query, found.key] = found.full | found.some
            if bool(plan.flat.runs[0]):
                np.testing.assert_array_equal(computed, seen, name)
            else:
                assert not (seen & ~computed).any(), f"{name}: a visible tile is skipped"


def test_what_padding_holds_reaches_nobody():
    m = masks(TWO_ROWS["padding everywhere, frame-causal"])["gen"]
    x, plan = operands(m, 4, 2), planned(m)
    clean = evaluate(x, plan)
    for value in (np.nan, np.inf, 3e38):
        for a, b in zip(evaluate(poison(x, m, value), plan), clean, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def simulator():
    """Memory that starts as NaN, transfers that happen late, two cores that share the heads, and their races."""

    def simulate(x, plan, run=evaluate):
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulation

        layouts._evaluate.clear_cache()
        with platform.interpreted(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
            return jax.block_until_ready(run(x, plan)), simulation.races.races_found

    yield simulate
    layouts._evaluate.clear_cache()
    pltpu.reset_tpu_interpret_mode_state()


def test_no_races_and_no_uninitialised_memory(simulator):
    m = masks(ONE_ROW["padding everywhere, frame-causal"])["gen"]
    x = operands(m, 4, 2)
    got, raced = simulator(x, planned(m))
    assert_close(got, truth(x, m), jnp.float32)
    assert not raced


def test_a_race_would_be_found(simulator):
    def run(x, plan):
        def kernel(x, o):
            o[...] = x[...]

        same = pl.BlockSpec((8, 128), lambda i: (0, 0))  # both cores write there
        params = pltpu.CompilerParams(dimension_semantics=("parallel",))
        return pl.pallas_call(
            kernel,
            x,
            grid=(2,),
            in_specs=[same],
            out_specs=same,
            compiler_params=params,
            interpret=platform.interpreting(),
        )(x)

    assert simulator(jnp.zeros((8, 128)), None, run)[1]


def broken(plan, what):
    """A plan with one thing wrong, and the results that must show it."""
    lists = plan.lists
    full = (lists.by_query >> 2 & 3) == segments.ALL
    some = (lists.by_query >> 2 & 3) == segments.SOME
    change, shows = {
        "a tile not computed": ({"by_query": lists.by_query.at[1].set(lists.by_query[1] & ~12)}, "o lse dq"),
        "a tile of keys not computed": ({"by_key": lists.by_key.at[1].set(lists.by_key[1] & ~12)}, "dk dv"),
        "masked tiles taken for full": (
            {"by_query": jnp.where(some, lists.by_query ^ (segments.ALL ^ segments.SOME) << 2, lists.by_query)},
            "o lse dq",
        ),
        "no limit": ({"limit": jnp.full_like(lists.limit, 2**30)}, "o lse dq"),
        "no first tile": ({"by_query": lists.by_query & ~1}, "o lse dq"),
        "no first tile of keys": ({"by_key": lists.by_key & ~1}, "dk dv"),
        "a list too short": ({"query_steps": lists.query_steps - 1}, "o lse dq"),
        "padding as a sample": ({"q_ids": jnp.where(lists.q_ids < 0, -1, lists.q_ids)}, "lse"),
    }[what]
    assert full.any() or some.any()
    return dataclasses.replace(plan, lists=lists._replace(**change)), shows.split()


@pytest.mark.parametrize(
    "what",
    [
        "a tile not computed", "a tile of keys not computed", "masked tiles taken for full", "no limit",
        "no first tile", "no first tile of keys", "a list too short", "padding as a sample",
    ],
)  # fmt: skip
def test_a_broken_list_would_be_found(what):
    m = masks(TWO_ROWS["padding everywhere, frame-causal"])["gen"]
    x, plan = operands(m, 4, 2), planned(m)
    wrong, shows = broken(plan, what)
    found = errors(evaluate(x, wrong), truth(x, m))
    assert all(found[name] > 10 * layouts.TOLERANCE["float32"] for name in shows), found


def test_a_dropped_gradient_of_the_log_sum_exp_would_be_found():
    m = masks(TWO_ROWS["frame-causal"])["gen"]
    x = operands(m, 4, 2)
    found = errors(evaluate(x._replace(dlse=jnp.zeros_like(x.dlse)), planned(m)), truth(x, m))
    assert found["dq"] > 1e-2 and found["dk"] > 1e-2, found


@pytest.mark.parametrize(
    "queries, keys, want",
    [(1, 1, (128, 128)), (300, 300, (384, 384)), (1100, 1400, (640, 768)), (44_160, 44_460, (1024, 1024))],
)
def test_tiles_fit_the_buffer(queries, keys, want):
    assert tpu.tiles(queries, keys, "TPU v5p").pad == want


def test_memory_follows_the_chip():
    assert tpu.tiles(4096, 4096, "TPU v6 lite").vmem > tpu.tiles(4096, 4096, "TPU7x").vmem


def test_buffers_beyond_a_list_are_refused():
    assert tpu.tiles(500_000, 500_000, "TPU v5p").pad[1] > 1024
    with pytest.raises(ValueError, match="context parallel"):
        tpu.tiles(2_000_000, 2_000_000, "TPU v5p")
    flat = jax.eval_shape(
        lambda m: segments.flatten(m, 128, 128), masks(layouts.layouts(1, 100, 60_000)["one sample"])["gen"]
    )
    with pytest.raises(ValueError, match="too many"):
        tpu.plan(flat, SMALL)
