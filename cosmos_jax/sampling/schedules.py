"""Where a solver evaluates the model, and with which weights it combines what it saw.

In: number of steps and flow shift. Out: a `Schedule`: sigmas, timesteps and scalar weights, all made on the host in
float64 numpy. The device loop (`generate.denoise`) is then nothing but weighted sums: no solve, no logarithm of zero.

Every solver here shares one form. With m_i = x − σ_i·v the clean latent predicted at step i,

    x_c = corrector · (x, y, m_i, m_{i−1}, m_{i−2})          y: the corrected state of step i−1
    x'  = predictor · (x_c, m_i, m_{i−1})                    x' is where the model is evaluated next
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """A pytree of host arrays for N steps; passing another one of the same N recompiles nothing."""

    sigmas: np.ndarray  # [N+1] float32, decreasing, the last is 0
    timesteps: np.ndarray  # [N] what the model is told, in 0 … 1000: int64 (UniPC) or float64 (Euler)
    corrector: np.ndarray  # [N,5] float64
    predictor: np.ndarray  # [N,3] float64

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def rows(self) -> dict[str, np.ndarray]:
        """What each step of the device loop needs, float32, leading axis N (host or traced, as the schedule is)."""
        names = ("timestep", "sigma", "corrector", "predictor")
        values = (self.timesteps, self.sigmas[:-1], self.corrector, self.predictor)
        return {n: v.astype(np.float32) for n, v in zip(names, values, strict=True)}


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
    if steps != int(steps) or steps < 1:
        raise ValueError(f"sample.steps={steps} must be a whole number, at least 1.")
    if not 0 < shift < math.inf:
        raise ValueError(f"sample.shift={shift} must be positive: 1 leaves the grid uniform, 10 suits 720p video.")
    t = np.linspace(float(np.float32(1 - 1 / num_train)), 0.0, int(steps) + 1)
    return shift * t / (1 + (shift - 1) * t)


def unipc(steps: int, shift: float, num_train: int = 1000) -> Schedule:
    """UniPC of order 2 for flows (Zhao et al. 2023, B(h) = e^h − 1 "bh2", x0 prediction; spec model.md §7.2).

    Order 1 at the first and the last step, corrector from the second step on. The model is told int64(trunc(1000·σ)),
    from the float64 σ; the solver uses the float32 σ. (Above 100 steps at shift 10 the first two integers coincide and
    the framework then skips step 0 by accident; this schedule does not.)
    """
    grid = shifted_grid(steps, shift, num_train)
    sigmas, steps = grid.astype(np.float32), len(grid) - 1
    corrector, predictor = np.zeros((steps, 5)), np.zeros((steps, 3))
    order = 1
    for i in range(steps):
        corrector[i] = _correct(sigmas, i, order) if i else (1, 0, 0, 0, 0)
        order = 2 if 0 < i < steps - 1 else 1
        predictor[i] = _predict(sigmas, i, order)
    return Schedule(sigmas, (grid[:-1] * num_train).astype(np.int64), corrector, predictor)


def euler(steps: int, shift: float, num_train: int = 1000) -> Schedule:
    """x' = x + (σ' − σ)·v on the same shifted grid.

    The model is told the untruncated 1000·σ, as in training and as in the framework's fixed-step sampler (§4.6, §7.3).
    """
    grid = shifted_grid(steps, shift, num_train)
    sigmas = grid.astype(np.float32)
    ratio = sigmas[1:] / sigmas[:-1].astype(np.float64)
    corrector = np.tile([1.0, 0, 0, 0, 0], (len(ratio), 1))
    predictor = np.stack([ratio, 1 - ratio, 0 * ratio], 1)  # x + (σ'−σ)v = (σ'/σ)·x + (1 − σ'/σ)·(x − σv)
    return Schedule(sigmas, grid[:-1] * num_train, corrector, predictor)


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
