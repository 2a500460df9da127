"""The endless stream of packed batches: shuffle, slice for this host, plan, pack; resumable to the bit.

In: a random-access source of episodes (through grain). Out: batches of `schema.py`. The state is a position and the
positions of the samples that wait in the packer's look-ahead; everything else is a function of them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from data_pipelines.packing import Packer, Planned, plan
from data_pipelines.sample import Sample
from data_pipelines.schema import Bucket, SequenceSpec


class Loader:
    """Iterator of batches with `get_state` and `set_state`.

    make(i, sample_id) → Sample must be stateless. Host h of n takes samples h, h+n, …: all hosts together see each
    sample once, whatever n.
    """

    def __init__(
        self,
        make: Callable[[int, int], Sample],
        tokenizer,
        spec: SequenceSpec,
        bucket: Bucket,
        look_ahead: int,
        host: int = 0,
        hosts: int = 1,
    ):
        self.make, self.tokenizer, self.spec, self.bucket = make, tokenizer, spec, bucket
        self.look_ahead, self.host, self.hosts = look_ahead, host, hosts
        self._next = 0
        self._packer = Packer(bucket, look_ahead)
        self._position: dict[int, int] = {}  # sample id → stream position, for what is waiting

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def _plan(self, i: int) -> Planned:
        sample_id = i * self.hosts + self.host
        self._position[sample_id] = i
        return plan(self.make(i, sample_id % 2**31), self.tokenizer, self.spec)

    def _stream(self) -> Iterator[Planned]:
        while True:
            self._next += 1
            yield self._plan(self._next - 1)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._packer.batch(self._stream(), self.spec)
        assert batch is not None, "the stream is endless"
        return batch

    @property
    def efficiency(self) -> float:
        """Share of und and gen slots filled so far."""
        return self._packer.filled.efficiency

    def get_state(self) -> dict:
        """JSON-able. The batches that follow `set_state` of it are bit-identical."""
        waiting = [self._position[p.sample.sample_id] for p in self._packer.waiting]
        self._position = {p.sample.sample_id: self._position[p.sample.sample_id] for p in self._packer.waiting}
        return {"next": self._next, "waiting": waiting, "host": self.host, "hosts": self.hosts}

    def set_state(self, state: dict) -> None:
        """ValueError when the state belongs to another host layout."""
        if (state["host"], state["hosts"]) != (self.host, self.hosts):
            raise ValueError(
                f"the loader state is of host {state['host']} of {state['hosts']}, this is {self.host} of "
                f"{self.hosts}; resume with the same number of hosts."
            )
        self._next = state["next"]
        self._packer = Packer(self.bucket, self.look_ahead)
        self._packer.waiting = [self._plan(i) for i in state["waiting"]]


class Prefetch:
    """A loader that prepares `depth` batches in a thread. Its state is that of the batches handed out."""

    def __init__(self, loader: Loader, depth: int):
        self._loader, self._depth = loader, max(depth, 1)
        self._state = loader.get_state()
        self._start()

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
        batch, state, error = self._queue.get()
        if error is not None:
            raise error
        self._state = state
        return batch

    @property
    def efficiency(self) -> float:
        return self._loader.efficiency

    def get_state(self) -> dict:
        return self._state

    def set_state(self, state: dict) -> None:
        self.close()
        self._loader.set_state(state)
        self._state = self._loader.get_state()
        self._start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def episodes(source, seed: int, host: int = 0, hosts: int = 1) -> grain.MapDataset:
    """Endless shuffled random access: position i → (episode number, function that makes the episode)."""
    ds = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    return ds[host::hosts].map(lambda k: (int(k), lambda: source[int(k)]))


def build(
    data, spec: SequenceSpec, assets, shift_image: float, shift_video: float, host: int = 0, hosts: int = 1
) -> Prefetch:
    """The training loader of a `DataConfig`. ValueError for an unknown source."""
    from data_pipelines.toy_world.samples import ToySamples
    from data_pipelines.toy_world.stream import StreamSource

    source: Any
    if data.source == "toy":
        source = StreamSource(data.episodes)
    elif data.source == "toy_tfds":
        from data_pipelines.toy_world.tfds_builder import open_source

        source = open_source(data.tfds_dir, "train")
    else:
        raise ValueError(f"data.source={data.source!r} is not one of toy, toy_tfds.")
    make = ToySamples(episodes(source, data.seed, host, hosts), assets, data, shift_image, shift_video)
    return Prefetch(Loader(make, assets.tokenizer, spec, data.bucket, data.look_ahead, host, hosts), data.prefetch)
