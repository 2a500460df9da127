"""`parity.pipeline.Ours`, answered by the pipeline that `generate --request` runs.

In: the path of a request. Out: its tokens and positions, its velocities at given latents, and everything on our own.
Texts, media, packing, engine and codecs are those of cosmos_jax/inference; the schedule is the checkpoint's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conversion.folder import Folder
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.inference.job import How, Prepared
from cosmos_jax.inference.noise import FRESH, buffers, wide
from cosmos_jax.inference.requests import plan
from cosmos_jax.inference.run import Runner
from cosmos_jax.parity import denoise
from cosmos_jax.parity.pipeline import Factory, Made
from cosmos_jax.parity.pipeline_trace import Branch, Latents
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import generate
from cosmos_jax.sampling import guidance as guiding
from data_pipelines import request_file
from data_pipelines.packing import unpack
from data_pipelines.sample import Sample, vision_items
from data_pipelines.schema import MODALITIES

NAMES = {"cond": "cond", "uncond": "uncond", "free": "cond_no_control"}  # our branches → the protocol's


def connect(folder: Folder, precision: Precision) -> Factory:
    """`parity.pipeline.Connect`."""
    bundle = Bundle.open(folder.path)
    params = {name: bundle.load(name, precision) for name in ("captions", "generator")}
    return lambda path: Request(bundle, params, precision, path)


class Request:
    """One request file."""

    def __init__(self, bundle: Bundle, params: dict[str, dict], precision: Precision, path: Path):
        self.bundle, self.params = bundle, params
        convention = _convention(json.loads(path.read_text()))
        how = How(convention=convention, precision=precision, trajectory=True, own_schedule=True)
        (request,) = request_file.read(path)
        (prepared,) = plan(request, bundle, how)
        assert isinstance(prepared, Prepared)
        self.prepared = prepared
        self.config, self.precision = bundle.config, precision
        first, _ = self._chunk(0)
        job = first.job()
        self.form = guiding.union(job.forms)
        batches = self._batches(job)
        self.branches: Mapping[str, Branch] = {NAMES[b]: _branch(batches[b]) for b in self.form}
        self.noisy: Mapping[str, np.ndarray] = _noisy(job.batch, first.blank)
        self.domain = first.blank.domain if first.blank.actions is not None else None
        self.sigmas, self.timesteps = job.schedule.sigmas, job.schedule.timesteps

    def _chunk(self, i: int, before: np.ndarray | None = None) -> tuple[Prepared, int]:
        """What is one loop: the request itself, or a chunk of a transfer."""
        p = self.prepared
        if p.controls is None:
            return p, 0
        if i and before is None:  # of the reference's latents: only how many frames come before counts
            before = np.zeros((p.controls.plan.frames, p.resolved.height, p.resolved.width, 3), np.float32)
        return p.chunk(i, before)

    def _batches(self, job: generate.Job) -> dict[str, Any]:
        out = {"cond": job.batch, "uncond": job.uncond}
        hidden = job.controls if "free" in guiding.union(job.forms) else None
        return out | ({} if hidden is None else {"free": guiding.without(job.batch, jnp.asarray(hidden))})

    def forced(
        self, loop: int, latents: Sequence[Latents], context: Sequence[np.ndarray], fresh: Sequence[Latents]
    ) -> Iterator[tuple[dict[str, Latents], Latents]]:
        p, _ = self._chunk(loop)
        s = _with(p.blank, latents[0], context)
        job = p.job(s)
        batches = self._batches(job)
        rows = guiding.stack(*(batches[b] for b in self.form))
        captions = generate.prefill(self.params["captions"], job.captions, cfg=self.config, precision=self.precision)
        cache = guiding.pick(captions, guiding.captions(self.form), self.form)
        state = None
        for i, given in enumerate(latents):
            x = jax.tree.map(jnp.asarray, self._buffers(given, job, s))
            state = generate.start(x) if state is None else state._replace(x=x)
            drawn = self._buffers(fresh[i], job, s) if fresh else None
            row = {k: v[i] for k, v in job.rows.items()}
            v, state = denoise.step(
                self.params["generator"], self.config, rows, cache, state, row, drawn, self.precision, self.form
            )
            each = [self._arrays(jax.tree.map(lambda a, k=k: a[k : k + 1], v), job, s) for k in range(len(self.form))]
            after = _with_clean(self._arrays(state.x, job, s), given, _noisy(job.batch, s))
            yield {NAMES[b]: e for b, e in zip(self.form, each, strict=True)}, after

    def free(self, noise: Sequence[Latents], fresh: Sequence[Sequence[Latents]]) -> Made:
        runner = Runner(self.bundle, self.prepared.how)
        out, parts, before, cache = Made([], [], None), [], None, None
        for k, given in enumerate(noise):
            drawn = fresh[k][0] if fresh[k] else ()
            arrays = dict(given) | {n + FRESH: np.stack([f[n] for f in fresh[k]]) for n in drawn}
            p, seen = self._chunk(k, before)
            p = dataclasses.replace(p, how=dataclasses.replace(p.how, noise=arrays))
            s = runner.sample(p)
            job = p.job(s)
            engine = runner.engine(job)
            cache = engine.prefill(self.params["captions"], job) if cache is None else cache
            made = runner.one(self.params["generator"], p, s, job, cache)
            start = generate.begin(job.batch, jax.tree.map(jnp.asarray, job.noise), self.config).x
            steps = {n: wide(n, x, self.config.sequence) for n, x in (made.steps or {}).items()}
            after = [{n: x[i] for n, x in steps.items()} for i in range(len(self.timesteps))]
            out.latents.append([self._arrays(start, job, s), *after])
            out.context.append(list(s.context))
            if self.noisy["vision"].any():
                before = runner.video.decode_float(made.latents["vision"])
                parts.append(before[seen:])
            runner.finish(made)
            out.wave, out.actions = made.sound, made.actions
        if parts:
            total = self.prepared.resolved.frames
            out.video = np.concatenate(parts)[:total] / 2 + 0.5
        return out

    def _buffers(self, latents: Latents, job: generate.Job, s: Sample) -> dict[str, np.ndarray]:
        """Latents of the target in the job's buffers; the context's stay."""
        made = buffers(latents, job.batch, s, self.config.sequence)
        used = {n: x for n, x in made.items() if x.size}
        if s.context:
            used["vision"] = np.where(job.controls[..., None], job.batch["vision_x0"], used["vision"])
        return used

    def _arrays(self, x: dict, job: generate.Job, s: Sample) -> Latents:
        host = {n: np.asarray(a, np.float32) for n, a in x.items() if a.size}
        found = unpack(host, job.batch, 0, 0, s, self.config.sequence)
        return {n: wide(n, a, self.config.sequence) for n, a in found.items()}


def _convention(request: dict) -> str:
    """diffusers', but for what only the framework has: edits, and weighted controls."""
    weighted = any(isinstance(v, dict) and "weight" in v for v in request.values())
    return "framework" if weighted or request.get("model_mode") == "image2image" else "diffusers"


def _branch(batch: dict) -> Branch:
    """What a branch reads and where its tokens lie; hidden tokens are not there."""
    und, gen = (np.asarray(batch[f"{n}_segment_ids"])[0] == 0 for n in ("und", "gen"))
    positions = {"text": np.asarray(batch["und_positions"])[0][:, und]}
    for m in MODALITIES:
        index = np.asarray(batch[f"{m}_index"])[0]
        index = index[index >= 0]
        index = index[gen[index]]
        if len(index):
            positions[m] = np.asarray(batch["gen_positions"])[0][:, index]
    return Branch(np.asarray(batch["und_ids"])[0][und], positions)


def _noisy(batch: dict, s: Sample) -> dict[str, np.ndarray]:
    """Modality → what is made, per latent frame of the target, sound latent, action row."""
    out = {}
    for m in MODALITIES:
        marks = np.asarray(batch[f"{m}_noisy"])[0][np.asarray(batch[f"{m}_segment_ids"])[0] == 0]
        if len(marks) and m == "vision":
            per_item = len(marks) // len(vision_items(s))
            marks = marks[-per_item:].reshape(s.vision_latents.shape[1], -1)[:, 0]
        if len(marks):
            out[m] = marks
    return out


def _with(blank: Sample, latents: Latents, context: Sequence[np.ndarray]) -> Sample:
    """The reference's latents as the sample's: the clean ones are its conditions."""
    new: dict[str, Any] = {"vision_latents": latents["vision"], "context": tuple(context)}
    if "sound" in latents:
        new["sound_latents"] = latents["sound"]
    if "action" in latents:
        new["actions"] = latents["action"][:, : blank.actions.shape[1]]
    return dataclasses.replace(blank, **new)


def _with_clean(after: Latents, before: Latents, noisy: dict[str, np.ndarray]) -> Latents:
    """Conditions are put back after every step, as the engine does."""
    shape = {"vision": (1, -1, 1, 1), "sound": (1, -1), "action": (-1, 1)}
    return {m: np.where(noisy[m].reshape(shape[m]), x, before[m]) for m, x in after.items()}
