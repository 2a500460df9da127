"""`generate` and `reason`: files and words in, media and answers out; and the samples drawn during training.

In: options. Out: PNG, MP4 with sound, WAV, JSON actions, and run.json: all that is needed to make them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from cosmos_jax import media, outputs
from cosmos_jax.cli import request
from cosmos_jax.cli.options import SPELT, config_of, require
from cosmos_jax.config import ConfigError
from cosmos_jax.pipeline import CANVAS, CHECKPOINTS, Pipeline
from cosmos_jax.sampling import schedules
from data_pipelines.sample import Sample
from data_pipelines.tasks import task

Work = Callable[[], int | None]
INPUTS = ("image", "video", "actions")


def prepare_generate(options) -> Work:
    """Check a `generate` request; the work writes its files."""
    if options.request:
        return request.prepare(options)
    only = {
        "media", "mesh", "resolution", "aspect_ratio", "sound_file", "noise", "dump_latents", "decode_video",
        "progress", "vae_tile", "prompt_convention", "precision",
    }  # fmt: skip
    if extra := sorted(n for n in only if getattr(options, n) is not None):
        name = SPELT.get(extra[0], extra[0])
        raise ConfigError(f"--{name} goes with --request; give a request file, or leave it out.")
    if options.task is None:
        raise ConfigError("generate needs --task; `show` lists the tasks.")
    row = task(options.task)
    require(options, "out")
    if options.scale < 1:
        raise ConfigError(f"--scale={options.scale} must be at least 1.")
    pipeline, where = open_pipeline(options)
    sample = _sample(pipeline, options, row.name)
    if not row.generates:
        return lambda: _answer(pipeline, sample, options, where, Path(options.out))
    given = {k: getattr(options, k) for k in ("solver", "steps", "guidance", "shift", "seed")}
    settings = pipeline.settings(row.name, **given)
    schedules.build(settings["solver"], settings["steps"], settings["shift"])  # refuses what cannot be
    return lambda: _generate(pipeline, sample, options, where, settings)


def prepare_reason(options) -> Work:
    """Check a question; the work prints the answer."""
    pipeline, where = open_pipeline(options)
    sample = _sample(pipeline, options, "reason")
    return lambda: _answer(pipeline, sample, options, where, None)


def open_pipeline(options) -> tuple[Pipeline, Path]:
    """The model of --checkpoint (or --workdir) and its working directory.

    --config is optional: settings then come from it, and it must describe the checkpoint's model.
    """
    directory = options.checkpoint or options.workdir
    if not directory:
        raise ConfigError(f"{options.command} needs --checkpoint, the working directory of a training run.")
    where = Path(directory)
    if not where.is_dir():
        raise ConfigError(f"there is no directory {where}; --checkpoint takes the --workdir of a training run.")
    if where.name == CHECKPOINTS:
        where = where.parent
    if options.overrides and not options.config:
        raise ConfigError("settings like --config.sample.steps=8 need --config too.")
    return Pipeline.load(where, options.params, config=config_of(options) if options.config else None), where


def _sample(pipeline: Pipeline, options, name: str) -> Sample:
    """The request as a Sample. Pictures are brought to the model's size."""
    given: dict[str, Any] = {k: getattr(options, k, None) for k in ("sound", "num_frames")}
    if options.image:
        given["image"] = media.fit(media.read_image(options.image), CANVAS.height, CANVAS.width)
    if options.video:
        frames, given["fps"] = media.read_video(options.video)
        given["video"] = media.fit(frames, CANVAS.height, CANVAS.width)
    if getattr(options, "actions", None):
        given["actions"] = media.read_actions(options.actions)
    return pipeline.request(name, options.prompt, **given)


def _generate(pipeline: Pipeline, sample: Sample, options, where: Path, settings: dict) -> None:
    console = Console(soft_wrap=True, highlight=False)
    assert sample.vision_latents is not None
    _, latent_frames, h, w = sample.vision_latents.shape
    used = settings | {
        "num_frames": 1 + pipeline.spec.temporal_factor * (latent_frames - 1), "fps": sample.fps,
        "height": h * CANVAS.spatial, "width": w * CANVAS.spatial,
        "sound": sample.sound_latents is not None, "prompt": sample.prompt,
    }  # fmt: skip
    defaults = [k for k in used if getattr(options, k, None) is None]
    console.print(f"{sample.task}: " + ", ".join(f"{k} {v}" for k, v in used.items() if k != "prompt"), markup=False)
    console.print(f"Not given, so default: {', '.join(defaults)}.", markup=False)
    begin = time.perf_counter()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("denoising", total=settings["steps"])
        made = pipeline.generate([sample], progress=lambda _: progress.update(bar, advance=1), **settings)[0]
    seconds = time.perf_counter() - begin
    out = Path(options.out)
    files = outputs.write(
        out, video=made.video, sound=made.sound, actions=made.actions, fps=sample.fps, rate=CANVAS.sound_rate,
        scale=options.scale,
    )  # fmt: skip
    _record(out, options, where, used, defaults, files, seconds)
    console.print(f"Wrote {', '.join(files)} and run.json to {out} in {seconds:.1f} s, compilation included.")


def _answer(pipeline: Pipeline, sample: Sample, options, where: Path, out: Path | None) -> None:
    begin = time.perf_counter()
    answer = pipeline.reason([sample], seed=options.seed)[0]
    print(answer)
    if out is None:
        return
    files = outputs.write(out, text=answer)
    used = pipeline.applied["reason"] | {"prompt": sample.prompt, "fps": sample.fps}
    defaults = [k for k in used if getattr(options, k, None) is None]
    _record(out, options, where, used, defaults, files, time.perf_counter() - begin)


def _record(out: Path, options, where: Path, used: dict, defaults: list[str], files: list[str], seconds: float) -> None:
    """Write run.json."""
    report = {
        "task": options.task, "checkpoint": str(where), "params": options.params, **used, "defaults": defaults,
        "inputs": {k: v for k in INPUTS if (v := getattr(options, k))}, "seconds": round(seconds, 3),
    }  # fmt: skip
    outputs.record(out, report, files)


def sampler(config, assets, workdir: Path) -> Callable[[int, dict], None]:
    """on_sample of `train`: two development clips, continued from their first frame, as workdir/samples/step_<n>.png.

    Rows: truth, generated, truth, generated; columns: every fourth frame.
    """
    from cosmos_jax import dist, optim
    from cosmos_jax import state as states
    from data_pipelines.toy_world.samples import make_sample
    from data_pipelines.toy_world.stream import held_out

    episodes = list(held_out(2, "development"))
    samples = [make_sample(assets.encode(e), "image2video", with_sound=False) for e in episodes]

    def draw(step: int, state: dict) -> None:
        state = states.wake(config, state)
        pipeline = Pipeline(config, optim.join(state["ema"], state["params"]), assets)
        made = pipeline.generate(samples)
        if not dist.first():
            return
        rows = [v[::4] for e, g in zip(episodes, made, strict=True) for v in (e.video, g.video) if v is not None]
        grid = np.concatenate([np.concatenate(list(r), 1) for r in rows])
        (workdir / "samples").mkdir(exist_ok=True)
        media.write_png(workdir / "samples" / f"step_{step}.png", grid, 2)

    return draw
