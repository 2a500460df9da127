"""Grids, weights and the denoising loop, without a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos_jax.sampling import schedules
from cosmos_jax.sampling.generate import denoise


@pytest.mark.parametrize(
    "steps, shift, first, last",
    [
        (35, 10, [999, 996, 993, 990], [483, 377, 227]),
        (4, 5, [999, 937, 833, 624], [937, 833, 624]),
        (50, 3, [999, 992, 985], [111, 57]),
        (35, 3, [999, 989, 979, 969], [219, 153, 81]),
    ],
)
def test_timesteps_of_the_framework(steps, shift, first, last):
    schedule = schedules.unipc(steps, shift)
    t = schedule.timesteps.tolist()
    assert t[: len(first)] == first and t[-len(last) :] == last and len(t) == steps
    assert schedule.timesteps.dtype == np.int64 and schedule.sigmas.dtype == np.float32
    assert schedule.sigmas[-1] == 0 and (np.diff(schedule.sigmas) < 0).all()


def test_euler_is_told_untruncated_timesteps():
    a, b = schedules.euler(35, 10.0), schedules.unipc(35, 10.0)
    np.testing.assert_array_equal(a.sigmas, b.sigmas)
    np.testing.assert_array_equal(np.trunc(a.timesteps), b.timesteps)
    assert (a.timesteps != b.timesteps).any()


@pytest.mark.parametrize("solver", schedules.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 35, 120])
def test_weights_are_finite_and_sum_to_one(solver, steps):
    """A constant is a fixed point of every row: x0 prediction of a clean sample leaves it where it is."""
    schedule = schedules.build(solver, steps, 10.0)
    for table in (schedule.corrector, schedule.predictor):
        assert np.isfinite(table).all()
        np.testing.assert_allclose(table.sum(1), 1.0, atol=1e-12)
    np.testing.assert_array_equal(schedule.predictor[-1], [0, 1, 0])  # the last step returns the predicted x0


@pytest.mark.parametrize("solver", schedules.SOLVERS)
@pytest.mark.parametrize(
    "steps, shift, word", [(0, 5.0, "steps"), (2.5, 5.0, "steps"), (4, 0.0, "shift"), (4, -1.0, "shift")]
)
def test_impossible_settings_are_named(solver, steps, shift, word):
    with pytest.raises(ValueError, match=f"sample.{word}"):
        schedules.build(solver, steps, shift)


def test_unknown_solver_is_named():
    with pytest.raises(ValueError, match="dpm"):
        schedules.build("dpm", 4, 1.0)


@pytest.mark.parametrize("solver", schedules.SOLVERS)
def test_a_straight_flow_is_solved_exactly_in_any_number_of_steps(solver):
    """v = noise − x0 does not depend on x or time: every solver must land on x0."""
    rng = np.random.RandomState(0)
    noise, x0 = rng.standard_normal((2, 5, 3)).astype(np.float32)
    for steps in (1, 4):
        sigma = schedules.build(solver, steps, 5.0).sigmas[0]
        x = {"vision": sigma * noise + (1 - sigma) * x0}
        out = denoise(lambda x, t: {"vision": noise - x0}, x, schedules.build(solver, steps, 5.0))
        np.testing.assert_allclose(out["vision"], x0, atol=2e-6)


def test_unipc_beats_euler_on_a_curved_flow():
    """Gaussian data N(1, 0.5²): the velocity is known in closed form, and so is the exact flow map."""
    mean, std = 1.0, 0.5
    noise = np.random.RandomState(1).standard_normal(256).astype(np.float32)

    def velocity(x, t):
        sigma = t / 1000.0
        variance = sigma**2 + (1 - sigma) ** 2 * std**2
        x0 = mean + (1 - sigma) * std**2 / variance * (x["a"] - (1 - sigma) * mean)
        return {"a": (x["a"] - x0) / sigma}

    def error(solver, steps):
        schedule = schedules.build(solver, steps, 3.0)
        schedule = schedule._replace(timesteps=1000.0 * schedule.sigmas[:-1].astype(np.float64))  # exact times
        s = schedule.sigmas[0]
        want = mean + std * (noise - (1 - s) * mean) / np.sqrt(s**2 + (1 - s) ** 2 * std**2)
        return np.abs(np.asarray(denoise(velocity, {"a": noise}, schedule)["a"]) - want).max()

    assert error("unipc", 128) < 0.4 * error("unipc", 64) < 0.05 * error("euler", 64)  # second order
    assert 0.45 < error("euler", 128) / error("euler", 64) < 0.55  # first order


def test_what_is_not_noisy_never_moves_and_progress_is_reported():
    seen = []
    x = {"vision": jnp.asarray(np.random.RandomState(2).standard_normal((4, 3)), jnp.float32)}
    noisy = {"vision": jnp.asarray([[True], [False], [True], [False]]) & jnp.ones((4, 3), bool)}

    def velocity(x, t):
        return {"vision": 3.0 * x["vision"] + t}

    out, path = denoise(velocity, x, schedules.unipc(6, 5.0), noisy, progress=seen.append, trajectory=True)
    jax.effects_barrier()
    assert sorted(int(i) for i in seen) == list(range(6))
    np.testing.assert_array_equal(out["vision"][1::2], x["vision"][1::2])
    assert path["vision"].shape == (6, 4, 3) and (path["vision"][-1] == out["vision"]).all()
    assert (np.asarray(out["vision"][::2]) != np.asarray(x["vision"][::2])).all()
