"""Prepared requests → what they make, one phase after the other, so that one set of weights is on the device at a time.

    compile (and refuse what does not fit) → encode conditions → read captions → denoise → decode → hand over

In: `Prepared` requests of one checkpoint. Out: `Made`, one after the other, in their order. Every phase loads its
weights once for all requests. Only a transfer of several chunks decodes while it denoises (transfer.py). On the mesh
that has been entered the transformer is divided; the codecs run on the first device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

import pallas_kernels.attention as attention
from cosmos_jax import shard
from cosmos_jax.codecs.avae import AVAECodec
from cosmos_jax.codecs.wan import WanCodec
from cosmos_jax.codecs.wan import memory as wan_memory
from cosmos_jax.codecs.wan.codec import pixels
from cosmos_jax.config import ConfigError, ModelConfig
from cosmos_jax.inference import transfer
from cosmos_jax.inference.answers import Question
from cosmos_jax.inference.bundle import CHUNK, Bundle
from cosmos_jax.inference.job import How, Prepared
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import engine as engines
from cosmos_jax.sampling import guidance
from cosmos_jax.sampling.engine import Engine
from cosmos_jax.sampling.generate import Job
from cosmos_jax.sampling.memory import free_memory, gib, held
from data_pipelines.packing import unpack
from data_pipelines.sample import Sample
from data_pipelines.tasks import task

Group = Sequence[Prepared]  # results of one job, a row for each


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

    request: Prepared | Question
    latents: dict[str, np.ndarray]  # vision [C,T,h,w], sound [Ds,T], action [rows,width]
    steps: dict[str, np.ndarray] | None = None  # the same after every step, one more axis in front
    video: np.ndarray | None = None  # uint8 [T,H,W,3]
    sound: np.ndarray | None = None  # float32 [2,N]
    actions: np.ndarray | None = None  # float32 [rows,width]
    text: str | None = None
    step_seconds: list[float] = field(default_factory=list)


class Runner:
    """Runs requests on one checkpoint. Programs and codecs are kept from one call to the next."""

    def __init__(self, bundle: Bundle, how: How, progress: Progress | None = None):
        self.bundle, self.how, self.progress = bundle, how, progress or Quiet()
        self.seconds: dict[str, float] = {}
        self.memory: list[str] = []
        self._engines: dict[Any, Engine] = {}
        self._codecs: dict[str, Any] = {}
        self._checked: set[Any] = set()

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        self.progress.phase(name, total)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def compile(self, groups: Sequence[Group]) -> None:
        """All programs of the denoising loop, before any weight is read. ConfigError if one does not fit."""
        if not groups:
            return
        with self.phase("compiling", len(groups)):
            for g in groups:
                job = _job(g)
                try:
                    guidance.check_mesh(job.forms)
                except ValueError as e:
                    raise ConfigError(f"{g[0].name}: {e}") from e
                self.engine(job)
                if self._decodes(g[0]):
                    self._check_decoder(g[0])
                self.progress.step()

    def engine(self, job: Job) -> Engine:
        """Compiled for jobs like this one."""
        key = jax.tree.structure(job.inputs), tuple(x.shape for x in jax.tree.leaves((job.inputs, job.captions))), (
            job.forms, job.guidance.normalize, job.schedule.steps, job.schedule.noise is None, job.fresh is None,
        )  # fmt: skip
        if key not in self._engines:
            b, how = self.bundle, self.how
            whole = _merge(b.abstract("reasoner", how.precision), b.abstract("generator", how.precision))
            made = engines.build(
                whole, b.config, job, precision=how.precision, trajectory=how.trajectory,
                at_once=1 if how.watched else job.schedule.steps,
            )  # fmt: skip
            try:
                line = made.check()
            except ValueError as e:  # no mistake of ours: nothing has been read or written yet
                raise ConfigError(str(e)) from e
            self.memory.append(line)
            self.progress.say(f"memory: {line}")
            self.progress.say(_attention(job, b.config, self.how.precision))
            self._engines[key] = made
        return self._engines[key]

    def _check_decoder(self, p: Prepared) -> None:
        """ConfigError where the video VAE does not fit when its turn comes; of a transfer, beside the generator."""
        sides, how, cfg = p.blank.vision_latents.shape[2:], self.how, self.bundle.video_config
        key = ("decoder", sides, p.controls is None)
        if key in self._checked:
            return
        need = wan_memory.measure(cfg, "decode", sides, how.tile, how.precision, 1 if how.tile else CHUNK).total
        beside = held(self.bundle.abstract("generator", how.precision)) if p.controls else 0
        free = free_memory()
        if free is not None and need + beside > free:
            raise ConfigError(
                f"decoding the video needs {gib(need + beside)}, {gib(need + beside - free)} more than the {gib(free)} "
                "that are free: use bfloat16, a lower resolution, a smaller --vae_tile, or --no-decode_video."
            )
        self._checked.add(key)
        self.memory.append(f"decode {gib(need)}")
        self.progress.say(f"memory: {self.memory[-1]}")

    def _decodes(self, p: Prepared) -> bool:
        makes = task(p.resolved.task).makes_video
        return makes if self.how.decode_video is None else self.how.decode_video and makes

    @property
    def video(self) -> WanCodec:
        if "video" not in self._codecs:
            self._codecs["video"] = self.bundle.video(self.how.precision, tile=self.how.tile)
        return self._codecs["video"]

    @property
    def sound(self) -> AVAECodec:
        if "sound" not in self._codecs:
            self._codecs["sound"] = self.bundle.sound(self.how.precision)
        return self._codecs["sound"]

    def run(self, requests: Sequence[Prepared | Question]) -> Iterator[Made]:
        """Everything, in the order of the requests."""
        made = _together([r for r in requests if isinstance(r, Prepared)], shard.row_parts())
        questions = [r for r in requests if isinstance(r, Question)]
        self.compile(made)
        samples = self.encode([g[0] for g in made])
        jobs = [_job(g, s) for g, s in zip(made, samples, strict=True)]
        answers = iter(self.answer(questions))
        results = iter(self.denoise(made, samples, jobs, self.prefill(jobs)))
        for r in requests:
            if isinstance(r, Question):
                yield next(answers)
            else:
                m = next(results)
                self.decode(m)
                yield m

    def answer(self, questions: Sequence[Question]) -> list[Made]:
        """Words. The reasoner's weights, with its eye if there is something to see, leave afterwards."""
        if not questions:
            return []
        params, out = self.load("reasoner", vision=any(q.sees for q in questions)), []
        for q in questions:
            with self.phase(f"answering {q.name}", 1):
                out.append(Made(q, {}, text=q.answer(params)))
                self.progress.step()
        return out

    def encode(self, requests: Sequence[Prepared]) -> list[Sample]:
        """The samples with their conditions (those of a transfer come chunk by chunk). The VAEs then leave."""
        if not any(p.conditions.encoded for p in requests):
            return [p.blank for p in requests]
        with self.phase("encoding", len(requests)):
            out = []
            for p in requests:
                out.append(self.sample(p))
                self.progress.step()
        self._codecs.clear()
        return out

    def sample(self, p: Prepared) -> Sample:
        """The sample with its conditions encoded."""
        with shard.one_device():
            return p.conditions.sample(p.blank, lambda x: self.video.encode(x), lambda x: self.sound.encode(x))

    def prefill(self, jobs: Sequence[Job]) -> list[Any]:
        """Keys and values of all captions; with several jobs they wait on the host. The text tower then leaves."""
        if not jobs:
            return []
        params, out = self.load("captions"), []
        with self.phase("reading captions", len(jobs)):
            for job in jobs:
                cache = self.engine(job).prefill(params, job)
                out.append(jax.block_until_ready(cache) if len(jobs) == 1 else jax.device_get(cache))
                self.progress.step()
        return out

    def denoise(
        self, groups: Sequence[Group], samples: Sequence[Sample], jobs: Sequence[Job], caches: Sequence[Any]
    ) -> list[Made]:
        """Latents of every request; the generator's weights then leave."""
        if not groups:
            return []
        params, out = self.load("generator"), []
        for g, s, job, cache in zip(groups, samples, jobs, caches, strict=True):
            if g[0].controls:
                out.append(self._transfer(params, g[0], cache))
                continue
            with self.phase(f"denoising {', '.join(p.name for p in g)}", job.schedule.steps):
                out += self.several(params, g, s, job, cache)
        return out

    def _transfer(self, params: dict, p: Prepared, cache: Any) -> Made:
        """Chunk after chunk; each is decoded, because the next one starts from its last frames."""
        controls = p.controls
        assert controls is not None
        count = len(controls.plan.starts)
        made: list[Made] = []
        parts: list[tuple[np.ndarray, int]] = []
        for i in range(count):
            with self.phase(f"denoising {p.name}, chunk {i + 1} of {count}", p.schedule.steps):
                q, shown = p.chunk(i, parts[-1][0] if parts else None)
                s = self.sample(q)
                made.append(self.one(params, q, s, q.job(s), cache))
                with shard.one_device():
                    parts.append((self.video.decode_float(made[-1].latents["vision"]), shown))
        with shard.one_device():
            clip = transfer.beside(pixels(transfer.join(parts, controls.plan.total)), controls, p.resolved)
        whole = Made(p, _stack([m.latents for m in made]), video=clip)
        whole.steps = _stack([m.steps for m in made if m.steps is not None])
        whole.step_seconds = [t for m in made for t in m.step_seconds]
        return whole

    def one(self, params: dict, p: Prepared, s: Sample, job: Job, cache: Any) -> Made:
        """Denoise a job that holds one request."""
        return self.several(params, (p,), s, job, cache)[0]

    def several(self, params: dict, group: Group, s: Sample, job: Job, cache: Any) -> list[Made]:
        """Denoise one job, whose rows are these requests."""
        times = [time.perf_counter()]

        def tick(_: int) -> None:
            times.append(time.perf_counter())
            self.progress.step()

        result = self.engine(job).denoise(params, cache, job, tick)
        buffers, path = result if self.how.trajectory else (result, None)
        host = jax.device_get(buffers)
        each_took = np.diff(times)
        if not self.how.watched:  # one call: nobody knows more than the mean
            each_took = np.full(len(each_took), each_took.mean())
        return [
            Made(
                p, self._unpack(host, job, s, row), None if path is None else self._path(path, job, s, row),
                step_seconds=each_took.tolist(),
            )
            for row, p in enumerate(group)
        ]  # fmt: skip

    def _path(self, path: dict, job: Job, s: Sample, row: int) -> dict[str, np.ndarray]:
        """The latents after every step."""
        each = [
            self._unpack({n: x[i] for n, x in path.items() if x.size}, job, s, row) for i in range(job.schedule.steps)
        ]
        return {n: np.stack([e[n] for e in each]) for n in each[0]}

    def _unpack(self, buffers: dict, job: Job, s: Sample, row: int) -> dict[str, np.ndarray]:
        return unpack(buffers, job.batch, row, 0, s, self.bundle.config.sequence)

    def decode(self, m: Made) -> None:
        """Latents → actions, waves, pixels. Numbers first; video only where it is made and wanted."""
        assert isinstance(m.request, Prepared)
        with self.phase("decoding"), shard.one_device():
            self.finish(m)
            if self._decodes(m.request) and m.video is None:
                m.video = self.video.decode(m.latents["vision"])

    def finish(self, m: Made) -> None:
        """Everything but the video."""
        p = m.request
        assert isinstance(p, Prepared)
        row = task(p.resolved.task)
        if row.action == "noisy":
            m.actions = p.conditions.finish(m.latents["action"])
        if "sound" in m.latents and row.sound != "clean":
            m.sound = self.sound.decode(np.ascontiguousarray(m.latents["sound"]))

    def load(self, job: str, vision: bool = False) -> dict:
        """Weights straight from their files to the device."""
        with self.phase(f"loading {job}"):
            return jax.block_until_ready(self.bundle.load(job, self.how.precision, vision))


def _together(requests: Sequence[Prepared], rows: int) -> list[Group]:
    """Neighbours that are seeds of one request, up to `rows` in a job: rows that a mesh would else leave empty."""
    out: list[list[Prepared]] = []
    for p in requests:
        if out and len(out[-1]) < rows and p.shares and out[-1][0].resolved is p.resolved:
            out[-1].append(p)
        else:
            out.append([p])
    return list(out)


def _job(group: Group, sample: Sample | None = None) -> Job:
    return group[0].job(sample, [p.seed for p in group])


def _attention(job: Job, cfg: ModelConfig, precision: Precision) -> str:
    """How the generator's attention is computed."""
    b, branches = job.batch, max(map(len, job.forms))
    (rows, gen), und = b["gen_segment_ids"].shape, b["und_segment_ids"].shape[1]
    how = dict(impl=cfg.attention, dtype=precision.dtype)
    return attention.describe(rows * branches, cfg.heads, gen, und + gen, **how)


def _merge(reasoner: dict, generator: dict) -> dict:
    """Abstract parameters of both jobs in one tree: they share nothing but "layers"."""
    return reasoner | generator | {"layers": reasoner["layers"] | generator["layers"]}


def _stack(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One chunk as it is; several with an axis of chunks in front."""
    if len(parts) <= 1:
        return dict(parts[0]) if parts else {}
    return {n: np.stack([x[n] for x in parts]) for n in parts[0]}
