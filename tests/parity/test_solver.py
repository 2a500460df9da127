"""The UniPC solver equals diffusers' on recorded velocities (parity protocol §4.3: 1.5e-6), and mistakes in it show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from parity import oracle

from cosmos_jax.sampling import generate, schedules

W = np.random.RandomState(0).standard_normal((16, 16)).astype(np.float32) / 4
X = np.random.RandomState(1).standard_normal((6, 16)).astype(np.float32)


def field(x, t):
    """A cheap smooth velocity that depends on the sample and on the timestep."""
    return torch.tanh(x @ torch.from_numpy(W)) * (0.5 + t / 1000.0) - 0.3 * x


def diffusers_unipc(steps, shift, **kw):
    """diffusers' solver on the framework's grid (its own pipelines pass `sigmas` for the native flow schedule)."""
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **kw)
    solver.set_timesteps(steps, sigmas=np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1])
    return solver


def run_diffusers(solver):
    """The reference's trajectory [N,…] and the velocities it was fed."""
    x, path, velocities = torch.from_numpy(X), [], []
    for t in solver.timesteps:
        velocities.append(field(x, float(t)))
        x = solver.step(velocities[-1][None], t, x[None], return_dict=False)[0][0]
        path.append(x)
    return torch.stack(path).numpy(), torch.stack(velocities).numpy()


@jax.jit
def replay(schedule_rows, velocities):
    """Our solver on recorded velocities."""

    def body(state, xs):
        state = generate.solver_step(state, {"x": xs[0]}, xs[1])
        return state, state.x["x"]

    return jax.lax.scan(body, generate.start({"x": X}), (velocities, schedule_rows))[1]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 35])
@pytest.mark.parametrize("shift", [3.0, 5.0, 10.0])
def test_solver_equals_diffusers_on_its_recorded_velocities(steps, shift):
    solver, ours = diffusers_unipc(steps, shift), schedules.unipc(steps, shift)
    np.testing.assert_array_equal(ours.sigmas, solver.sigmas.numpy())
    np.testing.assert_array_equal(ours.timesteps, solver.timesteps.numpy())
    path, velocities = run_diffusers(solver)
    for step, (a, b) in enumerate(zip(replay(ours.rows(), velocities), path, strict=True)):
        assert oracle.relative(a, b)[0] <= 1.5e-6, step


def free_run(schedule, **changes):
    def velocity(x, t):
        return jnp.tanh(x @ W) * (0.5 + t / 1000.0) - 0.3 * x

    return np.asarray(generate.denoise(velocity, X, schedule._replace(**changes)))


def test_plausible_mistakes_of_the_solver_are_visible():
    """Each is far above the 1.5e-6 that separates us from diffusers (magnitudes: protocol §4.2)."""
    good = schedules.unipc(35, 10.0)
    want = run_diffusers(diffusers_unipc(35, 10.0))[0][-1]
    mistakes = {
        "none": ({}, 0.0, 1.5e-6),
        "float timesteps": (dict(timesteps=1000.0 * good.sigmas[:-1]), 1e-4, 1e-3),
        "no corrector": (dict(corrector=np.tile([1.0, 0, 0, 0, 0], (35, 1))), 1e-4, 5e-3),
        "euler": (schedules.euler(35, 10.0)._asdict() | dict(timesteps=good.timesteps), 3e-3, 5e-2),
    }
    for name, (changes, low, high) in mistakes.items():
        error = oracle.relative(free_run(good, **changes), want)[0]
        assert low <= error <= high, f"{name}: {error:.2e}"
