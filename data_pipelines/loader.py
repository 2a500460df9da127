"""The endless stream of packed batches, the same for any number of hosts and workers; resumable to the bit.

In: an `Order` (which sample comes when), a `Prepare` (how it is made), the rows that this host holds. Out: batches of
`schema.py`. The global batch is `bucket.rows` rows, each a stream of its own (row.py): a host packs its rows, reads
their samples and no others, and the state of all hosts together is the states of the rows. docs/data.md tells it whole.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines import rehearsal
from data_pipelines import workers as processes
from data_pipelines.job import Prepare
from data_pipelines.order import Kind, Order
from data_pipelines.packing import Filled, fill
from data_pipelines.row import Row
from data_pipelines.toy_world.samples import ToySamples
from data_pipelines.toy_world.stream import StreamSource


class StateError(ValueError):
    """A state that this loader cannot continue from; the message says what differs."""


class Loader:
    """Iterator of this host's part of every batch, with `get_state`, `merge` and `set_state`."""

    def __init__(
        self,
        prepare: Prepare,
        order: Order,
        look_ahead: int,
        rows: Sequence[int] | None = None,
        workers: int = 0,
        ahead: int = 1,
    ):
        """rows: those of the global batch that this host holds (default: all), in the order it holds them.

        workers: processes that prepare samples, 0 = none; they work up to `ahead` steps ahead. ValueError: a row that
        the bucket does not have, or has twice.
        """
        self.bucket, self._prepare, self._order, self._ahead = prepare.bucket, prepare, order, ahead
        every = range(self.bucket.rows)
        self.rows = tuple(every if rows is None else rows)
        if not self.rows or len(set(self.rows)) < len(self.rows) or not set(self.rows) <= set(every):
            raise ValueError(
                f"rows={self.rows}: a host holds at least one row of the {len(every)} of data.bucket.rows, each once."
            )
        if look_ahead < 0:
            raise ValueError(f"data.look_ahead={look_ahead} must not be negative.")
        self._local = dataclasses.replace(self.bucket, rows=len(self.rows))
        self._workers = processes.start(prepare, workers)
        self.streams = [Row(r, self.bucket.rows, order, self._workers, self.bucket, look_ahead) for r in self.rows]
        self._step = 0
        self.filled = Filled()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        for steps in range(1, self._ahead + 1) if self._workers.count else ():
            for row in self.streams:  # the next step of every row before the one after it
                row.ask(self._step, steps)
        rows = [row.pack(self._step) for row in self.streams]
        self._step += 1
        self.filled.count(rows, self.bucket)
        return fill(rows, self._local, self._prepare.spec)

    @property
    def efficiency(self) -> float:
        """Share of this host's und and gen slots filled so far."""
        return self.filled.efficiency

    @property
    def _identity(self) -> dict:
        return {"rows": self.bucket.rows, **self._order.identity}

    def get_state(self) -> dict:
        """JSON-able, of this host's rows. The batches that follow `set_state` of it are bit-identical."""
        states = {str(r.number): r.get_state() for r in self.streams}
        return {"step": self._step, "order": self._identity, "rows": states}

    @staticmethod
    def merge(states: Sequence[dict]) -> dict:
        """The state of the whole batch, from those of all hosts. StateError when they are not of one step."""
        first = states[0]
        if any((s["step"], s["order"]) != (first["step"], first["order"]) for s in states):
            raise StateError(f"the hosts' loaders are not in step: {[s['step'] for s in states]}.")
        rows = {number: row for s in states for number, row in s["rows"].items()}
        return first | {"rows": dict(sorted(rows.items(), key=lambda item: int(item[0])))}

    def set_state(self, state: dict) -> None:
        """Continue from a state that holds at least this host's rows.

        StateError, before anything is read, when the state is of another order of samples, or of an older format.
        """
        if "order" not in state:
            raise StateError(
                "the loader state is of an earlier version of the loader, which ordered samples in another way; "
                "train again in an empty directory."
            )
        for name, own in self._identity.items():
            if (was := state["order"].get(name)) != own:
                raise StateError(
                    f"the loader state is of {SETTINGS[name]} {was}, this run has {own}; that would change the order "
                    "of the samples: set it back, or train in another directory."
                )
        if missing := [r for r in self.rows if str(r) not in state["rows"]]:
            raise StateError(f"the loader state lacks row {missing[0]}; it holds {', '.join(state['rows'])}.")
        self._step = state["step"]
        for row in self.streams:
            row.set_state(state["rows"][str(row.number)])

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


SETTINGS = {
    "rows": "data.bucket.rows",
    "seed": "data.seed",
    "in_step": "data.in_step",
    "kinds": "data.mixture, or a source, with (share, records)",
}


class Prefetch:
    """A loader that prepares `depth` batches in a thread, from the first one asked for on.

    Its state is that of the batches handed out.
    """

    def __init__(self, loader: Loader, depth: int):
        self._loader, self._depth = loader, max(depth, 1)
        self._state: dict | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        return self._loader.rows

    @property
    def efficiency(self) -> float:
        return self._loader.efficiency

    def _start(self) -> None:
        self._queue: queue.Queue = queue.Queue(self._depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(self._queue, self._stop), daemon=True)
        self._thread.start()

    def _work(self, out: queue.Queue, stop: threading.Event) -> None:
        while not stop.is_set():
            item: tuple
            try:
                item = (next(self._loader), self._loader.get_state(), None)
            except BaseException as e:  # handed to the consumer, who raises it
                item = (None, None, e)
            while not stop.is_set():
                try:
                    out.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[2] is not None:
                return

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._error is not None:  # nobody works any more
            raise self._error
        if self._thread is None:
            self._state = self._loader.get_state()
            self._start()
        batch, state, self._error = self._queue.get()
        if self._error is not None:
            raise self._error
        self._state = state
        return batch

    def get_state(self) -> dict:
        return self._loader.get_state() if self._state is None else self._state

    merge = staticmethod(Loader.merge)

    def set_state(self, state: dict) -> None:
        self._halt()
        self._loader.set_state(state)
        self._state = self._error = None

    def _halt(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """End the thread and the workers."""
        if self._thread is not None:
            self._stop.set()
        self._loader.close()  # a thread that waits for a worker now gets an error
        self._halt()


def toy(source, data, spec, assets, shift_image: float, shift_video: float) -> tuple[Prepare, Order]:
    """What `Loader` takes, for the toy world: every task of data.mixture is a kind, with its own order of episodes.

    source: random access to `Episode`s, picklable. data: DataConfig.
    """
    make = ToySamples(source, assets, data, shift_image, shift_video)
    order = Order({name: Kind(share, len(source)) for name, share in data.mixture}, data.seed, data.in_step)
    return Prepare(make, assets.tokenizer, spec, data.bucket), order


def build(data, spec, assets, shift_image: float, shift_video: float, rows: Sequence[int] | None = None) -> Prefetch:
    """The training loader of a `DataConfig`, for some rows of the global batch. ValueError for an unknown source.

    assets: of the toy's sources; None for `rehearsal`.
    """
    source: Any
    if data.source == "rehearsal":
        what = rehearsal.stream(spec, data.bucket, data.seed, data.in_step)
        return Prefetch(Loader(*what, data.look_ahead, rows, data.workers, data.prefetch), data.prefetch)
    if data.source == "toy":
        source = StreamSource(data.episodes)
    elif data.source == "toy_tfds":
        from data_pipelines.toy_world.tfds_builder import open_source

        source = open_source(data.tfds_dir, "train")
    else:
        raise ValueError(f"data.source={data.source!r} is not one of toy, toy_tfds, rehearsal.")
    what = toy(source, data, spec, assets, shift_image, shift_video)
    return Prefetch(Loader(*what, data.look_ahead, rows, data.workers, data.prefetch), data.prefetch)
