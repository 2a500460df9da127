"""Where a solver evaluates the model, and with which weights it combines what it saw.

In: number of steps and flow shift. Out: a `Schedule`: sigmas, timesteps and scalar weights, all made on the host in
float64 numpy. The device loop (`generate.denoise`) is then nothing but weighted sums: no solve, no logarithm of zero.

Every solver here shares one form. With m_i = x − σ_i·v the clean latent predicted at step i,

    x_c = corrector · (x, y, m_i, m_{i−1}, m_{i−2})          y: the corrected state of step i−1
    x'  = predictor · (x_c, m_i, m_{i−1}) + noise · ε        x' is where the model is evaluated next

where ε is fresh unit noise; only `renoising` draws any.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import NamedTuple

import numpy as np

from cosmos_jax.flow import shift_sigma


class Schedule(NamedTuple):
    """A pytree of host arrays for N steps; passing another one of the same N recompiles nothing."""

    sigmas: np.ndarray  # [N+1] float32, decreasing, the last is 0
    timesteps: np.ndarray  # [N] what the model is told, in 0 … 1000: int64 (UniPC) or float64 (Euler)
    corrector: np.ndarray  # [N,5] float64
    predictor: np.ndarray  # [N,3] float64
    noise: np.ndarray | None = None  # [N] float64; None: the sampler is deterministic

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def rows(self) -> dict[str, np.ndarray]:
        """What each step of the device loop needs, float32, leading axis N (host or traced, as the schedule is)."""
        names = ("timestep", "sigma", "corrector", "predictor", "noise")
        values = (self.timesteps, self.sigmas[:-1], self.corrector, self.predictor, self.noise)
        return {n: v.astype(np.float32) for n, v in zip(names, values, strict=True) if v is not None}


def build(solver: str, steps: int, shift: float) -> Schedule:
    """The schedule that `SampleConfig.solver` names. ValueError for an unknown solver."""
    if solver not in SOLVERS:
        raise ValueError(f"sample.solver={solver!r} is not one of {', '.join(SOLVERS)}.")
    return SOLVERS[solver](steps, shift)


def shifted_grid(steps: int, shift: float, num_train: int = 1000) -> np.ndarray:
    """[steps+1] float64 sigmas: a uniform grid from 1 − 1/num_train down, shifted by s·t/(1+(s−1)·t), closed with 0.

    The start is the float32 0.999 of the framework's FlowUniPC (spec model.md §7.2), everything after it float64.
    Raises ValueError for steps < 1 or shift ≤ 0.
    """
    check(steps, shift)
    return shift_sigma(np.linspace(float(np.float32(1 - 1 / num_train)), 0.0, int(steps) + 1), shift)


def check(steps: int, shift: float) -> None:
    """ValueError for steps < 1 or shift ≤ 0."""
    if steps != int(steps) or steps < 1:
        raise ValueError(f"sample.steps={steps} must be a whole number, at least 1.")
    if not 0 < shift < math.inf:
        raise ValueError(f"sample.shift={shift} must be positive: 1 leaves the grid uniform, 10 suits 720p video.")


def unipc(steps: int, shift: float, num_train: int = 1000) -> Schedule:
    """UniPC on the framework's grid."""
    return multistep(shifted_grid(steps, shift, num_train), num_train)


def multistep(
    grid: np.ndarray, num_train: int = 1000, max_order: int = 2, uncorrected: Container[int] = ()
) -> Schedule:
    """UniPC of order 2 for flows (Zhao et al. 2023, B(h) = e^h − 1 "bh2", x0 prediction; spec model.md §7.2).

    grid: [N+1] float64 sigmas, below 1 and decreasing to 0. Order 1 at the first and the last step (everywhere if
    `max_order` is 1), corrector from the second step on, except after the steps in `uncorrected`. The model is told
    int64(trunc(1000·σ)), from the float64 σ; the solver uses the float32 σ. (Where the first two integers coincide, as
    above 100 steps at shift 10, the framework skips step 0 by accident; this schedule does not.) ValueError for a first
    sigma of 1.
    """
    sigmas, steps = grid.astype(np.float32), len(grid) - 1
    if not sigmas[0] < 1:
        raise ValueError("the first sigma rounds to 1, where ln(1 − sigma) of UniPC is infinite; use a smaller shift.")
    corrector, predictor = np.zeros((steps, 5)), np.zeros((steps, 3))
    order = 1
    for i in range(steps):
        corrector[i] = _correct(sigmas, i, order) if i and i - 1 not in uncorrected else _AS_IT_IS
        order = min(max_order, 2 if 0 < i < steps - 1 else 1)
        predictor[i] = _predict(sigmas, i, order)
    return Schedule(sigmas, (grid[:-1] * num_train).astype(np.int64), corrector, predictor)


def euler(steps: int, shift: float, num_train: int = 1000) -> Schedule:
    """x' = x + (σ' − σ)·v on the same shifted grid.

    The model is told the untruncated 1000·σ, as in training and as in the framework's fixed-step sampler (§4.6, §7.3).
    """
    grid = shifted_grid(steps, shift, num_train)
    return single_step(grid.astype(np.float32), grid[:-1] * num_train)


def single_step(sigmas: np.ndarray, timesteps: np.ndarray) -> Schedule:
    """x' = x + (σ' − σ)·v. sigmas: [N+1] float32 decreasing to 0; timesteps: [N], what the model is told."""
    ratio = sigmas[1:] / sigmas[:-1].astype(np.float64)
    predictor = np.stack([ratio, 1 - ratio, 0 * ratio], 1)  # x + (σ'−σ)v = (σ'/σ)·x + (1 − σ'/σ)·(x − σv)
    return Schedule(sigmas, timesteps, np.tile(_AS_IT_IS, (len(ratio), 1)), predictor)


def renoising(sigmas: np.ndarray, timesteps: np.ndarray) -> Schedule:
    """x' = (1 − σ')·m + σ'·ε with fresh ε: the distilled models' sampler (spec model.md §7.3). Arguments: single_step.

    The last σ' is 0, so the last step returns the predicted clean latent and adds no noise.
    """
    noise = sigmas[1:].astype(np.float64)
    predictor = np.stack([0 * noise, 1 - noise, 0 * noise], 1)
    return Schedule(sigmas, timesteps, np.tile(_AS_IT_IS, (len(noise), 1)), predictor, noise)


_AS_IT_IS = (1.0, 0.0, 0.0, 0.0, 0.0)  # a row of a corrector that changes nothing
SOLVERS = {"unipc": unipc, "euler": euler}


def _lambda(sigma: float) -> float:
    """Half log signal-to-noise ratio ln((1−σ)/σ); +∞ at σ = 0."""
    return math.log1p(-sigma) - math.log(sigma) if sigma > 0 else math.inf


def _interval(sigmas: np.ndarray, i: int) -> tuple[float, float, float, float]:
    """From σ_i to σ_{i+1}: (h = λ' − λ, e^{−h} − 1, α' = 1 − σ', σ'/σ)."""
    s, s_next = float(sigmas[i]), float(sigmas[i + 1])
    h = _lambda(s_next) - _lambda(s)
    return h, math.expm1(-h), 1 - s_next, s_next / s


def _ratio(sigmas: np.ndarray, i: int, h: float) -> float:
    """r = (λ_{i−1} − λ_i) / h: where the older model output lies, in units of the current step."""
    return (_lambda(float(sigmas[i - 1])) - _lambda(float(sigmas[i]))) / h


def _predict(sigmas: np.ndarray, i: int, order: int) -> tuple[float, float, float]:
    """Weights of (x_c, m_i, m_{i−1}) in x at σ_{i+1}."""
    h, e, alpha, ratio = _interval(sigmas, i)
    older = -alpha * e * 0.5 / _ratio(sigmas, i, h) if order == 2 else 0.0  # of the difference m_{i−1} − m_i
    return ratio, -alpha * e - older, older


def _correct(sigmas: np.ndarray, i: int, order: int) -> tuple[float, float, float, float, float]:
    """Weights of (x, y, m_i, m_{i−1}, m_{i−2}) in the corrected x at σ_i; `order` is that of the predictor before."""
    h, e, alpha, ratio = _interval(sigmas, i - 1)
    newer, older = 0.5, 0.0  # weights of (m_i − m_{i−1}) and of (m_{i−2} − m_{i−1})
    if order == 2:
        r = _ratio(sigmas, i - 1, h)
        b1 = (-e / h - 1) / e
        b2 = 2 * ((e / h + 1) / h - 0.5) / e
        slope = (b1 - b2) / (1 - r)  # the 2×2 system [[1,1],[r,1]]·(ρ0,ρ1) = (b1,b2)
        newer, older = b1 - slope, slope / r
    newer, older = -alpha * e * newer, -alpha * e * older
    return 0.0, ratio, newer, -alpha * e - newer - older, older
