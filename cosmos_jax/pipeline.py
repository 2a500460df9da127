"""A trained model ready for use: samples in, media and text out.

In: a working directory (checkpoint and assets). Out: video, sound, actions, answers. Training samples and requests pass
the same plan, packer and model; what a request does not give is a target, and its latents are zeros until sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from cosmos_jax import checkpoint, precision, shard
from cosmos_jax import state as states
from cosmos_jax.codecs import toy
from cosmos_jax.config import Config
from cosmos_jax.model import attention
from cosmos_jax.sampling import generate, schedules, text
from cosmos_jax.step import make_eval_step
from data_pipelines.packing import Planned, fill, plan, tight_bucket, unpack
from data_pipelines.request import request_to_sample
from data_pipelines.sample import Sample, vision_items
from data_pipelines.tasks import task
from data_pipelines.toy_world.samples import ToyAssets

ASSETS, CHECKPOINTS = toy.DIRECTORY, "checkpoints"
CANVAS = toy.CANVAS  # what a request makes unless it says otherwise


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came out for one sample; None where the task makes nothing."""

    latents: dict[str, np.ndarray]  # vision [C,T,h,w], sound [Ds,T], action [rows,width], normalised
    video: np.ndarray | None = None  # uint8 [T,H,W,3]
    sound: np.ndarray | None = None  # float32 [2,N]
    actions: np.ndarray | None = None  # float32 [rows,width], raw units


class Pipeline:
    """Runs where its parameters are: on one device, or on the mesh that `jax.set_mesh` has entered."""

    def __init__(self, config: Config, params: dict, assets: ToyAssets):
        self.config, self.params, self.assets = config, params, assets
        self.precision = precision.resolve(config.precision)
        self.spec = config.model.sequence
        self.applied: dict[str, dict] = {}  # task → sampling settings last used, for run.json

    @classmethod
    def load(cls, workdir: str | Path, which: str = "ema", config: Config | None = None) -> Pipeline:
        """The latest complete checkpoint of a working directory. which: "ema" or "params".

        config: use these settings instead of the checkpoint's; its model must be the same. CheckpointError or
        ValueError, one sentence each, when something is missing or does not belong together.
        """
        workdir = Path(workdir)
        directory = workdir / CHECKPOINTS
        trained = checkpoint.load_config(directory)
        config = config or trained
        attention.check(config.model, precision.resolve(config.precision))
        assets = ToyAssets.load(workdir / ASSETS)
        toy.verify(assets, checkpoint.load_json(directory, "assets"), workdir / ASSETS)
        if which == "ema" and not trained.optim.ema:
            which = "params"
        params = checkpoint.load_params(directory, which, states.abstract_params(config.model), config=config)
        return cls(config, params, assets)

    def request(self, name: str, prompt: str | None = None, **media) -> Sample:
        """`data_pipelines.request.request_to_sample` with this model's assets, spec and canvas. ValueError."""
        return request_to_sample(name, prompt, assets=self.assets, spec=self.spec, canvas=CANVAS, **media)

    def settings(self, name: str, **overrides) -> dict:
        """Sampling settings of a task: the config's (its own if it has any), guidance where it is used, the overrides.

        Every value that is used is in the result; nothing is applied silently.
        """
        s = self.config.sample
        guided = task(name).guidance != 1.0
        chosen = dict(
            solver=s.solver, steps=dict(s.steps_of).get(name, s.steps), shift=dict(s.shift_of).get(name, s.shift),
            guidance=s.guidance if guided else 1.0, seed=s.seed,
        )  # fmt: skip
        return chosen | {k: v for k, v in overrides.items() if v is not None}

    def generate(
        self,
        samples: Sequence[Sample],
        *,
        rows: int = 16,
        seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        decode_video: bool | None = None,
        **overrides,
    ) -> list[Generated]:
        """Denoise samples of one task, `rows` at a time, one per row.

        overrides: solver, steps, shift, guidance, seed. seeds: one per sample (default: seed, seed+1, …).
        decode_video: default True where the task makes video.
        """
        if not samples:
            return []
        names = {s.task for s in samples}
        if len(names) > 1:
            raise ValueError(f"one task per call, got {', '.join(sorted(names))}; group the samples by task.")
        name = names.pop()
        if not task(name).generates:
            raise ValueError(f"{name} generates no latents; use Pipeline.reason.")
        used = self.applied[name] = self.settings(name, **overrides)
        seeds = [used["seed"] + i for i in range(len(samples))] if seeds is None else list(seeds)
        schedule = schedules.build(used["solver"], used["steps"], used["shift"])
        decode_video = task(name).makes_video if decode_video is None else decode_video
        out: list[Generated] = []
        for i in range(0, len(samples), rows):
            part = list(samples[i : i + rows])
            latents = self._sample(part, seeds[i : i + rows], rows, schedule, used["guidance"], progress)
            out += [self._decode(s, x, decode_video) for s, x in zip(part, latents, strict=True)]
        return out

    def _sample(self, samples, seeds, rows: int, schedule, guidance: float, progress) -> list[dict[str, np.ndarray]]:
        rows = _rows(len(samples), rows)
        planned = [plan(s, self.assets.tokenizer, self.spec) for s in samples]
        empty = []
        if guidance != 1:
            empty = [plan(dataclasses.replace(s, prompt=""), self.assets.tokenizer, self.spec) for s in samples]
        bucket = tight_bucket([*planned, *empty], rows, round_to=16)

        def batch(which: list[Planned]) -> dict[str, np.ndarray]:
            return fill([[p] for p in which], bucket, self.spec)

        cond = batch(planned)
        shapes = {
            (i, 0): (seed, [x.shape for x in vision_items(s)])
            for i, (s, seed) in enumerate(zip(samples, seeds, strict=True))
        }
        noise = generate.framework_buffers(cond, shapes, self.config.model.patch)
        buffers = generate.sample_latents(
            self.params, self.config.model, _place(cond), _place(noise), schedule, guidance, precision=self.precision,
            uncond=_place(batch(empty)) if empty else None, progress=progress,
        )  # fmt: skip
        host = jax.device_get(buffers)
        return [unpack(host, cond, i, 0, s, self.spec) for i, s in enumerate(samples)]

    def _decode(self, s: Sample, latents: dict[str, np.ndarray], decode_video: bool) -> Generated:
        a = self.assets
        frames = 1 + self.spec.temporal_factor * (latents["vision"].shape[1] - 1)
        noisy_action = task(s.task).action == "noisy"
        return Generated(
            latents,
            video=a.video.decode(latents["vision"]) if decode_video else None,
            sound=a.sound.decode(latents["sound"], int(frames / s.fps * a.sample_rate)) if "sound" in latents else None,
            actions=a.stats.denormalise(latents["action"]) if noisy_action else None,
        )

    def reason(self, samples: Sequence[Sample], *, rows: int = 32, **overrides) -> list[str]:
        """Answers to `reason` samples. overrides: of SampleConfig (max_new_tokens, temperature, top_p, penalties …)."""
        how = dataclasses.replace(self.config.sample, **{k: v for k, v in overrides.items() if v is not None})
        used = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty", "seed")
        self.applied["reason"] = {k: getattr(how, k) for k in used}
        tok, out = self.assets.tokenizer, []
        for i in range(0, len(samples), rows):
            part = [dataclasses.replace(s, answer=None) for s in samples[i : i + rows]]
            planned = [plan(s, tok, self.spec) for s in part]
            bucket = tight_bucket(planned, _rows(len(part), rows), round_to=16)
            batch = fill([[p] for p in planned], bucket, self.spec)
            ids = text.generate_text(
                self.params, self.config.model, _place(batch), how, eos=(tok.eos,), precision=self.precision
            )
            out += [tok.decode(row).strip() for row in np.asarray(ids)[: len(part)]]
        return out

    def held_out_loss(self, batches: Iterable[dict[str, np.ndarray]], seed: int = 0) -> dict[str, float]:
        """Mean of every metric of `make_eval_step` over packed batches; noise depends on seed and sample ids alone."""
        step, key = make_eval_step(self.config), jax.random.key(seed)
        rows = [jax.device_get(step(self.params, _place(batch), key)) for batch in batches]
        columns = {k: np.array([r[k] for r in rows], np.float64) for k in (rows[0] if rows else {})}
        return {k: float(x[~np.isnan(x)].mean()) if not np.isnan(x).all() else float("nan") for k, x in columns.items()}


def _rows(n: int, most: int) -> int:
    """Rows of a batch for n samples: a power of two up to `most` (few compiled shapes) that the mesh divides."""
    rows, parts = min(most, 1 << (n - 1).bit_length()), shard.row_parts()
    return -(-rows // parts) * parts


def _place(batch: dict) -> dict:
    """Rows over the data-parallel axes of the current mesh, if there is one."""
    mesh = jax.sharding.get_mesh()
    return batch if mesh.empty else jax.device_put(batch, shard.batch_sharding(mesh))
