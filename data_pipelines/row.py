"""One row of the global batch through time: a stream of its own, with its own look-ahead.

In: the order of the samples, workers that prepare them. Out: for every step the samples that share the row. A row's
state is how far it is in every kind and which samples wait; no other row, host or worker has a part in it.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import NamedTuple

import numpy as np

from data_pipelines.order import Order
from data_pipelines.packing import Planned, capacity, choose, needs
from data_pipelines.schema import Bucket
from data_pipelines.workers import Inline, Pool


class Waiting(NamedTuple):
    """A sample that was taken up and is not packed yet."""

    kind: int
    n: int  # it is the row's n-th of this kind
    planned: Planned
    need: list[int]


class Row:
    """Row `number` of `rows`: of every kind it takes the samples number, number + rows, number + 2·rows, …

    It takes samples up until they would fill a row, and `look_ahead` more. The oldest opens the pack, a search finds
    its company. At most segments + look_ahead samples wait, and the oldest leaves in every step: so many steps are the
    longest that a sample can wait.
    """

    def __init__(self, number: int, rows: int, order: Order, workers: Inline | Pool, bucket: Bucket, look_ahead: int):
        self.number, self.rows, self._order, self._workers = number, rows, order, workers
        self._room, self._look_ahead = capacity(bucket), look_ahead
        self._next = [0] * len(order.names)  # of every kind: so many were taken up
        self._waiting: list[Waiting] = []
        self._taken = 4  # samples taken up in the last step; of the first it is a guess

    @property
    def waiting(self) -> list[Planned]:
        return [w.planned for w in self._waiting]

    def pack(self, step: int) -> list[Planned]:
        """The samples of a step, in the order in which they were taken up. Steps follow one another, from 0."""
        kinds, before = self._order.draws(step, self.number), len(self._waiting)
        while self._wants_more():
            kind = next(kinds)
            self._waiting.append(self._prepared(kind, self._next[kind]))
            self._next[kind] += 1
        self._taken = len(self._waiting) - before
        chosen = set(choose(np.array([w.need for w in self._waiting]), self._room))
        row = [w.planned for i, w in enumerate(self._waiting) if i in chosen]
        self._waiting = [w for i, w in enumerate(self._waiting) if i not in chosen]
        return row

    def ask(self, step: int, steps: int) -> None:
        """Let the workers begin with what the row is likely to take up in these steps; it will take it up sometime."""
        soon: Counter[int] = Counter()
        for s in range(step, step + steps):
            soon.update(islice(self._order.draws(s, self.number), self._taken + 1))
        for kind, count in soon.items():
            for n in range(self._next[kind], self._next[kind] + count):
                self._workers.ask(self._order.job(kind, n * self.rows + self.number))

    def get_state(self) -> dict:
        return {"next": list(self._next), "waiting": [[w.kind, w.n] for w in self._waiting]}

    def set_state(self, state: dict) -> None:
        for kind, n in state["waiting"]:
            self._workers.ask(self._order.job(kind, n * self.rows + self.number))
        self._waiting = [self._prepared(kind, n) for kind, n in state["waiting"]]
        self._next = list(state["next"])

    def _prepared(self, kind: int, n: int) -> Waiting:
        p = self._workers.get(self._order.job(kind, n * self.rows + self.number))
        return Waiting(kind, n, p, needs(p))

    def _wants_more(self) -> bool:
        """Do the waiting samples make less than a row and `look_ahead` more?"""
        tokens = np.cumsum([w.need[0] + w.need[1] for w in self._waiting])
        row = min(int(np.searchsorted(tokens, self._room[:2].sum())) + 1, int(self._room[-1]))
        return len(self._waiting) < row + self._look_ahead
