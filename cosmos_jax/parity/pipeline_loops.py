"""Modes that no diffusers pipeline has, driven by hand: diffusers' network, schedulers, codecs and position functions.

In: a request for sound to video, video to sound, an image edit, or transfer with weighted controls; the components.
Out: what a pipeline returns. Layout: spec model.md §4.2, §4.4; weighted controls: §5 (multi_control_two_way).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.models.transformers import transformer_cosmos3
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens

from cosmos_jax import media
from cosmos_jax.parity import reference
from cosmos_jax.parity.pipeline_trace import STATE, Probe
from data_pipelines.transfer import HINTS

EDIT = "You are a helpful assistant who will edit images based on the user's instructions."
TRANSFER = (
    "You are a helpful assistant that generates images or videos following the user's instructions"
    " and control signals (edge maps, blur, depth, or segmentation)."
)


def build(parts: dict[str, Any], index: dict) -> Any:
    """`Cosmos3OmniPipeline` of these components, as the folder's index configures it."""
    told = {k: index[k] for k in ("default_use_system_prompt", "use_native_flow_schedule") if k in index}
    pipe: Any = diffusers.Cosmos3OmniPipeline(**parts, enable_safety_checker=False, **told)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(parts: dict[str, Any], index: dict, request: dict, probe: Probe) -> dict[str, Any]:
    """As `pipeline_reference`'s runs of pipelines: video, wave, actions."""
    pipe = build(parts, index)
    scheduler, transformer = parts["scheduler"], parts["transformer"]
    config, weights = transformer.config, weights_of(request)
    ids = dict(zip(("cond", "uncond"), _ids(pipe, request), strict=True))
    context, x0, clean = _vision(pipe, request)
    sound = _sound(parts, request)
    frames = [f for f in range(x0.shape[2]) if f not in clean]
    noisy = {"vision": frames, **({} if sound is None else {"sound": _sound_frames(request, sound)})}
    state = {"vision": x0, **({} if sound is None else {"sound": sound})}
    for m, x in state.items():
        keep = torch.ones(x.shape[2 if m == "vision" else 1])
        keep[noisy[m]] = 0
        keep = keep.view(1, 1, -1, 1, 1) if m == "vision" else keep
        drawn = probe.draw(tuple(x.shape), device=x.device, dtype=torch.float32, into=probe.draws)
        state[m] = keep.to(x) * x + (1 - keep.to(x)) * drawn
    static = {
        b: pack(i, [*context, x0], frames, sound, noisy.get("sound", []), config, float(request["fps"]),
                shared=request["model_mode"] != "image2image")
        for b, i in ids.items()
    }  # fmt: skip
    _set_timesteps(scheduler, index, request["num_steps"])
    solvers = {m: copy.deepcopy(scheduler) for m in state if noisy[m]}
    probe.state({STATE[m]: x for m, x in state.items()}, first=True)
    for t in scheduler.timesteps:
        v = {}
        for b, kw in static.items():
            with transformer.cache_context(b), one_attention_per_control(kw, weights):
                out = transformer(**_at(kw, context, state, noisy, t), return_dict=False)
            v[b] = {"vision": out[0][-1], **({} if sound is None else {"sound": out[1][0]})}
        for m, solver in solvers.items():
            guided = v["uncond"][m] + request["guidance"] * (v["cond"][m] - v["uncond"][m])
            state[m] = solver.step(guided[None], t, state[m][None], return_dict=False)[0][0]
        probe.state({STATE[m]: x for m, x in state.items()})
    mean, inverse = (x.view(1, -1, 1, 1, 1).to(x0) for x in (pipe._vae_latents_mean, pipe._vae_latents_inv_std))
    video = parts["vae"].decode(state["vision"] / inverse + mean).sample
    wave = reference.numpy(pipe.decode_sound(state["sound"])) if noisy.get("sound") else None
    return {"video": np.asarray(pipe.video_processor.postprocess_video(video, "np")[0], np.float32), "wave": wave}


def weights_of(request: dict) -> tuple[float, ...]:
    """Of the controls; () unless the request states any."""
    return tuple(request[h]["weight"] for h in HINTS if "weight" in request.get(h, {}))


def pack(
    ids: Sequence[int], items: list, frames: list[int], sound: torch.Tensor | None, heard: list[int], config: Any,
    fps: float, shared: bool,
) -> dict[str, Any]:  # fmt: skip
    """What is constant over the steps: [text | vision items, the target last | sound].

    frames, heard: noisy frames of the target, noisy sound latents. shared: all items lie at the same positions; else
    one after another in time. Of the model's time only the rates are used; positions are diffusers'.
    """
    p, u, base = config.latent_patch_size, len(ids), float(config.base_fps)
    text, start = get_3d_mrope_ids_text_tokens(u, 0, use_float_positions=True)
    start += config.unified_3d_mrope_temporal_modality_margin
    positions, at, origin, shapes, where = [text], u, start, [], []
    for x in items:
        t, rows, cols = x.shape[2], math.ceil(x.shape[3] / p), math.ceil(x.shape[4] / p)
        found, after = get_3d_mrope_ids_vae_tokens(t, rows, cols, origin, True, fps, base, 4)
        origin = origin if shared else after
        positions.append(found.float())
        shapes.append((t, rows, cols))
        where.append(torch.arange(at, at + t * rows * cols).view(t, -1))
        at += t * rows * cols
    none = [torch.zeros(0, dtype=torch.long) for _ in items[1:]]
    kw: dict[str, Any] = dict(
        input_ids=torch.tensor(ids), text_indexes=torch.arange(u), und_len=u, vision_token_shapes=shapes,
        vision_sequence_indexes=torch.cat([w.flatten() for w in where]),
        vision_mse_loss_indexes=where[-1][frames].flatten(),
        vision_noisy_frame_indexes=[*none, torch.tensor(frames).long()],
    )  # fmt: skip
    if sound is not None:
        n = sound.shape[1]
        found, _ = get_3d_mrope_ids_vae_tokens(n, 1, 1, start, True, float(config.sound_latent_fps), base, 1)
        positions.append(found.float())
        index = torch.arange(at, at + n)
        kw |= dict(
            sound_token_shapes=[(n, 1, 1)], sound_sequence_indexes=index, sound_mse_loss_indexes=index[heard],
            sound_noisy_frame_indexes=[torch.tensor(heard).long()],
        )  # fmt: skip
        at += n
    return kw | dict(position_ids=torch.cat(positions, 1), sequence_length=at)


@contextlib.contextmanager
def one_attention_per_control(kw: dict, weights: Sequence[float]) -> Iterator[None]:
    """With weights, the generator attends once per control, over [text, that control, target]: the target's outputs are
    averaged, a control's come from its own pass. Without: one attention over everything, as diffusers has it."""
    if not weights:
        yield
        return
    whole, u = transformer_cosmos3.dispatch_attention_fn, kw["und_len"]
    edges = np.cumsum([0, *(math.prod(s) for s in kw["vision_token_shapes"])])
    spans = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]

    def attend(q, k, v, is_causal=False, **other):
        if is_causal:
            return whole(q, k, v, is_causal=True, **other)
        out, target = torch.zeros_like(q), spans[-1]
        for own, w in zip(spans[:-1], weights, strict=True):
            keys, values = (torch.cat([x[:, :u], x[:, u:][:, own], x[:, u:][:, target]], 1) for x in (k, v))
            seen = whole(torch.cat([q[:, own], q[:, target]], 1), keys, values, is_causal=False, **other)
            count = own.stop - own.start
            out[:, own] = seen[:, :count]
            out[:, target] += w / sum(weights) * seen[:, count:]
        return out

    with mock.patch.object(transformer_cosmos3, "dispatch_attention_fn", attend):
        yield


def _at(kw: dict, context: list, state: dict, noisy: dict[str, list[int]], t: torch.Tensor) -> dict[str, Any]:
    """The arguments of one forward pass."""
    now: dict[str, Any] = {"vision_tokens": [*context, state["vision"]]}
    if "sound" in state:
        now["sound_tokens"] = [state["sound"]]
    times = {f"{m}_timesteps": torch.full((len(kw[f"{m}_mse_loss_indexes"]),), t.item()) for m in noisy}
    return reference.feed(kw | now | times, _Where(state["vision"]))


class _Where:
    """Stands for a model in `reference.feed`: only where its numbers are."""

    def __init__(self, x: torch.Tensor):
        self.x = x

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([self.x])


def _set_timesteps(scheduler: Any, index: dict, steps: int) -> None:
    """As the pipeline sets them."""
    grid = np.linspace(1 - 1 / scheduler.config.num_train_timesteps, 0.0, steps + 1)[:-1]
    scheduler.set_timesteps(steps, **({"sigmas": grid} if index.get("use_native_flow_schedule") else {}))


def _ids(pipe: Any, request: dict) -> list[list[int]]:
    """With the caption, and with the negative one. Clips: diffusers' texts. Edits and weighted controls exist in
    cosmos-framework alone: its system turn, and its sentences, true ones for the negative caption too."""
    frames, size = request["num_frames"], {k: request[k] for k in ("height", "width")}
    texts = [request["prompt"], request["negative_prompt"]]
    system = EDIT if request["model_mode"] == "image2image" else TRANSFER if weights_of(request) else None
    if system is None:
        return list(pipe.tokenize_prompt(*texts, num_frames=frames, fps=float(request["fps"]), **size))
    what = "image" if frames == 1 else "video"
    facts = [f"This {what} is of {size['height']}x{size['width']} resolution."]
    if frames > 1:
        facts = [f"The video is {frames / request['fps']:.1f} seconds long and is of {request['fps']} FPS.", *facts]
    out = []
    for text in texts:
        for fact in facts:
            text = f"{text.rstrip('.')}. {fact}"
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        told = pipe.text_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True).input_ids
        out.append([*told, *(pipe.llm_special_tokens[k] for k in ("eos_token_id", "start_of_generation"))])
    return out


def _vision(pipe: Any, request: dict) -> tuple[list[torch.Tensor], torch.Tensor, list[int]]:
    """(clean items before the target, the target's latents, its clean frames). Media have the size of the result."""
    count, mode = request["num_frames"], request["model_mode"]
    shown = request.get("vision_path", "")
    picture = media.read_image(shown)[None] if shown.endswith(".png") else None
    target = _encode(pipe, np.zeros((count, request["height"], request["width"], 3), np.uint8))
    if mode == "image2image":
        return [_encode(pipe, picture)], target, []
    if mode == "video2sound":
        clip = _encode(pipe, media.read_video(shown)[0][:count])
        return [], clip, list(range(clip.shape[2]))
    if picture is not None:
        return [], _encode(pipe, np.repeat(picture, count, 0)), [0]
    paths = [request[h]["control_path"] for h in HINTS if h in request]
    return [_encode(pipe, media.read_video(path)[0][:count]) for path in paths], target, []


def _encode(pipe: Any, frames: np.ndarray) -> torch.Tensor:
    """uint8 [T,H,W,3] → normalised latents [1,C,t,h,w]."""
    x = torch.tensor(frames).to(pipe.vae.device, torch.float32).permute(3, 0, 1, 2)[None] / 127.5 - 1
    return pipe._encode_video(x).float()


def _sound(parts: dict[str, Any], request: dict) -> torch.Tensor | None:
    """Latents [Ds,T] as long as the clip: of the request's sound, or zeros where sound is made."""
    if request["model_mode"] not in ("audio_image2video", "video2sound"):
        return None
    model = parts["sound_tokenizer"]
    rate = model.config.sampling_rate
    samples = int(request["num_frames"] / request["fps"] * rate)
    if "sound_path" not in request:
        return torch.zeros(parts["transformer"].config.sound_dim, -(-samples // model._hop_size), device=model.device)
    wave = media.read_sound(request["sound_path"], rate)[:, :samples]
    wave = np.pad(wave, ((0, 0), (0, samples - wave.shape[1])))
    return model.encode(torch.from_numpy(wave)[None].to(model.device)).latent_dist.mean[0].float()


def _sound_frames(request: dict, sound: torch.Tensor) -> list[int]:
    """The noisy ones."""
    return [] if "sound_path" in request else list(range(sound.shape[1]))
