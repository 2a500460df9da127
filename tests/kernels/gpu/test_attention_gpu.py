"""The Mosaic GPU backend of packed attention, simulated: it equals the reference wherever anyone may look."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("Mosaic GPU kernels need jax ≥ 0.11 (Python ≥ 3.12)", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as simulation
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels import layouts
from kernels.layouts import assert_close, errors, evaluate, masks, operands, plan_for, poison, truth

from pallas_kernels import platform
from pallas_kernels.attention import gpu_mosaic, segments
from pallas_kernels.attention.gpu import Tiles

# Blocks of 64 queries or keys, more tiles than stages: the rings go round. Time goes with blocks, not with their size.
SMALL = Tiles(rows=32, keys=32, stages=2, dq_keys=64, dq_stages=2, dkv_stages=2)
TWO_ROWS = layouts.layouts(rows=2, und=27, gen=61)
ONE_ROW = layouts.layouts(rows=1, und=53, gen=75)
RACES = plgpu.InterpretGPUParams(detect_races=True)


@pytest.fixture(autouse=True)
def simulated():
    """Shared memory and outputs start as NaN (the simulator's default)."""
    assert plgpu.InterpretGPUParams().uninitialized_memory == "nan"
    with platform.interpreted():
        yield


def planned(m, dtype=jnp.float32, sizes=SMALL):
    return plan_for(m, impl="mosaic_gpu", dtype=jnp.dtype(dtype), tiles=sizes)


def check(m, heads, group, dtype=jnp.float32, dim=128, sizes=SMALL, what=""):
    x = operands(m, heads, group, dim, dtype)
    assert_close(evaluate(x, planned(m, dtype, sizes)), truth(x, m), dtype, what)


@pytest.mark.parametrize("name", TWO_ROWS)
def test_output_and_gradients_equal_the_reference(name):
    check(masks(TWO_ROWS[name])["gen"], 2, 2)


@pytest.mark.parametrize("name", ["padding everywhere, frame-causal", "random limits"])
def test_bfloat16_equals_the_reference_of_the_same_numbers(name):
    check(masks(TWO_ROWS[name])["gen"], 2, 2, jnp.bfloat16)


@pytest.mark.parametrize("which, heads, group, name", [
    ("und", 8, 8, "five samples"), ("causal gen", 4, 4, "one sample"),
    ("causal gen", 4, 4, "one-token samples between long ones"),
])  # fmt: skip
def test_causal_streams_and_groups_equal_the_reference(which, heads, group, name):
    check(masks(ONE_ROW[name])[which], heads, group)


def test_tiles_of_the_chip_and_a_narrow_head_equal_the_reference():
    m = masks(layouts.layouts(rows=1, und=41, gen=151)["five samples"])["gen"]
    check(m, 2, 2, dim=80, sizes=Tiles())


@pytest.mark.parametrize("sizes", [Tiles(), Tiles(rows=8, keys=16, dq_keys=48)], ids=["chip", "odd"])
def test_lists_visit_the_tiles_in_which_something_is_seen_and_no_others(sizes):
    long = layouts.layouts(rows=1, und=101, gen=403)
    cases = [(f"{name}, {which}", m) for name, s in long.items() for which, m in masks(s).items()]
    block = 2 * sizes.rows
    for name, m in cases + [(name, masks(s)["gen"]) for name, s in TWO_ROWS.items()]:
        plan = planned(m, sizes=sizes)
        pairs = np.asarray(segments.visible(plan.flat))
        for visits, queries, keys, transposed in (
            (plan.lists.forward, block, sizes.keys, False),
            (plan.lists.dq, block, sizes.dq_keys, False),
            (plan.lists.dkv, sizes.rows, block, True),
        ):
            tiled = pairs.reshape(len(pairs) // queries, queries, -1, keys)
            seen, whole = (f(f(tiled, 3), 1) for f in (np.any, np.all))
            seen, whole = (seen.T, whole.T) if transposed else (seen, whole)
            counts, index = map(np.asarray, visits)
            np.testing.assert_array_equal(np.sort(index, 1), np.broadcast_to(np.arange(seen.shape[1]), seen.shape))
            for at, (first, last) in enumerate(counts):
                unmasked, visited = index[at, :first], index[at, :last]
                assert whole[at, unmasked].all(), f"{name}: a tile without a mask holds an invisible pair"
                if bool(plan.flat.runs[0]):
                    assert set(visited) == set(np.flatnonzero(seen[at])), name
                else:
                    assert set(visited) >= set(np.flatnonzero(seen[at])), f"{name}: a visible tile is skipped"


def test_what_padding_holds_reaches_nobody():
    m = masks(TWO_ROWS["padding everywhere, frame-causal"])["gen"]
    x, plan = operands(m, 2, 2), planned(m)
    for a, b in zip(evaluate(poison(x, m, np.nan), plan), evaluate(x, plan), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def simulator():
    """Every access to memory with its clock: what is not ordered by barriers, copies and fences is a race."""

    def simulate(x, plan):
        layouts._evaluate.clear_cache()
        with platform.interpreted(RACES):
            got = evaluate(x, plan)
        return got, simulation.get_races().races_found

    yield simulate
    layouts._evaluate.clear_cache()
    simulation.reset_gpu_interpret_mode_state()


@pytest.fixture
def case():
    m = masks(TWO_ROWS["frame-causal, one sample"])["gen"]
    return m, operands(m, 2, 2), planned(m)


def test_no_races_and_every_arrival_is_observed(simulator, case):
    m, x, plan = case
    got, raced = simulator(x, plan)
    assert_close(got, truth(x, m), jnp.float32)
    assert not raced


def test_a_slot_overwritten_too_early_would_be_found(simulator, case, monkeypatch):
    _, x, plan = case

    def impatient(first, last, stages, free, load):
        def fill(step, _):
            load(step, jax.lax.rem(step, stages))
            jax.lax.cond(step >= stages, lambda: plgpu.barrier_wait(free.at[jax.lax.rem(step, stages)]), lambda: None)

        jax.lax.fori_loop(first, last, fill, None)

    monkeypatch.setattr(gpu_mosaic, "produce", impatient)
    try:
        assert simulator(x, plan)[1]
    except jax.errors.JaxRuntimeError as error:  # or so early that a barrier completes twice before anyone looks
        assert "phase" in str(error)


def test_an_arrival_left_unobserved_would_be_found(simulator, case, monkeypatch):
    _, x, plan = case
    monkeypatch.setattr(gpu_mosaic, "drain", lambda steps, stages, *free: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="only observed"):
        simulator(x, plan)


def less(visits, whole=0, visited=0):
    return visits._replace(counts=visits.counts + jnp.array([whole, visited], jnp.int32))


@pytest.mark.parametrize("what, change, shows", [
    ("the last tile not visited", lambda x: dict(forward=less(x.forward, visited=-1)), "o lse"),
    ("the last tile of dq", lambda x: dict(dq=less(x.dq, visited=-1)), "dq"),
    ("the last tile of dk, dv", lambda x: dict(dkv=less(x.dkv, visited=-1)), "dk dv"),
    ("a masked tile taken for whole", lambda x: {n: less(getattr(x, n), whole=1) for n in ("forward", "dq", "dkv")},
     "o lse dq dk dv"),
    ("padding as a sample", lambda x: dict(q_ids=jnp.maximum(x.q_ids, -1)), "lse"),
], ids=lambda x: x if isinstance(x, str) and " " in x else "")  # fmt: skip
def test_a_broken_list_would_be_found(what, change, shows):
    m = masks(TWO_ROWS["trailing padding"])["gen"]
    x, plan = operands(m, 2, 2), planned(m)
    found = errors(evaluate(x, dataclasses.replace(plan, lists=plan.lists._replace(**change(plan.lists)))), truth(x, m))
    assert all(found[name] > 10 * layouts.TOLERANCE["float32"] for name in shows.split()), found


def test_heads_wider_than_the_kernels_are_refused():
    m = masks(ONE_ROW["one sample"])["und"]
    with pytest.raises(ValueError, match="head_dim"):
        evaluate(operands(m, 2, 2, dim=160), planned(m))
