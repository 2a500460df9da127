"""`generate --request=FILE`: the official request files, answered from a checkpoint folder.

In: options. Out: per request its files and run.json; for several, an index.html over them. Everything is read and
checked before a weight is (docs/generate.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from cosmos_jax import mesh, outputs
from cosmos_jax.cli.options import require
from cosmos_jax.codecs.wan.vae import check_tile
from cosmos_jax.config import ConfigError, PrecisionConfig
from cosmos_jax.inference import noise
from cosmos_jax.inference.answers import Question
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.inference.job import How, Prepared
from cosmos_jax.inference.requests import Item, lines, plan
from cosmos_jax.inference.run import Made, Runner
from cosmos_jax.precision import resolve
from cosmos_jax.report import contact
from cosmos_jax.sampling import programs
from data_pipelines import request_file

REPLACES = {  # option → key of the request
    "image": "vision_path", "video": "vision_path", "actions": "action_path", "sound_file": "sound_path",
    "prompt": "prompt", "seed": "seed", "steps": "num_steps", "guidance": "guidance", "shift": "shift",
    "num_frames": "num_frames", "sound": "enable_sound", "resolution": "resolution", "aspect_ratio": "aspect_ratio",
}  # fmt: skip
NOT_WITH = ("task", "solver", "config", "workdir")


def prepare(options) -> Callable[[], int | None]:
    """Check everything; the work generates."""
    require(options, "checkpoint", "out")
    for name in NOT_WITH:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} does not go with --request; the request says what is made.")
    for name, default in (("params", "ema"), ("scale", 4)):
        if getattr(options, name) != default:
            raise ConfigError(f"--{name} is for training runs here, not for --request; leave it out.")
    out = Path(options.out)
    _can_be_made(out, "out")
    if options.dump_latents:
        dump = Path(options.dump_latents)
        if dump.is_dir():
            raise ConfigError(f"--dump-latents={dump} is a directory; name a file.")
        _can_be_made(dump.absolute().parent, "dump-latents")
    check_tile(options.vae_tile)
    bundle = Bundle.open(options.checkpoint)
    how = How(
        convention=options.prompt_convention or "framework",
        precision=resolve(PrecisionConfig(compute=options.precision or "auto")),
        noise=noise.read(options.noise) if options.noise else None,
        trajectory=options.dump_latents is not None,
        decode_video=options.decode_video,
        tile=options.vae_tile,
        watched=sys.stdout.isatty() if options.progress is None else options.progress == "steps",
    )
    given = [n for n in ("image", "video") if getattr(options, n)]
    if len(given) > 1:
        raise ConfigError("--image and --video are both given; a request has one vision_path.")
    replaced = {key: v for n, key in REPLACES.items() if (v := getattr(options, n)) is not None}
    requests = request_file.read(Path(options.request), Path(options.media) if options.media else None, replaced)
    plans = [p for r in requests for p in plan(r, bundle, how)]
    if len(plans) > 1 and (how.noise is not None or options.dump_latents):
        raise ConfigError(
            f"--noise and --dump-latents are for one result, but {options.request} asks for {len(plans)}."
        )
    if any(isinstance(p, Question) for p in plans) and (how.noise is not None or options.dump_latents):
        raise ConfigError(f"{options.request} is answered in words; leave out --noise and --dump-latents.")
    devices = _mesh(options.mesh, bundle, plans)
    return lambda: _work(options, bundle, how, plans, out, devices)


def _mesh(words: str | None, bundle: Bundle, plans: list[Item]) -> jax.sharding.Mesh | None:
    """What --mesh says, of all devices; None: the first device alone. ConfigError for a mesh that does not fit."""
    if words is None:
        return None
    built = mesh.build(mesh.parse(words))
    seen = any(isinstance(p, Question) and p.sees for p in plans)
    mesh.check_model(bundle.config if seen else dataclasses.replace(bundle.config, vision=None), built)
    return built


def _can_be_made(folder: Path, option: str) -> None:
    """ConfigError if a file is in the way."""
    for x in (folder, *folder.parents):
        if x.exists() and not x.is_dir():
            raise ConfigError(f"--{option}: {x} is a file, not a directory; name another place.")


class _Bars:
    """Phases as bars with the time that is left."""

    def __init__(self, bars: Bars, console: Console):
        self.bars, self.console = bars, console
        self.at: Any = None

    def phase(self, name: str, total: int | None = None) -> None:
        self.finish()
        self.at = self.bars.add_task(name, total=total)

    def step(self) -> None:
        self.bars.advance(self.at)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def finish(self) -> None:
        if self.at is not None:
            task = self.bars.tasks[self.at]
            self.bars.update(self.at, completed=task.total or 1, total=task.total or 1)


def _work(options, bundle: Bundle, how: How, plans: list[Item], out: Path, devices: jax.sharding.Mesh | None) -> None:
    console = Console(soft_wrap=True, highlight=False)
    kept = programs.keep()
    console.print(_where(devices), markup=False)
    with contextlib.nullcontext() if devices is None else jax.set_mesh(devices):
        _make(options, bundle, how, plans, out, console, kept)


def _where(devices: jax.sharding.Mesh | None) -> str:
    """A line about the devices that are used."""
    first, *others = jax.devices()
    if devices is not None:
        sizes = ", ".join(f"{axis} {n}" for axis, n in devices.shape.items() if n > 1) or "one device"
        return f"mesh: {sizes}; the transformer is divided, the VAEs run on {first}"
    if others:
        return f"only {first} of {1 + len(others)} devices is used; --mesh=fsdp={1 + len(others)} divides the weights"
    return f"device: {first}"


def _make(
    options, bundle: Bundle, how: How, plans: list[Item], out: Path, console: Console, kept: programs.Programs
) -> None:
    for r in {id(p.resolved): p.resolved for p in plans}.values():
        for line in lines(r):
            console.print(line, markup=False)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    began, names = time.perf_counter(), []
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        shown = _Bars(bars, console)
        shown.say(f"denoising: {'one call a step, to be watched' if how.watched else 'all steps in one compiled call'}")
        runner = Runner(bundle, how, shown)
        common = {
            "checkpoint": bundle.identity(), "compiled programs": str(kept.directory),
            "mesh": dict(jax.sharding.get_mesh().shape),  # {}: one device
        }  # fmt: skip
        for made in runner.run(plans):
            p = made.request
            where = out / p.name if len(plans) > 1 else out
            files = _write(where, made, bundle)
            if options.dump_latents:
                noise.write(options.dump_latents, made.latents, made.steps, bundle.config.sequence)
            seconds = time.perf_counter() - began
            report = p.record() | common | {
                "seconds": round(seconds, 3), "phases": {k: round(v, 3) for k, v in runner.seconds.items()},
                "step_seconds": [round(t, 4) for t in made.step_seconds], "memory": runner.memory,
                "peak_memory": outputs.peak_memory(),
            }  # fmt: skip
            outputs.record(where, report, files)
            names.append(p.name)
            console.print(f"{where}: {', '.join(files)} and run.json, {seconds:.1f} s from the start", markup=False)
        shown.finish()
    if len(plans) > 1:
        console.print(f"Open {contact.write(out, names)} in a browser.", markup=False)
    console.print(f"{kept}", markup=False)


def _write(where: Path, made: Made, bundle: Bundle) -> list[str]:
    """Its files. H.264 quality 10 … 0 is CRF 12 … 51; pictures are PNG, so image_save_quality changes nothing."""
    r = made.request.resolved
    raw = isinstance(made.request, Prepared) and made.request.conditions.statistics is not None
    rate = bundle.sound_config.sampling_rate if made.sound is not None else 0
    quality = 10 if r.request.video_save_quality is None else r.request.video_save_quality
    return outputs.write(
        where, video=made.video, sound=made.sound, actions=made.actions, text=made.text, fps=r.fps or 24.0, rate=rate,
        units="raw" if raw else "model", crf=min(12 + 4 * (10 - quality), 51),
    )  # fmt: skip
