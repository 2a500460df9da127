"""How long and how large a result is: frames, clean frames, pixels, from what was asked and from the media given.

In: a `Draft`, a request being filled in. Out: numbers, and the draft's defaults. What does not fit is a `Wrong`.
request_resolve.py calls these. Sizes come from canvas.py; transfer's numbers are in `TRANSFER`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines import canvas, embodiments
from data_pipelines.request_facts import Facts
from data_pipelines.request_fields import MODES, Request
from data_pipelines.request_file import task_of
from data_pipelines.request_media import Media
from data_pipelines.request_values import Wrong, show
from data_pipelines.tasks import ALL, Task, task

TRANSFER = {  # control → guidance, control guidance, frames per chunk, fps; only for a control alone
    "edge": (3.0, 1.5, 93, None),
    "blur": (3.0, 1.5, 93, None),
    "depth": (3.0, 1.5, 93, None),
    "seg": (3.0, 2.0, 93, None),
    "wsm": (1.0, 3.0, 101, 10),
}
COMPUTED = {"edge": "preset_edge_threshold", "blur": "preset_blur_strength"}  # controls that vision_path can give


class Draft:
    """A request that is being filled in."""

    def __init__(self, request: Request, facts: Facts, convention: str):
        self.request, self.facts, self.convention = request, facts, convention
        self.values = dict(request.said)
        self.task = task_of(request)
        self.row: Task = task(self.task)
        self.defaults: list[str] = []
        self.notes = list(request.notes)
        self.warnings: list[str] = []
        self.called = request.model_mode or {v: k for k, v in MODES.items()}.get(self.task, self.task)  # for messages

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def default(self, **values: Any) -> None:
        for key, value in values.items():
            if key not in self.values and value is not None:
                self.values[key] = value
                self.defaults.append(key)

    def media(self, key: str) -> Media | None:
        return self.request.media.get(key)


def _round_up(d: Draft, key: str) -> int:
    """The value of a key as a number of frames that latents can hold, 1 + 4k."""
    frames = canvas.frames_up(d[key], d.facts.temporal)
    if frames != d[key]:
        d.notes.append(f"{key} {d[key]} is rounded up to {frames} (1 + {d.facts.temporal}k)")
    d.values[key] = frames
    return frames


def length(d: Draft) -> tuple[int, tuple[int, ...], float]:
    """Frames of the result, its clean latent frames, its frames per second."""
    given, step = d.media("vision_path"), d.facts.temporal
    d.default(fps=d.facts.fps)
    if d.row.action != "none":
        frames = _chunk(d)
    elif d.row.vision == "image":
        if d["num_frames"] not in (None, 1):
            raise Wrong(
                f"is {d['num_frames']}, but {d.called} makes one frame; use text2video or image2video", "num_frames"
            )
        frames = 1
    else:
        if d.task == "video2sound" and given:
            d.default(num_frames=(min(given.frames, d.facts.frames) - 1) // step * step + 1)
        if d["num_frames"] == 1:
            raise Wrong(f"is 1, but {d.called} makes a clip; use text2image or more frames", "num_frames")
        d.default(num_frames=d.facts.frames)
        frames = _round_up(d, "num_frames")
    d.default(num_frames=frames)
    latents = 1 + (frames - 1) // step
    clean = _clean(d, given, latents)
    need = 1 + step * max(clean, default=-1) if given and given.kind == "video" else 0
    if given and given.frames < need:
        raise Wrong(f"has {given.frames} frames, but {d.called} needs {need} of it; use a longer video", "vision_path")
    return frames, clean, float(d["fps"])


def _clean(d: Draft, given: Media | None, latents: int) -> tuple[int, ...]:
    said, key = d["condition_frame_indexes_vision"], "condition_frame_indexes_vision"
    if d.row.clean_frames == ALL or d.row.action != "none" or not given or d.row.vision == "image":
        if said:
            why = "nothing is given to condition on" if not given else f"{d.called} decides that itself"
            raise Wrong(f"is given, but {why}; leave it out", key)
        return tuple(range(latents if d.row.clean_frames == ALL else d.row.clean_frames))
    d.default(**{key: (0,) if given.kind == "image" else (0, 1)})
    if given.kind == "video":
        d.default(condition_video_keep="first")
    clean = tuple(sorted(set(d[key])))
    if not clean or clean[-1] >= latents or len(clean) == latents:
        raise Wrong(f"is {list(clean)}, but it must leave some of the {latents} latent frames to make", key)
    return clean


def _chunk(d: Draft) -> int:
    """Frames of an action task: one more than its actions."""
    d.default(image_size=256, action_chunk_size=16, view_point="ego_view")
    rows, step, table = d["action_chunk_size"], d.facts.temporal, d.media("action_path")
    if rows % step:
        near = (max(rows // step, 1) * step, (rows // step + 1) * step)
        raise Wrong(f"is {rows}, but frames are 1 + {step}k; use {near[0]} or {near[1]}", "action_chunk_size")
    if d["num_frames"] not in (None, rows + 1):
        raise Wrong(f"is {d['num_frames']}, but action_chunk_size makes it {rows + 1}; leave it out", "num_frames")
    if d.row.action == "clean" and not table:
        raise Wrong(f"is missing, and {d.called} needs one; name a JSON file of actions", "action_path")
    if table and table.frames != rows:
        if d.convention == "framework":
            raise Wrong(f"has {table.frames} rows, but action_chunk_size is {rows}; make them equal", "action_path")
        d.notes.append(f"action_path has {table.frames} rows, cut or repeated to {rows} as diffusers does")
    if not d["domain_name"]:
        raise Wrong(f"is missing, and {d.called} needs one; name the embodiment", "domain_name")
    if d["action_stats"]:
        d.default(action_normalization="quantile")
    elif d["action_normalization"]:
        raise Wrong("is given without action_stats, which it is about; give both or neither", "action_normalization")
    if table and d["raw_action_dim"] not in (None, table.width):
        what = f"is {d['raw_action_dim']}, but a row of action_path has {table.width}; leave it out"
        raise Wrong(what, "raw_action_dim")
    try:
        body = embodiments.embodiment(d["domain_name"])
        width = embodiments.width(body, table.width if table else d["raw_action_dim"])
    except ValueError as e:  # that file's own sentence
        words = str(e).rstrip(".")
        known = words.removeprefix("domain_name ")
        raise Wrong(known if known != words else f"is {show(d['domain_name'])}, but {words}", "domain_name") from None
    if width > d.facts.action_dim:
        what = (
            f"has actions of {width} numbers, but {d.facts.name} takes {d.facts.action_dim} at most; use another model"
        )
        raise Wrong(what, "domain_name")
    d.default(raw_action_dim=width)
    return rows + 1


def size(d: Draft, frames: int) -> tuple[int, int]:
    """Height and width of the result in pixels."""
    h, w = d["height"], d["width"]
    if (h is None) != (w is None):
        raise Wrong("is given alone; give height and width, or resolution and aspect_ratio", "height" if h else "width")
    for key in ("height", "width") if h else ():
        if d.row.action != "none":
            raise Wrong(f"is given, but {d.called} is sized by image_size and the observation; leave it out", key)
        if d[key] % d.facts.spatial:
            raise Wrong(f"is {d[key]}, but must be a multiple of {d.facts.spatial}; change it", key)
    for key in ("resolution", "aspect_ratio"):
        if d[key] and h:
            raise Wrong("is given, and height and width too; keep one way to say the size", key)
        if d[key] and d.row.action != "none":
            raise Wrong(f"is given, but {d.called} is sized by image_size and the observation; leave it out", key)
        if d[key] and d.task == "image2image" and not (d["resolution"] and d["aspect_ratio"]):
            raise Wrong("is given alone; an edited image takes both resolution and aspect_ratio, or neither", key)
    if h:
        d.default(aspect_ratio=canvas.closest_aspect(h, w))
        return h, w
    pictures = [m for m in d.request.media.values() if m.kind != "sound" and m.kind != "actions"]
    source = d.media("vision_path") or (pictures[0] if pictures else None)  # the first control
    if d.row.action != "none":
        try:
            return canvas.action_canvas(source.height, source.width, d["image_size"], d.convention)
        except ValueError as e:  # canvas.py's own sentence
            raise Wrong(str(e).removeprefix("image_size ").rstrip("."), "image_size") from None
    if d.task == "image2image" and not d["resolution"]:
        return canvas.edit_size(source.height, source.width)
    shape = "1,1" if d.task == "text2image" else "16,9"
    if d.task == "transfer":
        shape = canvas.closest_aspect(source.height, source.width)
    d.default(resolution=d.facts.resolution, aspect_ratio=shape)
    return canvas.size(d["resolution"], d["aspect_ratio"], frames)


def transfer(d: Draft) -> tuple[int, tuple[int, ...], float]:
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
    g, control, chunk, rate = (
        TRANSFER[next(iter(hints))] if len(hints) == 1 else (task("video2video").guidance, 1.0, 93, None)
    )
    d.default(guidance=None if d.facts.steps else g, control_guidance=control, num_video_frames_per_chunk=chunk)
    d.default(fps=rate or d.facts.fps, num_conditional_frames=1, num_first_chunk_conditional_frames=0, max_frames=5000)
    d.default(show_control_condition=False, show_input=False)
    d.default(share_vision_temporal_positions=True, emphasize_control_in_prompt=True)
    if not d["share_vision_temporal_positions"]:
        what = "is false, but released models have learnt controls that share time with the result; leave it out"
        raise Wrong(what, "share_vision_temporal_positions")
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
