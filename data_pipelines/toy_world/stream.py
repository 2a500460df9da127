"""The toy world without a disk: episode i is a function of a seed.

In: how many, and the first seed. Out: a random-access source for grain, the twin of `tfds_builder.open_source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipelines.toy_world.episodes import Episode, make_episode

# First seeds of the held-out episodes. Choose recipes on `development`; look at `test` when the choice is made.
SPLITS = {"test": 60_000_000, "development": 50_000_000}


@dataclass(frozen=True)
class StreamSource:
    """Episodes of the seeds first_seed … first_seed + n − 1."""

    n: int
    first_seed: int = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Episode:
        if not 0 <= i < self.n:
            raise IndexError(f"episode {i} of {self.n}")
        return make_episode(self.first_seed + int(i))

    def __iter__(self) -> Iterator[Episode]:
        return map(self.__getitem__, range(self.n))


def held_out(n: int, split: str = "test") -> StreamSource:
    """The first n episodes of a split that no training sees."""
    return StreamSource(n, SPLITS[split])
