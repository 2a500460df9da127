"""A checked request and what its model can do → everything decided: size, length, steps, seeds, with a record of it.

In: a `Request` (request_file.py), `Facts` of a checkpoint. Out: `Resolved`: the request with every default filled in,
the names of those, notes and warnings. What contradicts the task or the model is a `RequestError` of one sentence.
The numbers are those of cosmos-framework (spec training.md §4.2, model.md §7.6): steps, guidance and shift from
tasks.TABLE, sizes from canvas.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from data_pipelines import canvas
from data_pipelines.request_fields import KEYS, Hint, Request
from data_pipelines.request_file import task_of
from data_pipelines.request_media import Media
from data_pipelines.request_values import RequestError, Wrong
from data_pipelines.tasks import ALL, Task, task


@dataclass(frozen=True)
class Facts:
    """What a checkpoint can do and does unless told otherwise."""

    name: str = "this model"
    resolution: str = "720"  # default tier
    tiers: tuple[str, ...] = ("256", "480", "720")  # that it has learnt
    frames: int = 189  # of a clip, by default
    fps: int = 24
    generates: bool = True  # False: a reasoner alone
    sees: bool = True  # the reasoner has eyes
    sound: bool = True
    action_dim: int = 64  # 0 = no actions
    steps: int = 0  # of a distilled model, which makes this many without guidance; 0 = not distilled
    temporal: int = 4  # frames per latent frame
    spatial: int = 16  # pixels per latent side


FAMILIES = {
    "nano": Facts("Cosmos3-Nano"),
    "super": Facts("Cosmos3-Super", tiers=("256", "480", "720", "768")),
    "edge": Facts("Cosmos3-Edge", resolution="480", tiers=("256", "480"), frames=121, sound=False),
}


@dataclass(frozen=True)
class Resolved:
    """A request with nothing left open. height, width and frames of the result are 0 for an answer in words."""

    request: Request  # every key that its task uses has a value, but for texts that the prompt convention supplies
    task: str  # a row of tasks.TABLE
    height: int
    width: int
    frames: int
    fps: float
    sound: bool  # the sample has a sound stream, clean or to be made
    clean_frames: tuple[int, ...]  # latent frames of the target that are conditions
    seeds: tuple[int, ...]  # one per output
    defaults: tuple[str, ...]  # keys that were not given
    notes: tuple[str, ...]  # what was rounded or left aside
    warnings: tuple[str, ...]  # outside of what the models know; to be printed

    @property
    def name(self) -> str:
        return self.request.name

    def record(self) -> dict[str, Any]:
        """For run.json: every value, and how it came about."""
        keys = {k: dataclasses.asdict(v) if isinstance(v, Hint) else v for k, v in self.request.said.items()}
        own = {k: getattr(self, k) for k in ("task", "height", "width", "frames", "fps", "sound", "seeds")}
        files = {k: str(m.path) for k, m in self.request.media.items()}
        return keys | own | {"files": files} | {k: list(getattr(self, k)) for k in ("defaults", "notes", "warnings")}


SEES = {  # task → what vision_path may be, and whether it must be there
    "reason": (("image", "video"), False),
    "image2video": (("image",), True),
    "video2video": (("video",), True),
    "image2image": (("image",), True),
    "forward_dynamics": (("image", "video"), True),
    "inverse_dynamics": (("video",), True),
    "policy": (("image", "video"), True),
    "transfer": (("image", "video"), False),
    "sound2video": (("image", "video"), False),
    "video2sound": (("video",), True),
}
TRANSFER = {  # control → guidance, control guidance, frames per chunk, fps; only for a control alone
    "edge": (3.0, 1.5, 93, None),
    "blur": (3.0, 1.5, 93, None),
    "depth": (3.0, 1.5, 93, None),
    "seg": (3.0, 2.0, 93, None),
    "wsm": (1.0, 3.0, 101, 10),
}
COMPUTED = {"edge": "preset_edge_threshold", "blur": "preset_blur_strength"}  # controls that vision_path can give
KNOWN_FPS = (10, 30)
KNOWN_FRAMES = {"256": 400, "480": 300, "704": 200, "720": 200, "768": 200}
LEAST_FRAMES = 24


class _Draft:
    """A request that is being filled in."""

    def __init__(self, request: Request, facts: Facts, convention: str):
        self.request, self.facts, self.convention = request, facts, convention
        self.values = dict(request.said)
        self.task = task_of(request)
        self.row: Task = task(self.task)
        self.defaults: list[str] = []
        self.notes = list(request.notes)
        self.warnings: list[str] = []

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def default(self, **values: Any) -> None:
        for key, value in values.items():
            if key not in self.values and value is not None:
                self.values[key] = value
                self.defaults.append(key)

    def media(self, key: str) -> Media | None:
        return self.request.media.get(key)


def resolve(request: Request, facts: Facts, convention: str = "framework") -> Resolved:
    """Fill in what was left open, for this model. convention: of prompts and sizes (canvas.py). RequestError."""
    try:
        d = _Draft(request, facts, convention)
        _belongs(d)
        _prompt(d)
        _vision(d)
        if d.task == "reason":
            _reason(d)
            return _finish(d, 0, 0, 0, 0.0, ())
        _sound(d)
        d.default(fps=facts.fps if len(request.hints) != 1 else TRANSFER[next(iter(request.hints))][3] or facts.fps)
        frames, clean, fps = _transfer(d) if d.task == "transfer" else _length(d)
        height, width = _size(d, frames)
        _sampling(d)
        return _finish(d, height, width, frames, fps, clean)
    except Wrong as e:
        raise RequestError(f"{request.where}: {e.at} {e.what}." if e.at else f"{request.where} {e.what}.") from None


def _finish(d: _Draft, height: int, width: int, frames: int, fps: float, clean: tuple[int, ...]) -> Resolved:
    seed = int.from_bytes(hashlib.sha256(d.request.name.encode()).digest()[:4], "big") & 0x7FFFFFFF
    d.default(seed=seed, num_outputs=1)
    made = d.row.generates
    return Resolved(
        dataclasses.replace(d.request, **d.values),
        d.task,
        height,
        width,
        frames,
        fps,
        made and bool(d["enable_sound"]),
        clean,
        tuple(d["seed"] + i for i in range(d["num_outputs"])),
        tuple(d.defaults),
        tuple(d.notes),
        tuple(_warnings(d, frames)) if made else (),
    )


def _belongs(d: _Draft) -> None:
    """Every key is for this task, and the model can do the task."""
    mine = {"all", "reason"} if d.task == "reason" else {"all", "made"}
    mine |= {"action"} if d.row.action != "none" else set()
    mine |= {"transfer"} if d.task == "transfer" else set()
    inert = {"control_guidance": 1.0}
    for key, value in d.request.said.items():
        if KEYS[key]["used"] not in mine and inert.get(key) != value:
            what = {"made": "generation", "action": "the action tasks"}.get(KEYS[key]["used"], KEYS[key]["used"])
            raise Wrong(f"is for {what}, but the task is {d.task}; leave it out or give another model_mode", key)
    if d.row.generates and not d.facts.generates:
        raise Wrong(f"is {d.task}, but {d.facts.name} only reasons; use a checkpoint that generates", "model_mode")
    if d.row.action != "none" and not d.facts.action_dim:
        raise Wrong(f"is {d.task}, but {d.facts.name} has no actions; use a checkpoint that has", "model_mode")


def _prompt(d: _Draft) -> None:
    needs = d.task in ("reason", "image2image") or (
        d.row.clean_frames == 0 and d.task not in ("transfer", "sound2video")
    )
    if needs and not d["turns"] and not (d["prompt"] or "").strip():
        raise Wrong(f"is missing, and {d.task} needs one; write what is wanted", "prompt")
    if not d["turns"]:
        d.default(prompt="")


def _vision(d: _Draft) -> None:
    """vision_path is there when the task needs it, and is what the task takes."""
    kinds, needed = SEES.get(d.task, ((), False))
    given = d.media("vision_path")
    if given and given.kind not in kinds:
        other = f"use model_mode {given.kind}2video" if not kinds or d.task.endswith("2video") else "name another file"
        raise Wrong(f"is {given.path.name}, but {d.task} takes {' or '.join(kinds) or 'none'}; {other}", "vision_path")
    if needed and not given:
        raise Wrong(f"is missing, and {d.task} needs one ({' or '.join(kinds)}); name a file", "vision_path")


def _sound(d: _Draft) -> None:
    rule = d.row.sound
    d.default(enable_sound=rule in ("noisy", "clean"))
    if d["enable_sound"] and rule == "none":
        raise Wrong(f"is true, but {d.task} has no sound; leave it out", "enable_sound")
    if not d["enable_sound"] and rule in ("noisy", "clean"):
        raise Wrong(f"is false, but {d.task} is about sound; leave it out", "enable_sound")
    if d["enable_sound"] and not d.facts.sound:
        key = "enable_sound" if d.request.enable_sound else "model_mode"
        raise Wrong(f"asks for sound, but {d.facts.name} has none; leave it out or use a model with sound", key)
    if rule == "clean" and not d["sound_path"]:
        raise Wrong(f"is missing, and {d.task} needs one; name a sound file", "sound_path")
    if rule != "clean" and d["sound_path"]:
        raise Wrong(f"is given, but {d.task} is not made for a sound; use model_mode audio_image2video", "sound_path")


def _round_up(d: _Draft, key: str) -> int:
    """The value of a key as a number of frames that latents can hold, 1 + 4k."""
    frames = canvas.frames_up(d[key], d.facts.temporal)
    if frames != d[key]:
        d.notes.append(f"{key} {d[key]} is rounded up to {frames} (1 + {d.facts.temporal}k)")
    d.values[key] = frames
    return frames


def _length(d: _Draft) -> tuple[int, tuple[int, ...], float]:
    """Frames of the result, its clean latent frames, its frames per second."""
    given, step = d.media("vision_path"), d.facts.temporal
    if d.row.action != "none":
        frames = _chunk(d)
    elif d.row.vision == "image":
        if d["num_frames"] not in (None, 1):
            raise Wrong(
                f"is {d['num_frames']}, but {d.task} makes one frame; use text2video or image2video", "num_frames"
            )
        frames = 1
    else:
        if d["num_frames"] == 1:
            raise Wrong(f"is 1, but {d.task} makes a clip; use text2image or more frames", "num_frames")
        if d.task == "video2sound" and given:
            d.default(num_frames=(min(given.frames, d.facts.frames) - 1) // step * step + 1)
        d.default(num_frames=d.facts.frames)
        frames = _round_up(d, "num_frames")
    d.default(num_frames=frames)
    latents = 1 + (frames - 1) // step
    clean = _clean(d, given, latents)
    need = 1 + step * max(clean, default=-1) if given and given.kind == "video" else 0
    if given and given.frames < need:
        raise Wrong(f"has {given.frames} frames, but {d.task} needs {need} of it; use a longer video", "vision_path")
    return frames, clean, float(d["fps"])


def _clean(d: _Draft, given: Media | None, latents: int) -> tuple[int, ...]:
    said, key = d["condition_frame_indexes_vision"], "condition_frame_indexes_vision"
    if d.row.clean_frames == ALL or d.row.action != "none" or not given or d.row.vision == "image":
        if said:
            why = "nothing is given to condition on" if not given else f"{d.task} decides that itself"
            raise Wrong(f"is given, but {why}; leave it out", key)
        return tuple(range(latents if d.row.clean_frames == ALL else d.row.clean_frames))
    d.default(**{key: (0,) if given.kind == "image" else (0, 1)})
    clean = tuple(sorted(d[key]))
    if not clean or clean[-1] >= latents or len(clean) == latents:
        raise Wrong(f"is {list(clean)}, but it must leave some of the {latents} latent frames to make", key)
    return clean


def _chunk(d: _Draft) -> int:
    """Frames of an action task: one more than its actions."""
    d.default(image_size=256, action_chunk_size=16, view_point="ego_view")
    rows, step, table = d["action_chunk_size"], d.facts.temporal, d.media("action_path")
    if rows % step:
        near = (max(rows // step, 1) * step, (rows // step + 1) * step)
        raise Wrong(f"is {rows}, but frames are 1 + {step}k; use {near[0]} or {near[1]}", "action_chunk_size")
    if d["num_frames"] not in (None, rows + 1):
        raise Wrong(f"is {d['num_frames']}, but action_chunk_size makes it {rows + 1}; leave it out", "num_frames")
    if d.row.action == "clean" and not table:
        raise Wrong(f"is missing, and {d.task} needs one; name a JSON file of actions", "action_path")
    if table and table.frames != rows:
        raise Wrong(f"has {table.frames} rows, but action_chunk_size is {rows}; make them equal", "action_path")
    if not d["domain_name"]:
        raise Wrong(f"is missing, and {d.task} needs one; name the embodiment", "domain_name")
    if table and table.width > d.facts.action_dim:
        raise Wrong(
            f"has {table.width} numbers a row; {d.facts.name} takes {d.facts.action_dim} at most", "action_path"
        )
    if table and d["raw_action_dim"] not in (None, table.width):
        raise Wrong(
            f"is {d['raw_action_dim']}, but a row of action_path has {table.width}; leave it out", "raw_action_dim"
        )
    return rows + 1


def _size(d: _Draft, frames: int) -> tuple[int, int]:
    """Height and width of the result in pixels."""
    h, w = d["height"], d["width"]
    first = next((m for k, m in d.request.media.items() if m.kind in ("image", "video")), None)
    source = d.media("vision_path") or first
    if (h is None) != (w is None):
        raise Wrong("is given alone; give height and width, or resolution and aspect_ratio", "height" if h else "width")
    if h:
        for key in ("height", "width"):
            if d[key] % d.facts.spatial:
                raise Wrong(f"is {d[key]}, but must be a multiple of {d.facts.spatial}; change it", key)
        for key in ("resolution", "aspect_ratio"):
            if d[key]:
                raise Wrong("is given, and height and width too; keep one way to say the size", key)
        d.default(aspect_ratio=canvas.closest_aspect(h, w))
        return h, w
    if d.row.action != "none":
        for key in ("resolution", "aspect_ratio"):
            if d[key]:
                raise Wrong(f"is given, but {d.task} is sized by image_size and the observation; leave it out", key)
        return canvas.action_canvas(source.height, source.width, d["image_size"], d.convention)
    if d.task == "image2image" and not (d["resolution"] and d["aspect_ratio"]):
        for key in ("resolution", "aspect_ratio"):
            if d[key]:
                raise Wrong("is given alone; an edited image takes both resolution and aspect_ratio, or neither", key)
        return canvas.edit_size(source.height, source.width)
    seen = canvas.closest_aspect(source.height, source.width) if d.task == "transfer" else "16,9"
    d.default(resolution=d.facts.resolution, aspect_ratio="1,1" if d.task == "text2image" else seen)
    return canvas.size(d["resolution"], d["aspect_ratio"], frames)


def _sampling(d: _Draft) -> None:
    """Steps, guidance, shift; how files are written."""
    if d.facts.steps:
        fixed = {"num_steps": d.facts.steps, "guidance": 1.0, "normalize_cfg": False}
        for key, value in fixed.items():
            if d[key] not in (None, value):
                raise Wrong(f"is {d[key]}, but {d.facts.name} is distilled to {value}; leave it out", key)
        for key in ("shift", "guidance_interval"):
            if d[key] is not None:
                raise Wrong(
                    f"is given, but {d.facts.name} is distilled and has a schedule of its own; leave it out", key
                )
        d.default(**fixed)
    elif d.task != "transfer":
        d.default(guidance=d.row.guidance)
    d.default(num_steps=d.row.steps, shift=None if d.facts.steps else d.row.shift, normalize_cfg=False)
    d.default(video_save_quality=10, image_save_quality=95)
    d.default(negative_metadata_mode="none", negative_prompt_keep_metadata=True)
    if SEES.get(d.task):
        d.default(condition_video_keep="first")


def _transfer(d: _Draft) -> tuple[int, tuple[int, ...], float]:
    """Frames of all chunks, no clean frames (they differ per chunk), frames per second."""
    hints, given = d.request.hints, d.media("vision_path")
    for hint, said in hints.items():
        if not said.control_path and not (given and hint in COMPUTED):
            remedy = "give its control_path" + (" or a vision_path" if hint in COMPUTED else "")
            raise Wrong(f"has nothing to follow; {remedy}", hint)
        preset = said.preset or ("medium" if hint in COMPUTED and not said.control_path else None)
        d.values[hint] = dataclasses.replace(said, preset=preset)
    if not any(x.weight for x in hints.values()):
        raise Wrong("is 0, and no other control counts; give a weight above 0", f"{next(iter(hints))}.weight")
    g, control, chunk, _ = (
        TRANSFER[next(iter(hints))] if len(hints) == 1 else (task("video2video").guidance, 1.0, 93, 0)
    )
    d.default(guidance=None if d.facts.steps else g, control_guidance=control, num_video_frames_per_chunk=chunk)
    d.default(num_conditional_frames=1, num_first_chunk_conditional_frames=0, max_frames=5000)
    d.default(show_control_condition=False, show_input=False)
    d.default(share_vision_temporal_positions=True, emphasize_control_in_prompt=True)
    per_chunk = _round_up(d, "num_video_frames_per_chunk")
    if d["num_conditional_frames"] >= per_chunk:
        raise Wrong(f"must be less than num_video_frames_per_chunk={per_chunk}; lower it", "num_conditional_frames")
    if d["num_first_chunk_conditional_frames"] and not given:
        raise Wrong("is given, but there is no vision_path to take them from", "num_first_chunk_conditional_frames")
    if d["num_frames"]:
        d.notes.append("num_frames is not used: transfer is as long as its controls, up to max_frames")
    if d["condition_frame_indexes_vision"]:
        raise Wrong("is given, but transfer takes num_conditional_frames instead", "condition_frame_indexes_vision")
    lengths = {h: (d.media(f"{h}.control_path") or given).frames for h in hints}
    total = min(next(iter(lengths.values())), d["max_frames"])
    for hint, n in lengths.items():
        if n < total:
            d.warnings.append(f"{hint} has {n} frames and {next(iter(lengths))} {total}: the rest is mirrored")
    fps = given.fps if given and given.kind == "video" and given.fps else float(d["fps"])
    if fps != d["fps"] and "fps" not in d.defaults:
        d.notes.append(f"fps {d['fps']} is not used: the result runs like vision_path, {fps:g} frames per second")
    return total, (), fps


def _reason(d: _Draft) -> None:
    seen = [k for k, m in d.request.media.items() if m.kind in ("image", "video")]
    if seen and not d.facts.sees:
        raise Wrong(f"is given, but {d.facts.name} has no eyes; ask in words alone", seen[0])
    if d["turns"] and (d["prompt"] or d["images"] or d["vision_path"]):
        raise Wrong("is given, and prompt, images or vision_path too; put everything into turns", "turns")
    if d["images"] and d["vision_path"]:
        raise Wrong("is given, and vision_path too; put every image into images", "images")
    d.default(max_new_tokens=1024, do_sample=False, repetition_penalty=1.0, presence_penalty=0.0, video_fps=2.0)
    for key, inert in (("temperature", 1.0), ("top_k", None), ("top_p", 1.0)):
        if not d["do_sample"] and d[key] not in (None, inert):
            raise Wrong(f"is {d[key]}, which does nothing without do_sample; set do_sample to true", key)
    d.default(temperature=1.0, top_p=1.0)


def _warnings(d: _Draft, frames: int) -> list[str]:
    """What the framework warns about, and what would surprise."""
    out, fps, given = list(d.warnings), d["fps"], d.media("vision_path")
    tier, clip = d["resolution"], d.row.vision == "video" and d.row.action == "none"
    if tier and tier not in d.facts.tiers:
        out.append(f"resolution {tier}: {d.facts.name} has learnt {', '.join(d.facts.tiers)}")
    if clip and not KNOWN_FPS[0] <= fps <= KNOWN_FPS[1]:
        out.append(f"fps {fps}: the models know {KNOWN_FPS[0]} to {KNOWN_FPS[1]} frames per second")
    most = KNOWN_FRAMES.get(tier or "", 400)
    if clip and d.task != "transfer" and not LEAST_FRAMES <= frames <= most:
        out.append(f"num_frames {frames}: the models know {LEAST_FRAMES} to {most} at this size")
    if given and given.kind == "video" and d.task in ("video2video", "video2sound") and abs(given.fps - fps) > 0.5:
        out.append(
            f"vision_path runs at {given.fps:g} frames per second and the result at {fps}; set fps to change that"
        )
    if d["negative_prompt"] and d["guidance"] == 1:
        out.append("negative_prompt does nothing at guidance 1")
    return out
