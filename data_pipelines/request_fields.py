"""THE table of a request's keys: what each may hold and which tasks it is for.

In: values out of JSON. Out: a `Request` whose every value is typed, finite and in range. The keys are those of
cosmos-framework (inference/args.py, inference/common/args.py) and ours: height, width, images, turns. A key is null or
absent = not said. request_file.py reads files into this; request_resolve.py fills in the defaults; docs/requests.md
shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipelines import canvas
from data_pipelines.action import METHODS
from data_pipelines.action_prompt import FRAMING
from data_pipelines.request_values import (
    Check,
    Wrong,
    flag,
    integer,
    interval,
    item_list,
    items,
    name,
    nearest,
    number,
    show,
    table,
    template,
    text,
    word,
)
from data_pipelines.transfer import HINTS

MODES = {  # official names of model_mode → rows of tasks.TABLE; a row's own name is understood too
    "text2image": "text2image",
    "text2video": "text2video",
    "image2image": "image2image",
    "image2video": "image2video",
    "video2video": "video2video",
    "audio_image2video": "sound2video",
    "forward_dynamics": "forward_dynamics",
    "inverse_dynamics": "inverse_dynamics",
    "wam": "policy",
    "reasoner": "reason",
}
OWN = ("text2video_sound", "sound2video", "video2sound", "policy", "transfer", "reason")
STRENGTHS = ("very_low", "low", "medium", "high", "very_high")


@dataclass(frozen=True)
class Hint:
    """One control of `transfer`."""

    control_path: str | None = None  # a ready-made control; None: computed from vision_path (edge, blur)
    weight: float = 1.0
    preset: str | None = None  # strength of a computed edge or blur


def hint(preset: str | None = None, strengths: tuple[str, ...] = STRENGTHS) -> Check:
    """An object with control_path, weight and, where `preset` names it, the strength of a computed control."""
    keys: dict[str, Check] = {"control_path": text(1024), "weight": number(0, 100)}
    if preset:
        keys[preset] = word(*strengths)

    def check(value: Any) -> Hint:
        said = table(keys)(value)
        return Hint(said.get("control_path"), said.get("weight", 1.0), said.get(preset) if preset else None)

    return check


def turns(value: Any) -> tuple[dict[str, Any], ...]:
    """Messages of a conversation that the user speaks last, in the form that reasoner.Frontend takes."""
    part = {"type": word("text", "image", "video"), "text": text(), "image": text(1024), "video": text(1024)}
    message: dict[str, Check] = {"role": word("system", "user", "assistant"), "content": lambda x: x}
    out = []
    for i, each in enumerate(items(value, 1, 64)):
        said = table(message, f"[{i}]")(each)
        if set(said) != set(message):
            raise Wrong('needs a "role" and a "content"', f"[{i}]")
        content = said["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = [table(part, f"[{i}].content[{j}]")(p) for j, p in enumerate(items(content, 1, 64))]
        for j, p in enumerate(parts):
            if set(p) != {"type", p.get("type")}:
                raise Wrong('needs a "type" (text, image or video) and a value of that name', f"[{i}].content[{j}]")
        out.append({"role": said["role"], "content": parts})
    if out[-1]["role"] != "user":
        raise Wrong("must end with a question, so that there is something to answer; end with a user's turn")
    return tuple(out)


def key(check: Check, used: str, doc: str) -> Any:
    """A field of `Request`. used: all | made (anything generated) | action | transfer | reason."""
    return field(default=None, metadata={"check": check, "used": used, "doc": doc})


@dataclass(frozen=True)
class Request:
    """What was asked for; None = not said. Made by `request_file.read`."""

    # who
    name: str = key(name, "all", "of the folder of its files; default: the request file's name")
    model_mode: str | None = key(word(*MODES, *OWN), "all", "task; inferred from vision_path and num_frames")
    seed: int | None = key(integer(0, 2**31 - 1), "all", "of the noise")
    num_outputs: int | None = key(integer(1, 64), "all", "results, with seeds seed, seed + 1 …")
    extra: dict | None = key(table(None), "all", "anything; recorded, not used")
    # text
    prompt: str | None = key(text(), "all", "caption, instruction, question; plain or a JSON caption")
    prompt_path: str | None = key(text(1024), "all", "a text file with the prompt, instead of prompt")
    negative_prompt: str | None = key(text(), "made", "what the result must not be like")
    negative_prompt_file: str | None = key(text(1024), "made", "a JSON caption, instead of negative_prompt")
    duration_template: str | None = key(template("duration", "fps"), "made", "appended to plain prompts")
    resolution_template: str | None = key(template("height", "width"), "made", "appended to plain prompts")
    negative_metadata_mode: str | None = key(word("none", "same", "inverse"), "made", "of the negative prompt")
    inverse_duration_template: str | None = key(template("duration", "fps"), "made", "for mode inverse")
    inverse_resolution_template: str | None = key(template("height", "width"), "made", "for mode inverse")
    negative_prompt_keep_metadata: bool | None = key(flag, "made", "true turns mode none into same")
    # vision
    vision_path: str | None = key(text(1024), "all", "image or video that conditions, or is asked about")
    condition_frame_indexes_vision: tuple[int, ...] | None = key(
        item_list(integer(0, 2000), 0, 2001), "made", "latent frames that are clean"
    )
    condition_video_keep: str | None = key(word("first", "last"), "made", "end of a longer video that conditions")
    resolution: str | None = key(word(*canvas.RESOLUTIONS), "made", "tier; with aspect_ratio it decides the pixels")
    aspect_ratio: str | None = key(word(*canvas.ASPECTS), "made", "width to height")
    height: int | None = key(integer(16, 4096), "made", "pixels, with width instead of resolution and aspect_ratio")
    width: int | None = key(integer(16, 4096), "made", "pixels")
    fps: int | None = key(integer(1, 1000), "made", "frames per second; 10 to 30 is what the models know")
    num_frames: int | None = key(integer(1, 5000), "made", "of the result; rounded up to 4k + 1")
    video_save_quality: int | None = key(integer(0, 10), "made", "of MP4 files")
    image_save_quality: int | None = key(integer(0, 100), "made", "of image files")
    # sampling
    num_steps: int | None = key(integer(1, 1000), "made", "denoising steps")
    guidance: float | None = key(number(0, 7), "made", "scale of classifier-free guidance; 1 = off")
    guidance_interval: tuple[float, float] | None = key(interval, "made", "timesteps (0–1000) with guidance")
    normalize_cfg: bool | None = key(flag, "made", "keep the norm of the conditional velocity")
    shift: float | None = key(number(0.01, 100), "made", "of the noise schedule")
    # sound
    enable_sound: bool | None = key(flag, "made", "make sound with the video")
    sound_path: str | None = key(text(1024), "made", "sound that the video is made for")
    # action
    action_path: str | None = key(text(1024), "action", "JSON rows; read by forward_dynamics")
    domain_name: str | None = key(text(100), "action", "embodiment")
    image_size: int | None = key(integer(16, 4096), "action", "resolution tier of the observation")
    action_chunk_size: int | None = key(integer(1, 2000), "action", "action rows; frames are one more")
    raw_action_dim: int | None = key(integer(1, 1024), "action", "numbers per action row, as a check")
    action_stats: str | None = key(text(1024), "action", "statistics of raw actions; default: the model's own units")
    action_normalization: str | None = key(word(*METHODS), "action", "what to make of action_stats; default quantile")
    view_point: str | None = key(word(*FRAMING), "action", "camera, as the prompt says it")
    # transfer
    edge: Hint | None = key(hint("preset_edge_threshold"), "transfer", "outlines; can be computed")
    blur: Hint | None = key(hint("preset_blur_strength", ("none", *STRENGTHS)), "transfer", "colours; can be computed")
    depth: Hint | None = key(hint(), "transfer", "depth map")
    seg: Hint | None = key(hint(), "transfer", "segmentation")
    wsm: Hint | None = key(hint(), "transfer", "world scenario map")
    control_guidance: float | None = key(number(0, 10), "transfer", "how much the controls count; 1 = no extra pass")
    control_guidance_interval: tuple[float, float] | None = key(interval, "transfer", "timesteps with it")
    num_video_frames_per_chunk: int | None = key(integer(1, 2000), "transfer", "long videos are made in chunks")
    num_conditional_frames: int | None = key(integer(0, 2000), "transfer", "frames a chunk takes from the last")
    num_first_chunk_conditional_frames: int | None = key(integer(0, 2000), "transfer", "from vision_path")
    max_frames: int | None = key(integer(1, 5000), "transfer", "of all chunks")
    show_control_condition: bool | None = key(flag, "transfer", "save the controls beside the result")
    show_input: bool | None = key(flag, "transfer", "save vision_path beside the result")
    share_vision_temporal_positions: bool | None = key(flag, "transfer", "controls and result share time")
    emphasize_control_in_prompt: bool | None = key(flag, "transfer", "name the controls in the prompt")
    # reason
    images: tuple[str, ...] | None = key(item_list(text(1024), 1, 64), "reason", "several images to ask about")
    turns: tuple[dict[str, Any], ...] | None = key(turns, "reason", "a conversation, instead of prompt")
    max_new_tokens: int | None = key(integer(1, 32768), "reason", "of the answer")
    do_sample: bool | None = key(flag, "reason", "draw tokens; false = the likeliest")
    temperature: float | None = key(number(0, 100, above=True), "reason", "with do_sample")
    top_k: int | None = key(integer(1, 1_000_000), "reason", "with do_sample")
    top_p: float | None = key(number(0, 1, above=True), "reason", "with do_sample")
    repetition_penalty: float | None = key(number(0, 100, above=True), "reason", "of prompt and answer; 1 = off")
    presence_penalty: float | None = key(number(-100, 100), "reason", "of the answer; 0 = off")
    video_fps: float | None = key(number(0, 1000, above=True), "reason", "frames per second that are looked at")
    # not keys
    where: str = "the request"  # file and line, for messages
    media: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # key → request_media.Media
    notes: tuple[str, ...] = ()

    @property
    def hints(self) -> dict[str, Hint]:
        """The controls of `transfer`, in the model's order."""
        return {h: getattr(self, h) for h in HINTS if getattr(self, h) is not None}

    @property
    def said(self) -> dict[str, Any]:
        """Keys that were given, with their values."""
        return {k: getattr(self, k) for k in KEYS if getattr(self, k) is not None}

    def path(self, key: str) -> Path | None:
        """The file of a media key, found and probed; None if the key was not given."""
        return self.media[key].path if key in self.media else None


KEYS = {f.name: f.metadata for f in fields(Request) if f.metadata}

IGNORED = {  # official keys that say nothing about the result, or nothing by themselves
    "output_dir": "--out decides",
    "model": "--checkpoint decides",
    **{
        f"prompt_upsampler_{k}": "prompts are not rewritten"
        for k in ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "seed")
    },
}
REFUSED: dict[str, tuple[tuple, str]] = {  # official keys that we do not support: values that change nothing, remedy
    "prompt_upsampling": ((False,), "prompts are not rewritten here; give the final prompt"),
    "native_prompt_upsampling": ((False,), "prompts are not rewritten here; give the final prompt"),
    "autoregressive": ((False,), "long videos are made in chunks by transfer alone; leave it out"),
    "sampler": (("unipc",), "checkpoints are sampled with UniPC; leave it out"),
    "sigma_max": ((80, 0), "it is for the EDM sampler, and checkpoints are sampled with UniPC; leave it out"),
    "defaults_file": ((), "defaults are not read from files; put them into the request"),
    "tensors_file": ((), "data comes from media files; leave it out"),
    "pickle_file": ((), "pickles can run code and are never read; leave it out"),
}
OTHER_NAMES = {  # what other programs call it
    "num_inference_steps": "num_steps", "steps": "num_steps", "guidance_scale": "guidance", "cfg": "guidance",
    "flow_shift": "shift", "task": "model_mode", "mode": "model_mode", "image": "vision_path", "video": "vision_path",
    "actions": "action_path", "sound": "enable_sound", "audio": "sound_path", "domain": "domain_name",
    "frames": "num_frames", "messages": "turns",
}  # fmt: skip


def check_keys(said: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values by key → (checked values of `Request`, notes on what was ignored). Wrong names the first bad key."""
    values, notes = {}, []
    for k, value in said.items():
        if value is None and (k in KEYS or k in IGNORED or k in REFUSED):
            continue
        if k in KEYS:
            try:
                values[k] = KEYS[k]["check"](value)
            except Wrong as e:
                raise Wrong(e.what, k + e.at) from None
        elif k in IGNORED:
            notes.append(f"{k} is ignored: {IGNORED[k]}")
        elif k in REFUSED:
            inert, why = REFUSED[k]
            if not any(value == x and type(value) in (type(x), float) for x in inert):
                raise Wrong(f"is {show(value)}, but {why}", k)
        else:
            other = OTHER_NAMES.get(k)
            hint = f" (did you mean {other!r}?)" if other else nearest(k, KEYS)
            raise Wrong(f"is not a key of a request{hint}; see docs/requests.md", show(k))
    return values, tuple(notes)
