"""From a checked request file to what the runner runs.

In: a `Request`, the checkpoint's `Bundle`. Out: one `Prepared` (or `Question`) per result. The media are read here, on
the host; no weight is.
"""

from __future__ import annotations

import dataclasses

from cosmos_jax.inference import conditions, transfer
from cosmos_jax.inference.answers import Question, ask
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.inference.job import How, Prepared, prepare
from data_pipelines.request_facts import FAMILIES, Facts, Resolved
from data_pipelines.request_fields import Request
from data_pipelines.request_resolve import resolve
from data_pipelines.request_values import RequestError

Item = Prepared | Question


def facts(bundle: Bundle) -> Facts:
    """What this checkpoint can do, and its family's defaults."""
    cfg = bundle.config
    family = "edge" if cfg.mlp_act == "relu2" else "super" if cfg.hidden > 4096 else "nano"
    distilled = bundle.fixed_sigmas if bundle.generates else None
    return dataclasses.replace(
        FAMILIES[family], name=bundle.path.name, generates=bundle.generates, sees=cfg.vision is not None,
        sound=bool(cfg.sound_dim) and bundle.has("sound_tokenizer"), action_dim=cfg.action_dim,
        steps=len(distilled) if distilled else 0, temporal=cfg.temporal_factor,
        spatial=bundle.video_config.spatial if bundle.has("vae") else FAMILIES[family].spatial,
    )  # fmt: skip


def plan(request: Request, bundle: Bundle, how: How) -> list[Item]:
    """One for each seed of the request. ValueError, one sentence."""
    r = resolve(request, facts(bundle), how.convention)
    try:
        if r.task == "reason":
            return [ask(r, bundle, how.precision, seed) for seed in r.seeds]
        rate = bundle.sound_config.sampling_rate if r.sound else 0
        seen = conditions.read(r, how.convention, rate)
        controls = transfer.read(r, how.convention) if r.task == "transfer" else None
        return [prepare(r, bundle, how, seen, seed, controls) for seed in r.seeds]
    except ValueError as e:
        raise RequestError(f"{request.where}: {e}") from e


def lines(r: Resolved) -> list[str]:
    """What a user should read before it runs: every default, note and warning."""
    sizes = f"{r.width}×{r.height}, {r.frames} frames at {r.fps:g}/s" if r.frames else "words"
    out = [f"{r.name}: {r.task}, {sizes}" + (", with sound" if r.sound else "")]
    out += [f"{r.name}: not given, so default: {', '.join(r.defaults)}"] if r.defaults else []
    out += [f"{r.name}: {note}" for note in r.notes]
    return out + [f"{r.name}: WARNING: {w}" for w in r.warnings]
