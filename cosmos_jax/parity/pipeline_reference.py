"""What diffusers' own pipelines make of a request: every number on the way, recorded.

In: an opened folder, `Case`s. Out: a `Recorded` each: tokens, positions, noise, latents and velocities of every step,
pixels, wave, actions. The noise is numpy's and named, so both sides start from the same numbers; whatever else a
pipeline does, its own code does. Velocities are there once more in float64 and in bfloat16, from the same latents.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers import modular_pipelines
from diffusers.modular_pipelines.cosmos import denoise
from PIL import Image

from conversion.folder import Folder
from cosmos_jax import media
from cosmos_jax.parity import pipeline_loops, reference, schedule
from cosmos_jax.parity.pipeline_cases import LOOP, MODULAR, PIPELINE, Case
from cosmos_jax.parity.pipeline_trace import STATE, Latents, Probe, Recorded, Trace, masked, watch
from cosmos_jax.sampling import scheduler_config
from data_pipelines.transfer import HINTS

SAMPLED = 4  # steps of a run whose velocities are also computed in bfloat16
MODES = {"wam": "policy"}  # model_mode → the name in diffusers


class EdgeScheduler(diffusers.UniPCMultistepScheduler):
    """Stands in for Edge's class, which no diffusers release has: UniPC on the framework's grid (see `schedule`)."""

    def set_timesteps(self, num_inference_steps, device=None, sigmas=None):
        grid = schedule.native_grid(self, num_inference_steps)
        super().set_timesteps(num_inference_steps, device=device, sigmas=grid)


def record(folder: Folder, case: Case) -> Recorded:
    return record_all(folder, [case])[0]


def record_all(folder: Folder, cases: Sequence[Case], doubles: bool = True, half: bool = True) -> list[Recorded]:
    """Run the reference on every case; the models are loaded once per dtype. doubles, half: also those velocities."""
    parts = _parts(folder)
    with tempfile.TemporaryDirectory() as place:
        found = [_run(folder, parts, c, Path(place) / c.name) for c in cases]
    size = sum(p.numel() for p in parts["transformer"].parameters())
    load = reference.pretrained(diffusers.Cosmos3OmniTransformer, folder.path / "transformer")
    del parts
    reference.release()

    def replay(make: Callable[[], reference.Model], store: Callable[[Trace, int, dict], None], every: bool) -> None:
        model = make()
        for t in (t for r in found for t in r.traces):
            steps = range(len(t.calls)) if every else sampled(len(t.calls))
            for i in steps:
                store(t, i, {b: _velocity(model, kw, t) for b, kw in t.calls[i].items()})
        del model
        reference.release()

    if doubles and reference.fits_float64(size):
        replay(lambda: load(torch.float64), lambda t, i, v: t.velocities64.append(v), True)
    if half:
        replay(lambda: load(torch.bfloat16), lambda t, i, v: t.half.update({i: v}), False)
        replay(lambda: reference.rounded(load), lambda t, i, v: t.truth.update({i: v}), False)
    for t in (t for r in found for t in r.traces):
        t.calls = []
    return found


def sampled(steps: int) -> list[int]:
    """Some steps of so many, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, steps - 1, min(SAMPLED, steps))})


def _parts(folder: Folder) -> dict[str, Any]:
    """Every component of a pipeline, float32, by the reference's own loaders."""
    path, config = folder.path, folder.scheduler or {}
    name = config.get("_class_name")
    cls: Any = EdgeScheduler if name == scheduler_config.EDGE else getattr(diffusers, str(name))
    classes = {"transformer": diffusers.Cosmos3OmniTransformer, "vae": diffusers.AutoencoderKLWan}
    if "sound_tokenizer" in folder.components:
        classes["sound_tokenizer"] = diffusers.Cosmos3AVAEAudioTokenizer
    return {
        "scheduler": cls.from_config({k: v for k, v in config.items() if not k.startswith("_")}),
        "text_tokenizer": transformers.AutoTokenizer.from_pretrained(path / "text_tokenizer", local_files_only=True),
        **{n: reference.pretrained(c, path / n)(torch.float32) for n, c in classes.items()},
    }


def _run(folder: Folder, parts: dict[str, Any], case: Case, place: Path) -> Recorded:
    request = json.loads(case.write(place).read_text())
    index = folder.index or {}
    runs = {PIPELINE: _pipeline, MODULAR: _modular, LOOP: pipeline_loops.run}
    with reference.exact(), watch(parts["transformer"], case) as probe:
        out = runs[case.by](parts, index, request, probe)
    traces = probe.traces(parts["scheduler"], pipeline_loops.weights_of(request))
    return Recorded(case, traces, **out)


def _pipeline(parts: dict[str, Any], index: dict, request: dict, probe: Probe) -> dict[str, Any]:
    """`Cosmos3OmniPipeline`."""
    pipe = pipeline_loops.build(parts, index)
    pipe._callback_tensor_inputs = list(STATE.values())  # its loop shows every local variable that is named here
    prepare = pipe.prepare_latents

    def prepared(**kw):
        out = prepare(**kw)
        probe.state(dict(zip(STATE.values(), out, strict=False)))
        return out

    def after(pipe, i, t, state):
        probe.state(state)
        return state

    kw: dict[str, Any] = dict(
        prompt=request["prompt"], negative_prompt=request["negative_prompt"], fps=float(request["fps"]),
        num_inference_steps=request["num_steps"], guidance_scale=request["guidance"], output_type="np",
    )  # fmt: skip
    if "action_chunk_size" in request:
        kw["action"] = _action(request)
    else:
        kw |= {k: request[k] for k in ("height", "width", "num_frames")}
        kw |= {"enable_sound": request.get("enable_sound", False)} | _shown(request)
    with mock.patch.object(pipe, "prepare_latents", prepared):
        out = pipe(**kw, callback_on_step_end=after, callback_on_step_end_tensor_inputs=list(STATE.values()))
    return {
        "video": np.asarray(out.video, np.float32),
        "wave": None if out.sound is None else reference.numpy(out.sound),
        "actions": None if out.action is None else reference.numpy(out.action[0]),
    }


def _shown(request: dict) -> dict[str, Any]:
    """The picture or clip of a request, as the pipelines take it."""
    path = request.get("vision_path", "")
    if path.endswith(".png"):
        return {"image": Image.fromarray(media.read_image(path))}
    if not path:
        return {}
    more = {k: v for k, v in request.items() if k == "condition_video_keep"}
    indexes = {"condition_frame_indexes_vision": tuple(request["condition_frame_indexes_vision"])}
    return {"video": _frames(path)} | indexes | more


def _frames(path: str) -> list[Image.Image]:
    return [Image.fromarray(x) for x in media.read_video(path)[0]]


def _action(request: dict) -> diffusers.CosmosActionCondition:
    mode = request["model_mode"]
    shown = _shown(request | {"condition_frame_indexes_vision": ()})
    path = request.get("action_path")
    return diffusers.CosmosActionCondition(
        mode=MODES.get(mode, mode), chunk_size=request["action_chunk_size"], domain_name=request["domain_name"],
        resolution_tier=request["image_size"], view_point=request.get("view_point", "ego_view"),
        raw_actions=torch.from_numpy(media.read_actions(path)) if path else None,
        image=shown.get("image"), video=shown.get("video"),
    )  # fmt: skip


def _modular(parts: dict[str, Any], index: dict, request: dict, probe: Probe) -> dict[str, Any]:
    """`Cosmos3OmniModularPipeline`, or the distilled one: they alone know controls and fixed sigmas."""
    sigmas = index.get("distilled_sigmas")
    blocks: Any = modular_pipelines.Cosmos3DistilledBlocks if sigmas else modular_pipelines.Cosmos3OmniBlocks
    pipe = blocks().init_pipeline()
    own = {n: p for n, p in parts.items() if n != "sound_tokenizer"} if sigmas else parts
    pipe.update_components(**own, **({"distilled_sigmas": sigmas} if sigmas else {}))
    pipe.disable_safety_checker()
    pipe.set_progress_bar_config(disable=True)
    loop = denoise.Cosmos3DenoiseLoopWrapper.loop_step

    def step(self, components, state, i, t, **kw):
        if i == 0:
            probe.state({n: getattr(state, n, None) for n in STATE.values()}, first=True)
        out = loop(self, components, state, i=i, t=t, **kw)
        probe.state({n: getattr(out[1], n, None) for n in STATE.values()})
        return out

    kw: dict[str, Any] = {k: request[k] for k in ("prompt", "height", "width")} | {"fps": float(request["fps"])}
    controls = {h: request[h]["control_path"] for h in HINTS if h in request}
    if sigmas:
        kw |= {"num_frames": request["num_frames"]} | _shown(request)
    else:
        kw |= dict(
            negative_prompt=request["negative_prompt"], num_inference_steps=request["num_steps"],
            guidance_scale=request["guidance"], control_guidance=request["control_guidance"],
            control_videos={h: _frames(path) for h, path in controls.items()}, num_frames=request["max_frames"],
            num_video_frames_per_chunk=request["num_video_frames_per_chunk"],
            num_conditional_frames=request["num_conditional_frames"],
        )  # fmt: skip
    quiet = mock.patch.object(denoise.Cosmos3DenoiseLoopWrapper, "_progress_bar_config", {"disable": True}, create=True)
    with quiet, mock.patch.object(denoise.Cosmos3DenoiseLoopWrapper, "loop_step", step):
        video = pipe(**kw, output_type="np", output="videos")
    return {"video": np.asarray(video, np.float32)}


def _velocity(model: reference.Model, kw: dict, t: Trace) -> Latents:
    with reference.exact(), pipeline_loops.one_attention_per_control(kw, t.weights):
        return masked(model(**reference.feed(kw, model)), t)
