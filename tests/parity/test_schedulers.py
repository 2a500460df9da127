"""Every scheduler that a Cosmos 3 checkpoint names equals diffusers' (protocol §4.3: 1.5e-6), and mistakes show.

The reference steps through its own objects; ours comes from the same `scheduler_config.json` through `from_config`.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from parity import oracle, test_sampling

from cosmos_jax.flow import shift_sigma
from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import generate, scheduler_config, schedules
from cosmos_jax.sampling.scheduler_config import from_config

TRAJECTORY = 1.5e-6  # relL2
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
KARRAS = dict(FLOW, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.147)  # Nano, Super
RELEASED = [1.0, 0.9375, 0.8333333333333334, 0.625]  # the 4-step checkpoints
X = np.random.RandomState(1).standard_normal((6, 16)).astype(np.float32)
W = np.random.RandomState(0).standard_normal((16, 16)).astype(np.float32) / 4
FIELDS = {  # velocity of (x, timestep), in the array library `np`
    "linear": lambda np, x, w, t: x @ w * (0.5 + t / 1000.0) - 0.3 * x,
    "nonlinear": lambda np, x, w, t: np.tanh(x @ w) * (0.5 + t / 1000.0) - 0.3 * x,
}


def saved(scheduler) -> dict:
    """The dict of the `scheduler_config.json` that diffusers writes, lists and all."""
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    return config | {"_class_name": type(scheduler).__name__, "_diffusers_version": "0.42.1"}


def unipc(steps=35, native=False, **config):
    scheduler = UniPCMultistepScheduler(**config)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1 - 1 / 1000, 0.0, steps + 1)[:-1] if native else None)
    return scheduler, from_config(saved(scheduler), steps, native=native)


def euler(steps=35, **config):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    return scheduler, from_config(saved(scheduler), steps)


def distilled_config(sample_type="sde", **changes):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=sample_type == "sde")
    fixed = {"t_list": RELEASED, "sample_type": sample_type}
    own = {"fixed_step_sampler_config": fixed, "fixed_step_requires_explicit_sigmas": True}
    return saved(scheduler) | own | changes


def distilled(sample_type):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=sample_type == "sde")
    scheduler.set_timesteps(sigmas=RELEASED)
    return scheduler, from_config(distilled_config(sample_type), 4)


CASES = {
    "karras": lambda: unipc(**KARRAS),
    "karras, 8 steps": lambda: unipc(8, **KARRAS),
    "karras, 1 step": lambda: unipc(1, **KARRAS),
    "karras, native grid asked for": lambda: unipc(native=True, **KARRAS),
    "flow, shift 1": lambda: unipc(**FLOW),
    "flow, shift 10": lambda: unipc(**FLOW, flow_shift=10.0),
    "flow, shift 3, native": lambda: unipc(native=True, **FLOW, flow_shift=3.0),
    "flow, shift 10, native, 50 steps": lambda: unipc(50, native=True, **FLOW, flow_shift=10.0),
    "flow, order 1": lambda: unipc(**FLOW, flow_shift=5.0, solver_order=1),
    "flow, corrector off": lambda: unipc(**FLOW, flow_shift=5.0, disable_corrector=[0, 1, 7]),
    "euler, shift 1": lambda: euler(),
    "euler, shift 3": lambda: euler(shift=3.0),
    "euler, shift 10, 7 steps": lambda: euler(7, shift=10.0),
    "euler, 1 step": lambda: euler(1, shift=10.0),
    "noise in every step, shift 5": lambda: euler(shift=5.0, stochastic_sampling=True),
    "distilled SDE": lambda: distilled("sde"),
    "distilled ODE": lambda: distilled("ode"),
}


@functools.cache
def case(name):
    """The reference's sigmas, timesteps, and per field its path [N,…] and the velocities it was fed; our schedule."""
    scheduler, (schedule, line) = CASES[name]()
    runs = {}
    for kind, field in FIELDS.items():
        x, path, velocities = torch.from_numpy(X), [], []
        extra = {"generator": torch.Generator().manual_seed(7)} if schedule.noise is not None else {}
        solver = copy.deepcopy(scheduler)
        solver.set_begin_index(0)  # or it would start at the second of two equal timesteps
        for t in solver.timesteps:
            velocities.append(field(torch, x, torch.from_numpy(W), float(t)))
            x = solver.step(velocities[-1][None], t, x[None], return_dict=False, **extra)[0][0]
            path.append(x)
        runs[kind] = torch.stack(path).numpy(), torch.stack(velocities).numpy()
    return scheduler.sigmas.numpy(), scheduler.timesteps.numpy(), runs, schedule, line


def drawn(count):
    """What diffusers draws from a generator seeded with 7, one [1,6,16] after the other."""
    generator = torch.Generator().manual_seed(7)
    return np.concatenate([torch.randn((1, *X.shape), generator=generator).numpy() for _ in range(count)])


@jax.jit
def replay(rows, velocities, noise):
    """Our solver on recorded velocities."""

    def body(state, xs):
        state = generate.solver_step(state, {"x": xs[0]}, xs[1], {"x": xs[2]})
        return state, state.x["x"]

    return jax.lax.scan(body, generate.start({"x": X}), (velocities, rows, noise))[1]


def free_run(schedule, kind):
    noise = drawn(schedule.steps)
    fresh = None if schedule.noise is None else lambda i: jnp.asarray(noise)[i]
    field = FIELDS[kind]
    return np.asarray(generate.denoise(lambda x, t: field(jnp, x, W, t), jnp.asarray(X), schedule, fresh=fresh))


@pytest.mark.parametrize("name", CASES)
def test_sigmas_and_timesteps_are_diffusers_own(name):
    sigmas, timesteps, _, schedule, line = case(name)
    np.testing.assert_array_equal(schedule.sigmas, sigmas)
    np.testing.assert_array_equal(schedule.timesteps, timesteps)
    assert schedule.sigmas.dtype == np.float32 and "\n" not in line
    for word in ("Scheduler: ", f", {schedule.steps} step", f"timestep {timesteps[0]:.6g}"):
        assert word in line


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", CASES)
def test_each_step_equals_diffusers_on_recorded_velocities(name, kind):
    _, _, runs, schedule, _ = case(name)
    path, velocities = runs[kind]
    for step, (a, b) in enumerate(zip(replay(schedule.rows(), velocities, drawn(len(path))), path, strict=True)):
        assert oracle.relative(a, b)[0] <= TRAJECTORY, step


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("name", CASES)
def test_running_free_ends_where_diffusers_ends(name, kind):
    _, _, runs, schedule, _ = case(name)
    assert oracle.relative(free_run(schedule, kind), runs[kind][0][-1])[0] <= TRAJECTORY


def mistakes(name, good):
    """Plausible wrong schedules: name of the mistake → schedule."""
    grid, steps = good.sigmas.astype(np.float64), good.steps
    if name in ("karras", "flow, shift 10"):
        other = KARRAS if name != "karras" else dict(FLOW, flow_shift=10.0)
        return {
            "timesteps not truncated": good._replace(timesteps=1000.0 * grid[:-1]),
            "no corrector": good._replace(corrector=np.tile([1.0, 0, 0, 0, 0], (steps, 1))),
            "order 1": schedules.multistep(grid, max_order=1),
            "the other one's sigmas": from_config(saved(UniPCMultistepScheduler(**other)), steps)[0],
            "the framework's sigmas": schedules.unipc(steps, 10.0 if name != "karras" else 5.0),
            "Euler": schedules.single_step(good.sigmas, good.timesteps),
        }
    wrong = {"truncated timesteps": good._replace(timesteps=np.trunc(good.timesteps))}
    ode = schedules.single_step(good.sigmas, good.timesteps)
    if name == "euler, shift 3":
        wrong["shifted once"] = schedules.euler(steps, 3.0)
    elif name == "distilled ODE":
        again = shift_sigma(good.sigmas, 5.0)
        wrong["fresh noise"] = schedules.renoising(good.sigmas, good.timesteps)
        wrong["shift 5 once more"] = schedules.single_step(again, 1000.0 * again[:-1])
    else:
        keep = np.stack([0 * grid[1:], 1 - grid[:-1], 0 * grid[1:]], 1)
        wrong["no fresh noise"] = ode
        wrong["noise of this sigma, not of the next"] = good._replace(noise=grid[:-1])
        wrong["clean latent of this sigma, not of the next"] = good._replace(predictor=keep)
        wrong["noise on top of an Euler step"] = ode._replace(noise=good.noise)
    return wrong


@pytest.mark.parametrize("name", ["karras", "flow, shift 10", "euler, shift 3", "distilled SDE", "distilled ODE"])
def test_plausible_mistakes_are_far_above_the_threshold(name):
    _, _, runs, schedule, _ = case(name)
    for mistake, wrong in mistakes(name, schedule).items():
        error = oracle.relative(free_run(wrong, "nonlinear"), runs["nonlinear"][0][-1])[0]
        assert error > 20 * TRAJECTORY, f"{mistake}: {error:.2e}"


def test_a_wrong_exponent_of_karras_shows(monkeypatch):
    sigmas, *_ = case("karras")
    monkeypatch.setattr(scheduler_config, "KARRAS_RHO", 5)
    wrong = from_config(saved(UniPCMultistepScheduler(**KARRAS)), 35)[0]
    assert np.abs(wrong.sigmas - sigmas).max() > 1e-3


def test_a_first_sigma_of_one_would_be_infinite(monkeypatch):
    monkeypatch.setattr(scheduler_config, "BELOW_ONE", 0.0)
    with pytest.raises(ValueError, match="first sigma"):
        from_config(saved(UniPCMultistepScheduler(**FLOW)), 35)


def test_edge_uses_the_grid_of_the_framework():
    """Its class is in no diffusers release; that grid is checked against diffusers' solver in test_solver.py."""
    config = saved(UniPCMultistepScheduler(**FLOW, flow_shift=3.0)) | {"_class_name": scheduler_config.EDGE}
    for shift, want in ((None, 3.0), (10.0, 10.0)):
        ours, line = from_config(config, 35, shift)
        for a, b in zip(ours, schedules.unipc(35, want), strict=True):
            np.testing.assert_array_equal(a, b)
        assert f"native grid, flow shift {want:g}" in line


def test_an_override_of_the_shift_is_what_the_file_would_have_said():
    stock, fixed = saved(UniPCMultistepScheduler(**FLOW)), saved(UniPCMultistepScheduler(**FLOW, flow_shift=10.0))
    np.testing.assert_array_equal(from_config(stock, 35, 10.0)[0].sigmas, from_config(fixed, 35)[0].sigmas)
    one, other = (saved(FlowMatchEulerDiscreteScheduler(shift=s)) for s in (1.0, 3.0))
    np.testing.assert_array_equal(from_config(one, 9, 3.0)[0].sigmas, from_config(other, 9)[0].sigmas)


def test_the_list_of_a_distilled_checkpoint_may_come_from_the_pipeline():
    plain = saved(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    ours, line = from_config(plain, None, sigmas=RELEASED)
    np.testing.assert_array_equal(ours.sigmas, from_config(distilled_config(), None)[0].sigmas)
    assert ours.timesteps.tolist() == [1000.0, 937.5, float(np.float32(833.3333)), 625.0] and "SDE" in line


UNIPC, EULER = saved(UniPCMultistepScheduler(**FLOW)), saved(FlowMatchEulerDiscreteScheduler())
REFUSED = [
    (UNIPC | {"_class_name": "DPMSolverMultistepScheduler"}, {}, "DPMSolver"),
    ({}, {}, "_class_name=None"),
    (UNIPC | {"flow_shfit": 3.0}, {}, "flow_shfit"),
    (UNIPC | {"solver_order": 3}, {}, "solver_order=3"),
    (UNIPC | {"solver_type": "bh1"}, {}, "solver_type='bh1'"),
    (UNIPC | {"prediction_type": "epsilon"}, {}, "prediction_type='epsilon'"),
    ({k: v for k, v in UNIPC.items() if k != "use_flow_sigmas"}, {}, "use_flow_sigmas is missing"),
    (UNIPC | {"lower_order_final": False}, {}, "lower_order_final"),
    (UNIPC | {"final_sigmas_type": "sigma_min"}, {}, "final_sigmas_type"),
    (UNIPC | {"use_exponential_sigmas": True}, {}, "use_exponential_sigmas"),
    (UNIPC | {"use_dynamic_shifting": True}, {}, "use_dynamic_shifting"),
    (UNIPC | {"use_karras_sigmas": True}, {}, "sigma_min=None"),
    (UNIPC | {"num_train_timesteps": 0}, {}, "num_train_timesteps"),
    (UNIPC | {"flow_shift": 0.0}, {}, "shift"),
    (UNIPC, {"steps": None}, "number of steps"),
    (UNIPC, {"steps": 0}, "steps"),
    (UNIPC, {"sigmas": RELEASED}, "distilled_sigmas"),
    (saved(UniPCMultistepScheduler(**KARRAS)), {"shift": 10.0}, "use_karras_sigmas"),
    (saved(UniPCMultistepScheduler(**KARRAS)) | {"_class_name": scheduler_config.EDGE}, {}, "use_karras_sigmas"),
    (EULER | {"invert_sigmas": True}, {}, "invert_sigmas"),
    (EULER | {"flow_shift": 3.0}, {}, "flow_shift"),
    (EULER, {"native": True}, "use_native_flow_schedule"),
    (EULER, {"steps": None}, "number of steps"),
    (EULER | {"fixed_step_requires_explicit_sigmas": True}, {}, "fixed_step_requires_explicit_sigmas"),
    (distilled_config(), {"steps": 35}, "distilled to 4"),
    (distilled_config(), {"steps": 4, "shift": 5.0}, "shift=5.0"),
    (distilled_config(), {"steps": 4, "sigmas": [1.0, 0.5]}, "contradict"),
    (distilled_config(stochastic_sampling=False), {"steps": 4}, "sample_type='sde'"),
    (distilled_config(fixed_step_sampler_config={"t_list": RELEASED}), {"steps": 4}, "sample_type"),
    (saved(FlowMatchEulerDiscreteScheduler()), {"steps": 2, "sigmas": [0.5, 1.0]}, "decrease"),
]


@pytest.mark.parametrize("config, arguments, word", REFUSED)
def test_what_is_not_honoured_is_named(config, arguments, word):
    with pytest.raises(ValueError, match=word) as error:
        from_config(config, **({"steps": 35} | arguments))
    assert "\n" not in str(error.value)


def test_a_distilled_model_draws_reproducible_noise_and_keeps_conditions():
    _, cfg, params = test_sampling.tiny()
    _, (batch, _) = test_sampling.branches(cfg)
    schedule, _ = from_config(distilled_config(), None)

    def sample(seed):
        out = generate.sample_latents(
            params, cfg, batch, test_sampling.noise_of(batch), schedule, key=jax.random.key(seed), precision=HIGHEST
        )
        return {k: np.asarray(v) for k, v in out.items()}

    a, b, c = sample(0), sample(0), sample(1)
    for name in a:
        noisy = batch[f"{name}_noisy"]
        np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_array_equal(a[name][~noisy], batch[f"{name}_x0"][~noisy])
        assert oracle.relative(a[name][noisy], c[name][noisy])[0] > 0.01 and np.isfinite(a[name]).all()


def test_a_stochastic_schedule_without_noise_is_refused():
    schedule, _ = from_config(distilled_config(), 4)
    with pytest.raises(ValueError, match="fresh noise"):
        generate.denoise(lambda x, t: x, jnp.asarray(X), schedule)
    with pytest.raises(ValueError, match="key"):
        generate.sample_latents({}, None, {}, {}, schedule, precision=HIGHEST)
