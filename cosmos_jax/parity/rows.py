"""What one comparison says, and when it passes.

In: our array and the reference's. Out: a `Row`: relL2 = ‖a−b‖/‖b‖, peak = max|a−b|/rms(b), the noise floor (what the
reference's own float32 costs it), the threshold, the verdict. Thresholds: spec reference_parity.md §4.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

# relL2 thresholds in float32. Above the noise floor of the component, below every plausible mistake (§4.2).
TABLES = 1e-6  # rotary tables, the timestep's row
LAYER = 2e-6  # one layer, fed the reference's own input
PROBE = 5e-6  # small activations, where the norms' eps decides
ENCODE_VIDEO, DECODE_VIDEO = 2.5e-6, 3e-6
ENCODE_SOUND, DECODE_SOUND = 2e-6, 3e-6
REASONER = 2.5e-6
GRADIENT = 1e-5  # of the training loss, each parameter
TRAJECTORY = 1.5e-6  # the solver on recorded velocities
NEXT_LATENTS = 1e-6  # one denoising step, fed the reference's latents
FREE_LATENTS = 5e-5  # all denoising steps on our own
WAVE = 5e-4  # decoded from latents that were denoised on our own
HALF = 1.25  # in bfloat16: at most this many times the error of PyTorch's own bfloat16
BFLOAT16 = "bfloat16"  # the part of such rows
ADDED, ALONE = "errors add up", "each one alone"  # the lines of a chart
PEAK = 10  # max|a−b|/rms may be this many times the relL2 threshold


def by_depth(layers: int) -> float:
    """The threshold of a network of so many layers: 2e-6 up to 3, 4e-6 at 8, 6e-6 at 36, linear in log(layers)."""
    x, y = np.log([3, 8, 36]), (2e-6, 4e-6, 6e-6)
    if layers <= 36:
        return float(np.interp(math.log(max(layers, 1)), x, y))
    return y[2] + (y[2] - y[1]) / (x[2] - x[1]) * (math.log(layers) - x[2])  # Super's 64 layers: 6.8e-6


@dataclass(frozen=True)
class Row:
    """One comparison. `plot`, `line` and `index` (a layer, a stage or a step) place it in a chart; None: in none."""

    component: str
    part: str
    what: str
    rel: float
    peak: float
    limit: float  # of rel; 0: the two must be equal, bit for bit
    peak_limit: float | None = None
    floor: float | None = None  # None: there is none to state (exact rows), or it was not measured
    floor_from: str = ""  # measured | published | torch's bfloat16
    plot: str | None = None  # ends with what is counted: layer, stage or step
    line: str | None = None
    index: int | None = None
    alone: bool = False  # one layer, stage or step, fed the reference's own input
    note: str = ""

    @property
    def passed(self) -> bool:
        """A NaN fails."""
        return self.rel <= self.limit and (self.peak_limit is None or self.peak <= self.peak_limit)

    @property
    def share(self) -> float:
        """The error in thresholds; infinite for a NaN, and for what should be equal and is not."""
        if not self.limit:
            return 0.0 if self.passed else math.inf
        return math.inf if math.isnan(self.rel) else self.rel / self.limit

    @property
    def verdict(self) -> str:
        return "pass" if self.passed else "FAIL"

    def to_dict(self) -> dict:
        return asdict(self) | {"verdict": self.verdict}


def relative(a, b) -> tuple[float, float]:
    """(relL2, max error / rms) of a against the reference b. (inf, inf) when the shapes differ."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return math.inf, math.inf
    rms = math.sqrt(np.mean(b**2)) + 1e-300
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-300)), float(np.abs(a - b).max() / rms)


def compare(
    where: tuple[str, str, str],
    ours,
    want,
    limit: float,
    *,
    exact64=None,
    floor: float | None = None,
    peaks: bool = True,
    plot: str | None = None,
    index: int | None = None,
    alone: bool = False,
    note: str = "",
) -> Row:
    """One row. where: (component, part, what). limit 0: equal, or it fails.

    exact64: the reference's result in float64, from which the noise floor is measured; floor: a published one instead.
    peaks: hold the largest error to 10 times the limit too (not for hidden states, whose few giants decide it).
    """
    rel, peak = relative(ours, want)
    source = "published" if floor is not None else ""
    if exact64 is not None:
        floor, source = relative(want, exact64)[0], "measured"
    held = PEAK * limit if peaks and limit else None
    line = None if plot is None else ALONE if alone else ADDED
    return Row(*where, rel, peak, limit, held, floor, source, plot, line, index, alone, note)


def exact(where: tuple[str, str, str], ours, want, note: str = "") -> Row:
    """Equal in shape and in every element; relL2 is shown, 0 is required."""
    ours, want = np.asarray(ours), np.asarray(want)
    if ours.shape == want.shape and np.array_equal(ours, want):
        return Row(*where, 0.0, 0.0, 0.0, note=note)
    rel, peak = relative(ours, want)
    return Row(*where, rel or math.inf, peak, 0.0, note=note)


def half(where: tuple[str, str, str], ours, theirs, truth, note: str = "") -> Row:
    """bfloat16: our error against float32 on the same rounded weights, at most 1.25 times PyTorch's own."""
    rel, peak = relative(ours, truth)
    own = relative(theirs, truth)[0]
    return Row(*where, rel, peak, HALF * own, None, own, "torch's bfloat16", note=note)


def failures(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if not r.passed]


def first_divergence(rows: Sequence[Row]) -> Row | None:
    """The first failing layer, stage or step that was fed the reference's own input: the mistake is in it, not before.

    Without such a row, the first failing one, in the order of computation.
    """
    wrong = failures(rows)
    return next(iter([r for r in wrong if r.alone] + wrong), None)


def chain(
    component: str, part: str, stages: dict, x, want: dict, want64: dict | None, floor: float, limit: float
) -> list[Row]:
    """Stages one after another: on our own input (errors add up), and each on the reference's.

    stages: name → function. want, want64: name → what the reference returned. All in our layout.
    """
    out, mine, golden = [], x, x
    for i, (name, stage) in enumerate(stages.items()):
        alone, mine = stage(golden), stage(mine)
        golden = want[name].astype(np.float32)
        known = {"exact64": want64[name]} if want64 else {"floor": floor}
        out.append(compare((component, part, f"after {name}"), mine, want[name], limit, peaks=False,
                           plot=f"{part}, after each stage", index=i, **known))  # fmt: skip
        out.append(compare((component, part, f"{name} alone"), alone, want[name], limit, peaks=False,
                           plot=f"{part}, after each stage", index=i, alone=True))  # fmt: skip
    return out
