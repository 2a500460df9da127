"""A checked request and what its model can do → everything decided: size, length, steps, seeds, with a record of it.

In: a `Request` (request_file.py), `Facts` of a checkpoint. Out: `Resolved`: the request with every default filled in,
the names of those, notes and warnings. What contradicts the task or the model is a `RequestError` of one sentence.
The numbers are those of cosmos-framework (spec training.md §4.2, model.md §7.6): steps, guidance and shift from
tasks.TABLE, sizes from canvas.py.
"""

from __future__ import annotations

import dataclasses
import hashlib

from data_pipelines.request_facts import FAMILIES, Facts, Resolved
from data_pipelines.request_fields import KEYS, Request
from data_pipelines.request_geometry import Draft, length, size, transfer
from data_pipelines.request_values import RequestError, Wrong

__all__ = ["FAMILIES", "Facts", "Resolved", "resolve"]


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
USERS = {"made": "generation", "action": "actions", "transfer": "transfer", "reason": "the reasoner"}
KNOWN_FPS = (10, 30)
KNOWN_FRAMES = {"256": 400, "480": 300, "704": 200, "720": 200, "768": 200}
LEAST_FRAMES = 24


def resolve(request: Request, facts: Facts, convention: str = "framework") -> Resolved:
    """Fill in what was left open, for this model. convention: of prompts and sizes (canvas.py). RequestError."""
    try:
        d = Draft(request, facts, convention)
        _belongs(d)
        _prompt(d)
        _vision(d)
        if d.task == "reason":
            _reason(d)
            return _finish(d, 0, 0, 0, 0.0, ())
        _sound(d)
        frames, clean, fps = transfer(d) if d.task == "transfer" else length(d)
        height, width = size(d, frames)
        _sampling(d)
        return _finish(d, height, width, frames, fps, clean)
    except Wrong as e:
        raise RequestError(f"{request.where}: {e.at} {e.what}." if e.at else f"{request.where} {e.what}.") from None


def _finish(d: Draft, height: int, width: int, frames: int, fps: float, clean: tuple[int, ...]) -> Resolved:
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


def _belongs(d: Draft) -> None:
    """Every key is for this task, and the model can do the task."""
    mine = {"all", "reason"} if d.task == "reason" else {"all", "made"}
    mine |= {"action"} if d.row.action != "none" else set()
    mine |= {"transfer"} if d.task == "transfer" else set()
    inert = {"control_guidance": 1.0}
    for key, value in d.request.said.items():
        if KEYS[key]["used"] not in mine and inert.get(key) != value:
            raise Wrong(
                f"is for {USERS[KEYS[key]['used']]}, not for {d.called}; leave it out or change model_mode", key
            )
    if d.row.generates and not d.facts.generates:
        raise Wrong(f"is {d.called}, but {d.facts.name} only reasons; use a checkpoint that generates", "model_mode")
    if d.row.action != "none" and not d.facts.action_dim:
        raise Wrong(f"is {d.called}, but {d.facts.name} has no actions; use a checkpoint that has", "model_mode")


def _prompt(d: Draft) -> None:
    needs = d.task in ("reason", "image2image") or (
        d.row.clean_frames == 0 and d.task not in ("transfer", "sound2video")
    )
    if needs and not d["turns"] and not (d["prompt"] or "").strip():
        raise Wrong(f"is missing, and {d.called} needs one; write what is wanted", "prompt")
    if not d["turns"]:
        d.default(prompt="")


def _vision(d: Draft) -> None:
    """vision_path is there when the task needs it, and is what the task takes."""
    kinds, needed = SEES.get(d.task, ((), False))
    wanted = " or ".join({"image": "an image", "video": "a video"}[k] for k in kinds)
    given = d.media("vision_path")
    if given and given.kind not in kinds:
        other = f"use model_mode {given.kind}2video" if not kinds or d.task.endswith("2video") else "name another file"
        raise Wrong(f"is {given.path.name}, but {d.called} takes {wanted or 'none'}; {other}", "vision_path")
    if needed and not given:
        raise Wrong(f"is missing, and {d.called} needs {wanted}; name a file", "vision_path")


def _sound(d: Draft) -> None:
    rule = d.row.sound
    d.default(enable_sound=rule in ("noisy", "clean"))
    if d["enable_sound"] and rule == "none":
        raise Wrong(f"is true, but {d.called} has no sound; leave it out", "enable_sound")
    if not d["enable_sound"] and rule in ("noisy", "clean"):
        raise Wrong(f"is false, but {d.called} is about sound; leave it out", "enable_sound")
    if d["enable_sound"] and not d.facts.sound:
        key = "enable_sound" if d.request.enable_sound else "model_mode"
        raise Wrong(f"asks for sound, but {d.facts.name} has none; leave it out or use a model with sound", key)
    if rule == "clean" and not d["sound_path"]:
        raise Wrong(f"is missing, and {d.called} needs one; name a sound file", "sound_path")
    if rule != "clean" and d["sound_path"]:
        raise Wrong(f"is given, but {d.called} is not made for a sound; use model_mode audio_image2video", "sound_path")


def _sampling(d: Draft) -> None:
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


def _reason(d: Draft) -> None:
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


def _warnings(d: Draft, frames: int) -> list[str]:
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
