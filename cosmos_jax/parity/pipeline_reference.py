"""What diffusers' own pipelines make of a request: every number on the way, recorded.

In: an opened folder, `Case`s. Out: a `Recorded` each: tokens, positions, noise, latents and velocities of every step,
pixels, wave, actions. The noise is numpy's and named, so both sides start from the same numbers; whatever else a
pipeline does, its own code does. Velocities are there once more in float64 and in bfloat16, from the same latents.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers import modular_pipelines
from diffusers.modular_pipelines.cosmos import before_denoise, denoise
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as task
from diffusers.schedulers import scheduling_flow_match_euler_discrete as euler
from PIL import Image

from conversion.folder import Folder
from cosmos_jax import media
from cosmos_jax.parity import pipeline_cases, reference, schedule
from cosmos_jax.parity.pipeline_cases import HINTS, MODULAR, PIPELINE, Case
from cosmos_jax.sampling import scheduler_config

Latents = dict[str, np.ndarray]  # vision [C,T,h,w], sound [Ds,T], action [T,A], as in the .npz files of `generate`
STATE = {"vision": "latents", "sound": "sound_latents", "action": "action_latents"}  # modality → name in a pipeline
SAMPLED = 4  # steps of a run whose velocities are also computed in bfloat16
MODES = {"wam": "policy"}  # model_mode → the name in diffusers


@dataclass
class Branch:
    """One of the forward passes of a step: what is constant over the steps."""

    ids: np.ndarray  # [L]
    positions: dict[str, np.ndarray]  # text and modality → [3, tokens]; vision: controls, then the target


@dataclass
class Trace:
    """One denoising loop. latents[i] enter step i, the last are the result; velocities[i] were predicted from
    latents[i], before guidance, 0 for what is clean."""

    branches: dict[str, Branch] = field(default_factory=dict)  # cond, uncond, cond_no_control
    noisy: dict[str, np.ndarray] = field(default_factory=dict)  # modality → bool per frame, row, latent
    context: list[np.ndarray] = field(default_factory=list)  # clean vision items before the target, [C,T,h,w]
    domain: int | None = None
    noise: Latents = field(default_factory=dict)  # unit noise, where it is overwritten by conditions too
    fresh: list[Latents] = field(default_factory=list)  # what a stochastic scheduler drew in each step
    sigmas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    timesteps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    latents: list[Latents] = field(default_factory=list)
    velocities: list[dict[str, Latents]] = field(default_factory=list)  # branch → …
    velocities64: list[dict[str, Latents]] = field(default_factory=list)
    half: dict[int, dict[str, Latents]] = field(default_factory=dict)  # step → in bfloat16
    truth: dict[int, dict[str, Latents]] = field(default_factory=dict)  # … in float32, of the same rounded weights
    calls: list[dict[str, dict]] = field(default_factory=list, repr=False)  # branch → arguments of the transformer


@dataclass
class Recorded:
    case: Case
    request: dict[str, Any]  # with the paths of its files, which are gone; see `case.write`
    guidance: float
    traces: list[Trace]  # one; of `transfer`: one per chunk
    video: np.ndarray  # [T,H,W,3] float32, 0 … 1
    wave: np.ndarray | None = None  # [2,N]
    actions: np.ndarray | None = None  # [rows, width of the embodiment]


class EdgeScheduler(diffusers.UniPCMultistepScheduler):
    """Stands in for Edge's class, which no diffusers release has: UniPC on the framework's grid (see `schedule`)."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps, device=device, sigmas=schedule.native_grid(self, num_inference_steps))


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
    runs = {PIPELINE: _pipeline, MODULAR: _modular}
    with reference.exact(), _probe(parts["transformer"], case) as probe:
        out = runs[case.by](parts, index, request, probe)
    return Recorded(case, request, float(request.get("guidance", 1.0)), probe.traces(parts["scheduler"], request), **out)


def _pipeline(parts: dict[str, Any], index: dict, request: dict, probe: Probe) -> dict[str, Any]:
    """`Cosmos3OmniPipeline`."""
    told = {k: index[k] for k in ("default_use_system_prompt", "use_native_flow_schedule") if k in index}
    pipe = diffusers.Cosmos3OmniPipeline(**parts, enable_safety_checker=False, **told)
    pipe.set_progress_bar_config(disable=True)
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
    blocks = modular_pipelines.Cosmos3DistilledBlocks() if sigmas else modular_pipelines.Cosmos3OmniBlocks()
    pipe: Any = blocks.init_pipeline()
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


class Probe:
    """Everything that passes by while a pipeline runs."""

    def __init__(self, case: Case):
        self.case, self.branch = case, ""
        self.draws: list[np.ndarray] = []  # before a loop
        self.fresh: list[np.ndarray] = []  # inside
        self.states: list[list[Latents]] = []  # per loop
        self.calls: list[list[dict[str, tuple[dict, Any]]]] = []  # per loop and step: branch → (arguments, result)

    def draw(self, shape, generator=None, device=None, dtype=None, layout=None, *, into: list[np.ndarray]):
        """In place of diffusers' `randn_tensor`."""
        x = reference.draw(f"{self.case.name} {len(self.draws)} {len(self.fresh)}", *shape)
        into.append(x)
        return torch.from_numpy(x).to(device, dtype)

    def state(self, named: dict[str, Any], first: bool = False) -> None:
        """The latents between two steps."""
        if first or not self.states:
            self.states.append([])
            self.calls.append([])
        found = {m: named.get(n) for m, n in STATE.items()}
        self.states[-1].append({m: _bare(m, reference.numpy(x)) for m, x in found.items() if x is not None})

    def call(self, kw: dict, out: Any) -> None:
        """A forward pass of the transformer."""
        steps = self.calls[-1]
        if len(steps) < len(self.states[-1]):
            steps.append({})
        steps[-1][self.branch] = kw, out

    def traces(self, scheduler: Any, request: dict) -> list[Trace]:
        """The loops in order."""
        names = self.states[0][0]
        out = []
        for k, (states, calls) in enumerate(zip(self.states, self.calls, strict=True)):
            t = Trace(latents=states, sigmas=reference.numpy(scheduler.sigmas))
            t.timesteps = reference.numpy(scheduler.timesteps)
            t.noise = {m: _bare(m, x) for m, x in zip(names, self.draws[k * len(names) :], strict=False)}
            t.fresh = [{"vision": x[0, 0]} for x in self.fresh]
            t.calls = [{b: kw for b, (kw, _) in step.items()} for step in calls]
            for b, kw in t.calls[0].items():
                t.branches[b] = _branch(kw)
            kw = t.calls[0]["cond"]
            t.context = [reference.numpy(x)[0] for x in kw["vision_tokens"][:-1]]
            t.noisy = _noisy(kw, states[0])
            if kw.get("action_domain_ids") is not None:
                t.domain = int(kw["action_domain_ids"][0])
            t.velocities = [{b: _masked(r, t) for b, (_, r) in step.items()} for step in calls]
            out.append(t)
        return out


@contextlib.contextmanager
def _probe(transformer: Any, case: Case) -> Iterator[Probe]:
    probe = Probe(case)
    forward, context = transformer.forward, transformer.cache_context

    @functools.wraps(forward)  # the modular pipeline asks for its signature
    def called(*args, **kw):
        out = forward(*args, **kw)
        probe.call(kw, out)
        return out

    def named(name, **kw):
        probe.branch = name
        return context(name, **kw)

    def randn(into):
        return lambda *args, **kw: probe.draw(*args, **kw, into=into)

    with contextlib.ExitStack() as stack:
        for where, name, by in (
            (transformer, "forward", called), (transformer, "cache_context", named),
            (task, "randn_tensor", randn(probe.draws)), (before_denoise, "randn_tensor", randn(probe.draws)),
            (euler, "randn_tensor", randn(probe.fresh)),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(where, name, by))
        yield probe


def _bare(modality: str, x: np.ndarray) -> np.ndarray:
    """Without the batch axis, which only vision has."""
    return x[0] if modality == "vision" else x


def _branch(kw: dict) -> Branch:
    where = {"text": kw["text_indexes"]} | {m: kw.get(f"{m}_sequence_indexes") for m in STATE}
    positions = reference.numpy(kw["position_ids"])
    return Branch(
        reference.numpy(kw["input_ids"]),
        {m: positions[:, reference.numpy(i)] for m, i in where.items() if i is not None},
    )


def _noisy(kw: dict, latents: Latents) -> dict[str, np.ndarray]:
    """modality → whether that frame, row or latent is to be made."""
    out = {}
    for m, x in latents.items():
        length = x.shape[0 if m == "action" else 1]
        out[m] = np.isin(np.arange(length), reference.numpy(kw[f"{m}_noisy_frame_indexes"][-1]))
    return out


def _masked(result: Any, t: Trace) -> Latents:
    """The velocities of the target, 0 for what is clean and for channels that the embodiment does not have."""
    found = dict(zip(("vision", "sound", "action"), result, strict=True))
    out = {m: _bare(m, reference.numpy(found[m][-1])) for m in t.noisy}
    for m, noisy in t.noisy.items():
        out[m] = out[m] * np.expand_dims(noisy, {"vision": (0, 2, 3), "sound": (0,), "action": (1,)}[m])
    return out


def _velocity(model: reference.Model, kw: dict, t: Trace) -> Latents:
    with reference.exact():
        return _masked(model(**reference.feed(kw, model)), t)
