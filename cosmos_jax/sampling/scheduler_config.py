"""The solver that a checkpoint asks for: diffusers' `scheduler_config.json` → `Schedule`.

In: that file as a dict, the number of steps, perhaps another shift. Out: the schedule with diffusers' own sigmas and
timesteps, and one line that says what was chosen, to print. A field that is unknown, or has a value that is not
implemented, is an error: a solver that is not the checkpoint's makes other pictures without a complaint.

Cosmos 3 has `UniPCMultistepScheduler` with Karras sigmas (Nano, Super) or flow sigmas (what its model cards advise),
`Cosmos3EdgeUniPCMultistepScheduler` (Edge), and `FlowMatchEulerDiscreteScheduler` with a fixed list of sigmas and fresh
noise (distilled, 4 steps).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from cosmos_jax.flow import shift_sigma
from cosmos_jax.sampling import schedules
from cosmos_jax.sampling.schedules import Schedule

UNIPC, EDGE, EULER = (
    "UniPCMultistepScheduler", "Cosmos3EdgeUniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip
Fields = dict[str, Any]
KARRAS_RHO = 7  # of Karras et al. 2022, eq. 5
BELOW_ONE = 1e-6  # ln(1 − σ) must be finite

# For each kind of scheduler: fields that are honoured, with diffusers' default; fields of which one value is
# implemented; fields that have no effect on a flow that is solved without dynamic shifting and thresholding.
HONOURED: dict[str, dict[str, Any]] = {
    "unipc": {
        "num_train_timesteps": 1000, "solver_order": 2, "disable_corrector": [], "use_karras_sigmas": False,
        "flow_shift": 1.0, "sigma_min": None, "sigma_max": None,
    },
    "euler": {
        "num_train_timesteps": 1000, "shift": 1.0, "stochastic_sampling": False, "fixed_step_sampler_config": None,
        "fixed_step_requires_explicit_sigmas": False,
    },
}  # fmt: skip
FIXED: dict[str, dict[str, Any]] = {
    "unipc": {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "predict_x0": True, "solver_type": "bh2",
        "lower_order_final": True, "solver_p": None, "thresholding": False, "use_exponential_sigmas": False,
        "use_beta_sigmas": False, "final_sigmas_type": "zero", "use_dynamic_shifting": False, "shift_terminal": None,
    },
    "euler": {
        "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False,
    },
}  # fmt: skip
NEEDED = ("prediction_type", "use_flow_sigmas")  # diffusers' defaults of these are not for flows
WITHOUT_EFFECT = {
    "unipc": (
        "beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing", "steps_offset",
        "rescale_betas_zero_snr", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type",
    ),
    "euler": ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
}  # fmt: skip


def from_config(
    config: dict[str, Any], steps: int | None, shift: float | None = None, *,
    native: bool = False, sigmas: list[float] | None = None,
) -> tuple[Schedule, str]:  # fmt: skip
    """`scheduler_config.json` → (schedule, one line that describes it).

    steps: None only for a distilled checkpoint, whose list of sigmas fixes it. shift: replaces the shift of the file.
    native: `use_native_flow_schedule` of `model_index.json` (the framework's grid). sigmas: `distilled_sigmas` of
    `modular_model_index.json`. Raises ValueError, one sentence that names the field, for whatever is not honoured:
    another class, an unknown field or value, a shift or a number of steps that the file does not leave open.
    """
    name = config.get("_class_name")
    if name not in (UNIPC, EDGE, EULER):
        raise ValueError(f"scheduler config: _class_name={name!r} is not one of {UNIPC}, {EDGE}, {EULER}.")
    fields = _read(config, "euler" if name == EULER else "unipc")
    train = fields["num_train_timesteps"]
    if not isinstance(train, int) or train < 2:
        raise ValueError(f"scheduler config: num_train_timesteps={train!r} must be a whole number, at least 2.")
    if name == EULER:
        if native:
            raise ValueError(f"use_native_flow_schedule belongs to {UNIPC}, but the scheduler config is of {EULER}.")
        schedule, solver, grid = _euler(fields, steps, shift, sigmas)
    else:
        if sigmas is not None:
            raise ValueError(f"distilled_sigmas belong to {EULER}, but the scheduler config is of {name}.")
        schedule, solver, grid = _unipc(fields, steps, shift, native=native, edge=name == EDGE)
    count = f"{schedule.steps} step{'' if schedule.steps == 1 else 's'}"
    return schedule, (
        f"{name}: {solver}, {count}, {grid}; sigma {schedule.sigmas[0]:.6g} to "
        f"{schedule.sigmas[-2]:.6g}, timestep {schedule.timesteps[0]:.6g} to {schedule.timesteps[-1]:.6g}"
    )


def of_checkpoint(config: dict[str, Any], index: dict[str, Any], steps: int = 35) -> tuple[Schedule, str]:
    """`from_config` with what a checkpoint's index says beside its scheduler file.

    index: `model_index.json`, with `distilled_sigmas` of `modular_model_index.json`. steps: unless it is distilled.
    """
    native = bool(index.get("use_native_flow_schedule")) and config.get("_class_name") == UNIPC
    sigmas = fixed_sigmas(config, index)
    return from_config(config, None if sigmas else steps, native=native, sigmas=sigmas)


def fixed_sigmas(config: dict[str, Any], index: dict[str, Any]) -> list[float] | None:
    """The list that a distilled checkpoint states, in either file."""
    return (config.get("fixed_step_sampler_config") or {}).get("t_list") or index.get("distilled_sigmas")


def _read(config: dict[str, Any], kind: str) -> Fields:
    """The honoured fields with their defaults filled in; ValueError for a field or value that is not honoured."""
    for name in NEEDED if kind == "unipc" else ():
        if name not in config:
            raise ValueError(f"scheduler config: {name} is missing; a flow needs {name}={FIXED[kind][name]!r}.")
    for name, value in config.items():
        if name in FIXED[kind]:
            only = FIXED[kind][name]
            if value != only:
                raise ValueError(f"scheduler config: {name}={value!r} is not implemented, only {only!r} is.")
        elif name not in (*HONOURED[kind], *WITHOUT_EFFECT[kind]) and not name.startswith("_"):
            raise ValueError(f"scheduler config: {name}={value!r} is a field that this version does not know.")
    return {name: config.get(name, default) for name, default in HONOURED[kind].items()}


def _unipc(
    fields: Fields, steps: int | None, shift: float | None, *, native: bool, edge: bool
) -> tuple[Schedule, str, str]:
    """(schedule, what the solver is, what the grid is)."""
    if steps is None:
        raise ValueError("UniPC needs a number of steps; 35 is the default for video.")
    order, uncorrected = fields["solver_order"], list(fields["disable_corrector"])
    if order not in (1, 2):
        raise ValueError(f"scheduler config: solver_order={order!r} is not implemented, only 1 and 2 are.")
    make = _karras_grid if fields["use_karras_sigmas"] else _flow_grid
    grid, text = make(fields, steps, shift, native=native, edge=edge)
    solver = f"UniPC of order {order}" + (f", no corrector after steps {uncorrected}" if uncorrected else "")
    return schedules.multistep(grid, fields["num_train_timesteps"], order, uncorrected), solver, text


def _karras_grid(
    fields: Fields, steps: int, shift: float | None, *, native: bool, edge: bool
) -> tuple[np.ndarray, str]:
    """[steps+1] float64 sigmas: Karras et al. 2022 eq. 5 spaces σ/(1−σ). No shift and no other grid changes them."""
    low, high = fields["sigma_min"], fields["sigma_max"]
    if shift is not None:
        raise ValueError(f"shift={shift} would have no effect, because use_karras_sigmas is true; make it false.")
    if edge:
        raise ValueError(f"scheduler config: use_karras_sigmas=True is not implemented for {EDGE}.")
    if low is None or high is None or not 0 < low < high:
        raise ValueError(f"scheduler config: use_karras_sigmas needs 0 < sigma_min={low} < sigma_max={high}.")
    schedules.check(steps, 1.0)
    first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    ratio = (first + np.linspace(0, 1, int(steps)) * (last - first)) ** KARRAS_RHO
    ignored = "flow shift and native grid have no effect" if native else "flow shift has no effect"
    return np.append(ratio / (ratio + 1), 0.0), f"Karras sigmas {high:g} to {low:g} ({ignored})"


def _flow_grid(fields: Fields, steps: int, shift: float | None, *, native: bool, edge: bool) -> tuple[np.ndarray, str]:
    """[steps+1] float64 sigmas: a uniform grid, shifted, closed with 0 (spec model.md §7.2, DISC-1)."""
    shift, train = fields["flow_shift"] if shift is None else shift, fields["num_train_timesteps"]
    if edge:  # the framework's grid is all that sets it apart from UniPC
        return schedules.shifted_grid(steps, shift, train), f"native grid, flow shift {shift:g}"
    schedules.check(steps, shift)
    start, end = (1 - 1 / train, 0.0) if native else (1.0, 1 / train)
    grid = shift_sigma(np.linspace(start, end, int(steps) + 1)[:-1], shift)
    if abs(grid[0] - 1) < BELOW_ONE:
        grid[0] -= BELOW_ONE
    return np.append(grid, 0.0), f"{'native' if native else 'stock'} grid, flow shift {shift:g}"


def _euler(
    fields: Fields, steps: int | None, shift: float | None, sigmas: list[float] | None
) -> tuple[Schedule, str, str]:
    """(schedule, what the solver is, what the grid is). The model is told 1000·σ, not truncated (spec §7.3)."""
    own, train, stochastic = fields["shift"], fields["num_train_timesteps"], fields["stochastic_sampling"]
    if fields["fixed_step_sampler_config"] is not None:
        sigmas = _fixed_list(fields, sigmas)
    if fields["fixed_step_requires_explicit_sigmas"] and sigmas is None:
        raise ValueError("scheduler config: fixed_step_requires_explicit_sigmas is true, but there is no such list.")
    if sigmas is not None:
        if not sigmas or sigmas[0] > 1 or any(not a > b for a, b in itertools.pairwise((*sigmas, 0.0))):
            raise ValueError(f"the fixed list of sigmas {sigmas} must decrease from at most 1 and end above 0.")
        if steps not in (None, len(sigmas)):
            raise ValueError(f"steps={steps}, but this checkpoint is distilled to {len(sigmas)} steps.")
        if shift not in (None, own):
            raise ValueError(f"shift={shift} would move the sigmas that this checkpoint is distilled to; leave it out.")
        grid, text = shift_sigma(np.array(sigmas, np.float32), own), f"fixed sigmas, shift {own:g}"
    else:
        if steps is None:
            raise ValueError(f"{EULER} without a fixed list of sigmas needs a number of steps.")
        shift = own if shift is None else shift
        schedules.check(steps, shift)
        grid, text = _twice_shifted(int(steps), shift, train), f"stock grid, shift {shift:g}"
    make, solver = (schedules.renoising, "fresh noise (SDE)") if stochastic else (schedules.single_step, "Euler (ODE)")
    return make(np.append(grid, np.float32(0)), grid * np.float32(train)), solver, text


def _fixed_list(fields: Fields, sigmas: list[float] | None) -> list[float]:
    """The list of sigmas in `fixed_step_sampler_config`, once that agrees with the rest; ValueError otherwise."""
    fixed, stochastic = fields["fixed_step_sampler_config"], fields["stochastic_sampling"]
    if set(fixed) - {"num_train_timesteps"} != {"t_list", "sample_type"}:
        raise ValueError(f"scheduler config: fixed_step_sampler_config={fixed} must hold t_list and sample_type.")
    if fixed["sample_type"] != ("sde" if stochastic else "ode"):
        raise ValueError(
            f"scheduler config: fixed_step_sampler_config has sample_type={fixed['sample_type']!r}, which contradicts "
            f"stochastic_sampling={stochastic}."
        )
    if fixed.get("num_train_timesteps", fields["num_train_timesteps"]) != fields["num_train_timesteps"]:
        raise ValueError("scheduler config: fixed_step_sampler_config has another num_train_timesteps than the file.")
    if sigmas is not None and list(sigmas) != fixed["t_list"]:
        raise ValueError(f"distilled_sigmas={sigmas} contradict fixed_step_sampler_config.t_list={fixed['t_list']}.")
    return fixed["t_list"]


def _twice_shifted(steps: int, shift: float, train: int) -> np.ndarray:
    """[steps] float32: diffusers shifts the ends of the training grid, spaces uniformly, and shifts once more."""
    first, last = shift_sigma(np.array([train, 1], np.float32) / np.float32(train), shift).tolist()
    return shift_sigma(np.linspace(first * train, last * train, steps) / train, shift).astype(np.float32)
