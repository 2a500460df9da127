"""One request, decided and packed: what the engine denoises.

In: a `Resolved` request, the checkpoint's `Bundle`, how to do it (`How`). Out: `Prepared`, made without any weight;
with the conditions encoded it becomes an engine `Job`. Everything a user can get wrong is found here, in one sentence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from cosmos_jax import shard
from cosmos_jax.inference import noise
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.inference.conditions import Conditions
from cosmos_jax.inference.transfer import Controls
from cosmos_jax.precision import Precision
from cosmos_jax.sampling import scheduler_config, schedules
from cosmos_jax.sampling.generate import Job, framework_buffers
from cosmos_jax.sampling.guidance import Guidance
from cosmos_jax.sampling.schedules import Schedule
from data_pipelines import prompts, transfer
from data_pipelines.packing import context_tokens, fill, plan, tight_bucket
from data_pipelines.request_resolve import Resolved
from data_pipelines.sample import Sample, vision_items
from data_pipelines.schema import MODALITIES
from data_pipelines.tasks import ALL, task

ROUND = 16  # slots of a batch are rounded up, so that prompts of nearly the same length share a program


@dataclass(frozen=True, kw_only=True)
class How:
    """What the command line decides. convention: of texts, media and schedule ("framework" or "diffusers")."""

    convention: str = "framework"
    precision: Precision = Precision("float32")
    noise: dict[str, np.ndarray] | None = None  # from a file, instead of a seed
    trajectory: bool = False  # keep the latents after every step
    decode_video: bool | None = None  # None: where the task makes video
    tile: int | None = None  # latents per side that the video VAE works on at a time; None: whole frames
    own_schedule: bool = False  # the checkpoint's schedule whatever the convention (parity)
    watched: bool = False  # call the compiled loop step by step, so that somebody sees it advance


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to run. `seed` is one of the request's."""

    resolved: Resolved
    bundle: Bundle = field(repr=False)
    how: How
    prompts: prompts.Prompts
    conditions: Conditions = field(repr=False)
    schedule: Schedule = field(repr=False)
    solver: str  # a line about the schedule
    guidance: Guidance
    blank: Sample = field(repr=False)  # zeros where conditions will be, and where something is made
    seed: int
    controls: Controls | None = field(default=None, repr=False)  # of a transfer

    @property
    def name(self) -> str:
        """Of its folder: the request's, and a number if it asks for several results."""
        r = self.resolved
        return r.name if len(r.seeds) == 1 else f"{r.name}/{r.seeds.index(self.seed)}"

    def chunk(self, i: int, before: np.ndarray | None) -> tuple[Prepared, int]:
        """Chunk i of a transfer, after the decoded frames `before`; and how many of its frames those show already."""
        controls, q = self.controls, self.resolved.request
        assert controls is not None
        if before is not None:
            clip = transfer.seed(before, q.num_conditional_frames)
        elif controls.given is not None:
            first = transfer.seed(controls.given, q.num_first_chunk_conditional_frames, "first")
            clip = transfer.pixels(first, controls.convention)
        else:
            clip = np.zeros((0,))
        clean = tuple(range(1 + (len(clip) - 1) // self.bundle.video_config.temporal)) if len(clip) else ()
        given = self.how.noise
        if given is not None and len(controls.plan.starts) > 1:
            given = {n: x[i] for n, x in given.items()}
        made = dataclasses.replace(
            self, seed=self.seed + i, controls=None, how=dataclasses.replace(self.how, noise=given),
            conditions=dataclasses.replace(self.conditions, clip=clip if clean else None, context=controls.chunk(i)),
            blank=dataclasses.replace(self.blank, clean_frames=clean),
        )  # fmt: skip
        return made, 0 if before is None else min(q.num_conditional_frames, len(before))

    @property
    def spec(self):
        return self.bundle.config.sequence

    def pack(self, sample: Sample | None = None, count: int = 1) -> tuple[dict, dict | None, np.ndarray | None]:
        """The batch of the prompt, and that of the negative one if a step is guided: packed alike, the sample in the
        first `count` rows; empty rows follow where a mesh splits the rows into more parts.

        Third: [B,V] bool, the tokens of the context, which control guidance hides; None without a context.
        """
        s = self.blank if sample is None else sample
        positive = dataclasses.replace(s, prompt=self.prompts.positive, system=self.prompts.system)
        texts = [positive]
        if self.guidance.text != 1:
            texts.append(dataclasses.replace(positive, prompt=self.prompts.negative))
        rounded = self.how.convention == "framework"  # its frame rates are bfloat16 (spec model.md §4.4)
        planned = [plan(s, self.bundle.tokenizer, self.spec, rounded) for s in texts]
        parts = shard.row_parts()
        bucket = tight_bucket(planned, -(-count // parts) * parts, math.lcm(ROUND, shard.parts("token_cp_tp")))
        batches = [fill([[p]] * count, bucket, self.spec) for p in planned]
        hidden = context_tokens([planned[:1]] * count, bucket) if s.context else None
        return batches[0], batches[1] if len(batches) > 1 else None, hidden

    @property
    def shares(self) -> bool:
        """Whether other seeds of the request may be rows of its job: its noise is that of its seed, all of it."""
        return self.controls is None and self.how.noise is None and self.schedule.noise is None

    def job(self, sample: Sample | None = None, seeds: Sequence[int] = ()) -> Job:
        """For the engine. sample: `blank` with its conditions encoded; None: the same shapes, to compile for.

        seeds: of results in one job, a row for each (default: this one's); only where `shares` says so.
        """
        seeds = seeds or (self.seed,)
        batch, uncond, hidden = self.pack(sample, len(seeds))
        given = self.how.noise
        if sample is None:
            made = {n: np.zeros_like(batch[f"{n}_x0"]) for n in MODALITIES}  # only the shapes count
        elif given is None:
            items = [x.shape for x in vision_items(sample)]
            drawn = {(row, 0): (seed, items) for row, seed in enumerate(seeds)}
            made = framework_buffers(batch, drawn, self.spec.patch)
        else:
            made = noise.buffers(given, batch, sample, self.spec)
        fresh, key = None, None
        if self.schedule.noise is not None:
            fresh, key = self._fresh(batch, self.blank if sample is None else sample), jax.random.key(self.seed)
        return Job(
            batch, made, self.schedule, self.guidance, uncond, hidden, None if fresh else key, fresh,
        )  # fmt: skip

    def _fresh(self, batch: dict, s: Sample) -> dict | None:
        """What a distilled sampler adds, from the file of noise: buffers with a leading axis of steps."""
        arrays = self.how.noise or {}
        given = {n.removesuffix(noise.FRESH): x for n, x in arrays.items() if n.endswith(noise.FRESH)}
        if not given:
            return None
        each = [
            noise.buffers({n: x[i] for n, x in given.items()}, batch, s, self.spec) for i in range(self.schedule.steps)
        ]
        return {n: np.stack([b[n] for b in each]) for n in each[0]}

    def record(self) -> dict[str, Any]:
        """For run.json: everything that decided numbers."""
        ids = self.bundle.tokenizer
        g = self.guidance
        return self.resolved.record() | {
            "seed": self.seed, "convention": self.how.convention, "precision": self.how.precision.compute,
            "solver": self.solver, "steps": self.schedule.steps,
            "guidance_applied": dataclasses.asdict(g),
            "noise": "from a file" if self.how.noise else "numpy RandomState of the seed, as cosmos-framework",
            "texts": self.prompts._asdict(),
            "tokens": {
                n: len(ids.generation_ids(text, self.prompts.system))
                for n, text in (("positive", self.prompts.positive), ("negative", self.prompts.negative))
            },
            "conditions": self.conditions.record,
        }  # fmt: skip


def prepare(
    r: Resolved, bundle: Bundle, how: How, conditions: Conditions, seed: int, controls: Controls | None = None
) -> Prepared:
    """Decide everything. controls: of a transfer, whose blank sample is that of a chunk."""
    row, request = task(r.task), r.request
    frames = controls.plan.frames if controls else r.frames
    schedule, solver = _schedule(r, bundle, how)
    text = request.guidance
    if r.task == "transfer" and how.convention == "diffusers":
        text = max(text, 1.0)  # its transfer is guided by text only above 1
    guidance = Guidance(
        text, request.control_guidance if r.task == "transfer" else 1.0, request.guidance_interval,
        request.control_guidance_interval, closed=how.convention == "diffusers", normalize=bool(request.normalize_cfg),
    )  # fmt: skip
    height, width = conditions.clip.shape[1:3] if row.action != "none" else (r.height, r.width)
    texts = prompts.build(
        how.convention, r.task, request.prompt or "", request.negative_prompt, frames=frames, fps=r.fps, height=height,
        width=width, aspect=request.aspect_ratio, controls=tuple(request.hints), view_point=request.view_point,
        emphasize=bool(request.emphasize_control_in_prompt), distilled=bundle.fixed_sigmas is not None,
        default_system_prompt=bundle.index.get("default_use_system_prompt", True),
        metadata=prompts.Metadata(**{k: getattr(request, k) for k in prompts.Metadata.__annotations__}),
    )  # fmt: skip
    made = Prepared(
        r, bundle, how, texts, conditions, schedule, solver, guidance,
        _blank(r, bundle, how, conditions, frames), seed, controls,
    )  # fmt: skip
    made.pack()  # plans and validates: whatever is wrong with the sample is said now
    if how.noise is not None:
        draws = 0 if schedule.noise is None else schedule.steps
        noise.check(how.noise, made.blank, made.spec, len(controls.plan.starts) if controls else 1, draws)
    return made


def _schedule(r: Resolved, bundle: Bundle, how: How) -> tuple[Schedule, str]:
    """The framework's grid with the request's shift; or what the checkpoint's scheduler file says (diffusers)."""
    request, sigmas = r.request, bundle.fixed_sigmas
    if sigmas is not None:
        return scheduler_config.from_config(bundle.scheduler, None, sigmas=sigmas)
    if how.convention == "framework" and not how.own_schedule:
        made = schedules.unipc(request.num_steps, request.shift)
        return made, f"UniPC of order 2, {made.steps} steps, framework's grid, shift {request.shift:g}"
    if "shift" in r.defaults:
        return scheduler_config.of_checkpoint(bundle.scheduler, bundle.index, request.num_steps)
    native = bool(bundle.index.get("use_native_flow_schedule"))
    return scheduler_config.from_config(bundle.scheduler, request.num_steps, request.shift, native=native)


def _blank(r: Resolved, bundle: Bundle, how: How, conditions: Conditions, frames: int) -> Sample:
    """The sample without its conditions' values."""
    cfg, row, video = bundle.config, task(r.task), bundle.video_config
    rows, cols = conditions.crop or (r.height // video.spatial, r.width // video.spatial)
    shape = (cfg.latent_channels, 1 + (frames - 1) // video.temporal, rows, cols)
    context: tuple[np.ndarray, ...] = ()
    if row.context == "source":
        context = tuple(_zeros((cfg.latent_channels, 1, *(n // video.spatial for n in x.shape[1:3])))
                        for x in conditions.context)  # fmt: skip
    elif row.context == "controls":
        context = (_zeros(shape),) * len(r.request.hints)
    sound, clean_sound = None, None
    if r.sound:
        c = bundle.sound_config
        whole, rest = divmod(int(frames / r.fps * c.sampling_rate), c.hop)
        sound = _zeros((cfg.sound_dim, whole + (rest > 0)))
        if row.sound == "clean" and how.convention == "framework":
            clean_sound = whole  # it makes the latent anew that the sound does not fill (spec model.md §10, 29)
    weights = tuple(h.weight for h in r.request.hints.values())
    return Sample(
        r.task, "", 0, vision_latents=_zeros(shape), sound_latents=sound, actions=conditions.actions,
        domain=conditions.record.get("domain", 0), fps=r.fps,
        clean_frames=r.clean_frames if row.action == "none" and row.clean_frames != ALL else None,
        clean_sound=clean_sound, context=context,
        weights=weights if how.convention == "framework" else (),  # diffusers: one attention over all controls
    )  # fmt: skip


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)
