"""A trained model ready for use: samples in, media and text out.

In: a working directory (checkpoint and assets). Out: video, sound, actions, answers. Training samples and requests pass
the same plan, packer and model; what a request does not give is a target, and its latents are zeros until sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from cosmos_jax import checkpoint, precision
from cosmos_jax.config import Config
from cosmos_jax.model import cosmos
from cosmos_jax.sampling import generate, schedules, text
from data_pipelines.packing import Planned, fill, plan, tight_bucket, unpack
from data_pipelines.sample import Sample
from data_pipelines.tasks import task
from data_pipelines.toy_world.samples import ToyAssets

ASSETS, CHECKPOINTS = "assets", "checkpoints"


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came out for one sample; None where the task makes nothing."""

    latents: dict[str, np.ndarray]  # vision [C,T,h,w], sound [Ds,T], action [rows,width], normalised
    video: np.ndarray | None = None  # uint8 [T,H,W,3]
    sound: np.ndarray | None = None  # float32 [2,N]
    actions: np.ndarray | None = None  # float32 [rows,width], raw units


class Pipeline:
    def __init__(self, config: Config, params: dict, assets: ToyAssets):
        self.config, self.params, self.assets = config, params, assets
        self.precision = precision.resolve(config.precision)
        self.spec = config.model.sequence
        self.applied: dict[str, dict] = {}  # task → sampling settings last used, for run.json

    @classmethod
    def load(cls, workdir: str | Path, which: str = "ema") -> Pipeline:
        """The latest complete checkpoint of a working directory. which: "ema" or "params".

        CheckpointError or ValueError, one sentence each, when something is missing or does not belong together.
        """
        workdir = Path(workdir)
        directory = workdir / CHECKPOINTS
        config = checkpoint.load_config(directory)
        assets = ToyAssets.load(workdir / ASSETS)
        stored = checkpoint.load_json(directory, "assets").get("codecs")
        if stored and stored != assets.fingerprint:
            raise ValueError(
                f"{workdir / ASSETS} has codecs {assets.fingerprint}, the checkpoint was trained with {stored}; "
                "restore the assets of that run."
            )
        if which == "ema" and not config.optim.ema:
            which = "params"
        params = checkpoint.load_params(directory, which, cosmos.abstract(config.model), config=config)
        return cls(config, params, assets)

    def settings(self, name: str, **overrides) -> dict:
        """Sampling settings of a task: the config's, guidance only where the task uses it, then the overrides.

        Every value that is used is in the result; nothing is applied silently.
        """
        s = self.config.sample
        guided = task(name).guidance != 1.0
        chosen = dict(solver=s.solver, steps=s.steps, shift=s.shift, guidance=s.guidance if guided else 1.0, seed=s.seed)
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
        rows = min(rows, 1 << (len(samples) - 1).bit_length())  # powers of two: few compiled shapes
        planned = [plan(s, self.assets.tokenizer, self.spec) for s in samples]
        empty = []
        if guidance != 1:
            empty = [plan(dataclasses.replace(s, prompt=""), self.assets.tokenizer, self.spec) for s in samples]
        bucket = tight_bucket([*planned, *empty], rows, round_to=16)

        def batch(which: list[Planned]) -> dict[str, np.ndarray]:
            return fill([[p] for p in which], bucket, self.spec)

        cond = batch(planned)
        shapes = {(i, 0): (seed, [s.vision_latents.shape]) for i, (s, seed) in enumerate(zip(samples, seeds, strict=True))}
        noise = generate.framework_buffers(cond, shapes, self.config.model.patch)
        buffers = generate.sample_latents(
            self.params, self.config.model, cond, noise, schedule, guidance, precision=self.precision,
            uncond=batch(empty) if empty else None, progress=progress,
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
        """Answers to `reason` samples. overrides: fields of SampleConfig (max_new_tokens, temperature, top_k, top_p)."""
        how = dataclasses.replace(self.config.sample, **{k: v for k, v in overrides.items() if v is not None})
        self.applied["reason"] = {
            k: getattr(how, k) for k in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        }
        tok, out = self.assets.tokenizer, []
        for i in range(0, len(samples), rows):
            part = [dataclasses.replace(s, answer=None) for s in samples[i : i + rows]]
            planned = [plan(s, tok, self.spec) for s in part]
            n = min(rows, 1 << (len(part) - 1).bit_length())
            batch = fill([[p] for p in planned], tight_bucket(planned, n, round_to=16), self.spec)
            ids = text.generate_text(
                self.params, self.config.model, batch, how, eos=(tok.eos,), precision=self.precision
            )
            out += [tok.decode(row).strip() for row in np.asarray(ids)[: len(part)]]
        return out
