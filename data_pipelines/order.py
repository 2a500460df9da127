"""Which sample comes when: a function of a seed, of nothing that ran before and of no number of hosts or workers.

In: the kinds of samples with their shares, how many records each has, a seed. Out: the kind of every draw, and the
record behind the i-th sample of a kind. Kinds are tasks in the toy, buckets of length and resolution in a lab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import grain
import numpy as np

from data_pipelines.job import Job


class Kind(NamedTuple):
    """A stream of the mixture."""

    share: float  # of the draws, not normalised
    records: int  # in its source


class Order:
    """Endless: every kind passes through all its records, shuffled anew, before it repeats one."""

    def __init__(self, kinds: Mapping[str, Kind], seed: int, in_step: bool = True):
        """in_step: all rows draw the same kinds in the same step; else each draws by itself.

        ValueError: no kind, a share that is negative or not a number, no share above zero, an empty source.
        """
        shares = np.array([k.share for k in kinds.values()], np.float64)
        if not kinds or not np.isfinite(shares).all() or shares.min() < 0 or not shares.sum():
            raise ValueError(f"data.mixture: the shares {shares.tolist()} must not be negative, and one be positive.")
        for name, kind in kinds.items():
            if kind.records < 1:
                raise ValueError(f"the source of {name} is empty; give it records, or take it out of data.mixture.")
        self.names, self.seed, self.in_step = tuple(kinds), seed, in_step
        self._kinds = tuple(kinds.values())
        self._bounds = np.cumsum(shares / shares.sum())
        self._bounds[np.flatnonzero(shares)[-1] :] = math.inf  # against rounding, and never a kind of share 0
        self._shuffled = [
            grain.MapDataset.range(k.records).shuffle(seed=(seed + i * 2_654_435_761) % 2**32).repeat()
            for i, k in enumerate(self._kinds)
        ]

    @property
    def identity(self) -> dict:
        """JSON: what must be the same for the order to be the same."""
        kinds = {name: list(kind) for name, kind in zip(self.names, self._kinds, strict=True)}
        return {"seed": self.seed, "in_step": self.in_step, "kinds": kinds}

    def draws(self, step: int, row: int) -> Iterator[int]:
        """The kinds of the first, second, … sample that a row takes up in this step.

        Rows which take up the same kinds in the same step hold packs of similar cost, without a word between hosts; but
        then a step sees fewer kinds, and its gradient is noisier (docs/data.md).
        """
        rng = np.random.RandomState([self.seed % 2**32, step, *(() if self.in_step else (row,))])
        while True:
            yield from np.searchsorted(self._bounds, rng.random_sample(32), side="right").tolist()

    def job(self, kind: int, index: int) -> Job:
        """Sample `index` of a kind."""
        return Job(kind, int(self._shuffled[kind][index]), (index * len(self._kinds) + kind) % 2**31)
