"""Prepared requests → what they make, one phase after the other, so that one set of weights is on the device at a time.

    compile (and refuse what does not fit) → encode conditions → read captions → denoise → decode → hand over

In: `Prepared` requests of one checkpoint. Out: `Made`, one after the other, in their order. Every phase loads its
weights once for all requests. Only a transfer of several chunks decodes while it denoises (transfer.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from cosmos_jax.codecs.avae import AVAECodec
from cosmos_jax.codecs.wan import WanCodec
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.inference.job import How, Prepared
from cosmos_jax.sampling import engine as engines
from cosmos_jax.sampling.engine import Engine
from cosmos_jax.sampling.generate import Job
from data_pipelines.packing import unpack
from data_pipelines.sample import Sample
from data_pipelines.tasks import task


class Progress(Protocol):
    """Who is told how far it is."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A phase of so many steps begins."""

    def step(self) -> None: ...

    def say(self, line: str) -> None: ...


class Quiet:
    """Nobody."""

    def phase(self, name: str, total: int | None = None) -> None: ...

    def step(self) -> None: ...

    def say(self, line: str) -> None: ...


@dataclass
class Made:
    """What came out of one request. Arrays on the host; None where nothing is made."""

    prepared: Prepared
    latents: dict[str, np.ndarray]  # vision [C,T,h,w], sound [Ds,T], action [rows,width]
    steps: dict[str, np.ndarray] | None = None  # the same after every step, one more axis in front
    video: np.ndarray | None = None  # uint8 [T,H,W,3]
    sound: np.ndarray | None = None  # float32 [2,N]
    actions: np.ndarray | None = None  # float32 [rows,width]
    seconds: dict[str, float] = field(default_factory=dict)  # phase → seconds, those of all requests together
    step_seconds: list[float] = field(default_factory=list)


class Runner:
    """Runs requests on one checkpoint. Programs and codecs are kept from one call to the next."""

    def __init__(self, bundle: Bundle, how: How, progress: Progress | None = None):
        self.bundle, self.how, self.progress = bundle, how, progress or Quiet()
        self.seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []
        self.memory: list[str] = []
        self._engines: dict[Any, Engine] = {}
        self._codecs: dict[str, Any] = {}

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        self.progress.phase(name, total)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def compile(self, requests: Sequence[Prepared]) -> None:
        """All programs of the denoising loop, before any weight is read. ValueError if one does not fit."""
        with self.phase("compiling", len(requests)):
            for p in requests:
                self.engine(p.job())
                self.progress.step()

    def engine(self, job: Job) -> Engine:
        """Compiled for jobs like this one."""
        key = jax.tree.structure(job.inputs), tuple(x.shape for x in jax.tree.leaves((job.inputs, job.captions))), (
            job.forms, job.guidance.normalize, job.schedule.steps, job.schedule.noise is None, job.fresh is None,
        )  # fmt: skip
        if key not in self._engines:
            b, how = self.bundle, self.how
            params = b.abstract("reasoner", how.precision) | {}
            whole = _merge(params, b.abstract("generator", how.precision))
            made = engines.build(whole, b.config, job, precision=how.precision, trajectory=how.trajectory)
            line = made.check()
            self.memory.append(line)
            self.progress.say(f"memory: {line}")
            self._engines[key] = made
        return self._engines[key]

    @property
    def video(self) -> WanCodec:
        if "video" not in self._codecs:
            self._codecs["video"] = self.bundle.video(self.how.precision)
        return self._codecs["video"]

    @property
    def sound(self) -> AVAECodec:
        if "sound" not in self._codecs:
            self._codecs["sound"] = self.bundle.sound(self.how.precision)
        return self._codecs["sound"]

    def run(self, requests: Sequence[Prepared]) -> Iterator[Made]:
        """Everything, in the order of the requests."""
        self.compile(requests)
        samples = self.encode(requests)
        jobs = [p.job(s) for p, s in zip(requests, samples, strict=True)]
        caches = self.prefill(jobs)
        made = list(self.denoise(requests, samples, jobs, caches))
        for m in made:
            self.decode(m)
            m.seconds = dict(self.seconds)
            yield m

    def encode(self, requests: Sequence[Prepared]) -> list[Sample]:
        """The samples with their conditions. The VAE leaves the device afterwards."""
        if not any(p.conditions.encoded for p in requests):
            return [p.blank for p in requests]
        with self.phase("encoding", len(requests)):
            out = []
            for p in requests:
                out.append(p.conditions.sample(p.blank, lambda x: self.video.encode(x), lambda x: self.sound.encode(x)))
                self.progress.step()
        self._codecs.clear()
        return out

    def prefill(self, jobs: Sequence[Job]) -> list[Any]:
        """Keys and values of all captions; with several jobs they wait on the host. The text tower then leaves."""
        with self.phase("reading captions", len(jobs)):
            params = self.load("reasoner")
            out = []
            for job in jobs:
                cache = self.engine(job).prefill(params, job)
                out.append(jax.block_until_ready(cache) if len(jobs) == 1 else jax.device_get(cache))
                self.progress.step()
        return out

    def denoise(
        self, requests: Sequence[Prepared], samples: Sequence[Sample], jobs: Sequence[Job], caches: Sequence[Any]
    ) -> Iterator[Made]:
        params = self.load("generator")
        for p, s, job, cache in zip(requests, samples, jobs, caches, strict=True):
            with self.phase(f"denoising {p.resolved.name}", job.schedule.steps):
                yield self.one(params, p, s, job, cache)

    def one(self, params: dict, p: Prepared, s: Sample, job: Job, cache: Any) -> Made:
        """Denoise one job."""
        times = [time.perf_counter()]

        def tick(_: int) -> None:
            times.append(time.perf_counter())
            self.progress.step()

        result = self.engine(job).denoise(params, cache, job, tick)
        buffers, path = result if self.how.trajectory else (result, None)
        latents = self._unpack(jax.device_get(buffers), job, s)
        steps = None
        if path is not None:
            each = [
                self._unpack({n: x[i] for n, x in path.items()}, job, s) for i in range(job.schedule.steps)
            ]
            steps = {n: np.stack([e[n] for e in each]) for n in each[0]}
        return Made(p, latents, steps, step_seconds=np.diff(times).tolist())

    def _unpack(self, buffers: dict, job: Job, s: Sample) -> dict[str, np.ndarray]:
        return unpack(buffers, job.batch, 0, 0, s, self.bundle.config.sequence)

    def decode(self, m: Made) -> None:
        """Latents → pixels, waves, actions. Numbers first; video only where it is made and wanted."""
        p, row = m.prepared, task(m.prepared.resolved.task)
        if row.action == "noisy":
            m.actions = p.conditions.finish(m.latents["action"])
        wanted = row.makes_video if self.how.decode_video is None else self.how.decode_video and row.makes_video
        with self.phase("decoding"):
            if "sound" in m.latents and row.sound != "clean":
                samples = m.latents["sound"].shape[1] * self.bundle.sound_config.hop
                m.sound = self.sound.decode(np.ascontiguousarray(m.latents["sound"]), samples)
            if wanted:
                m.video = self.video.decode(m.latents["vision"])

    def load(self, job: str) -> dict:
        """Weights straight from their files to the device."""
        began = time.perf_counter()
        params = jax.block_until_ready(self.bundle.load(job, self.how.precision))
        self.seconds[f"loading {job}"] = time.perf_counter() - began
        return params


def _merge(reasoner: dict, generator: dict) -> dict:
    """Abstract parameters of both jobs in one tree: they share nothing but "layers"."""
    return reasoner | generator | {"layers": reasoner["layers"] | generator["layers"]}


Handover = Callable[[Made], None]
