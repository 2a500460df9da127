"""The exact texts that are tokenised for a generation: system turn, prompt, negative prompt.

In: what the request says, and the geometry of the result. Out: `Prompts`. Two conventions exist for the same weights.
*framework* (cosmos-framework, inference/inference.py, args.py, transfer.py; the code that made the weights): no system
turn but for transfer and image edits; a prompt that is a JSON object gets its metadata as fields, any other as
sentences; the negative prompt gets the same sentences, true ones. *diffusers* (`Cosmos3OmniPipeline.tokenize_prompt`
and its modular blocks): a system turn, sentences only, denied ones ("is not …") for the negative. The misspelling
"a give prompt" and the video sentence in the images' inverse template are part of the conditioning.
Spec: reference_parity.md §1.2, training.md §4.3, model.md §10 (discrepancies 5, 6).
"""

from __future__ import annotations

import functools
import json
import pathlib
import string
from dataclasses import dataclass
from typing import NamedTuple

from data_pipelines import action_prompt
from data_pipelines.canvas import check_convention

SYSTEM_IMAGE = "You are a helpful assistant who will generate images from a give prompt."
SYSTEM_VIDEO = "You are a helpful assistant who will generate videos from a give prompt."
SYSTEM_TRANSFER = (
    "You are a helpful assistant that generates images or videos following the user's instructions"
    " and control signals (edge maps, blur, depth, or segmentation)."
)
SYSTEM_EDIT = "You are a helpful assistant who will edit images based on the user's instructions."
EMPHASIS = (
    "Follow the {names} control video precisely: shape, contour, silhouette, position, and motion of every visible "
    "structure must align with the {names} signal at every frame."
)

IMAGES = ("text2image", "image2image")  # tasks whose result is called an image
ACTIONS = ("forward_dynamics", "inverse_dynamics", "policy")
MODES = ("none", "same", "inverse")
LONGEST_FORM = 6  # of a place in a template: "{fps:999999999.0f}" would fill the memory
OFFICIAL = pathlib.Path(__file__).parent / "official"


class Prompts(NamedTuple):
    """What the tokenizer sees. "" is the empty user turn; None is no system turn."""

    system: str | None
    positive: str
    negative: str


@dataclass(frozen=True)
class Metadata:
    """The official request's keys about metadata in prompts. None = what the convention does."""

    duration_template: str | None = None  # {duration} seconds, {fps}
    resolution_template: str | None = None  # {height}, {width}
    inverse_duration_template: str | None = None
    inverse_resolution_template: str | None = None
    negative_metadata_mode: str | None = None  # one of MODES
    negative_prompt_keep_metadata: bool | None = None  # framework: true (its default) makes "none" mean "same"


def build(
    convention: str,
    task: str,
    prompt: str,
    negative: str | None = None,
    *,
    frames: int,
    fps: float,
    height: int,
    width: int,
    aspect: str | None = None,
    controls: tuple[str, ...] = (),
    emphasize: bool = True,
    use_system_prompt: bool | None = None,
    default_system_prompt: bool = True,
    distilled: bool = False,
    view_point: str | None = "ego_view",
    metadata: Metadata = Metadata(),  # noqa: B008  (frozen)
) -> Prompts:
    """The texts of one generation (of one chunk, for transfer).

    negative: None = the convention's default (framework: the official one for clips, "" for images; diffusers: "").
    frames, height, width: of the result; for actions, rows + 1 and the padded canvas. aspect: the request's, which the
    framework writes into JSON prompts ("16,9" by default; None writes none). controls: names of the hints of `transfer`
    in their order. use_system_prompt overrides; default_system_prompt is diffusers' `default_use_system_prompt` of
    model_index.json. distilled: diffusers takes no negative prompt then. Raises ValueError for an unknown convention,
    view point or metadata mode, a template with unknown places, an fps that is not positive, and for image edits in
    diffusers' convention.
    """
    check_convention(convention)
    if not fps > 0:
        raise ValueError(f"fps={fps} must be positive; give the frame rate of the result.")
    if task == "image2image" and convention == "diffusers":
        raise ValueError("image2image: diffusers cannot edit images; use the prompt convention framework.")
    if task == "transfer" and not controls:
        raise ValueError("transfer: needs the names of its controls (edge, blur, depth, seg, wsm).")
    system = _system(convention, task, frames, use_system_prompt, default_system_prompt)
    if task in ACTIONS:
        scene = action_prompt.Scene(frames, fps, height, width, view_point)
        positive = action_prompt.caption(convention, prompt, scene)
        return Prompts(system, positive, "" if convention == "framework" else negative or "")
    if convention == "framework":  # whole numbers are integers there, whatever a template makes of them
        fps = round(fps) if task == "transfer" or float(fps).is_integer() else fps
    geometry = {"duration": frames / fps, "fps": fps, "height": height, "width": width}
    if convention == "diffusers":
        if task == "transfer":
            return Prompts(system, prompt, negative or "")
        negative = "" if distilled else negative or ""
        return Prompts(system, *_diffusers(prompt, negative, frames, geometry, metadata))
    negative = default_negative(task) if negative is None else negative
    positive, negative = _framework(prompt, negative, task, frames, geometry, aspect, metadata)
    if task == "transfer" and emphasize:
        positive = f"{positive.rstrip()} {EMPHASIS.format(names=', '.join(controls))}"
    return Prompts(system, positive, negative)


@functools.cache
def default_negative(task: str) -> str:
    """The framework's negative prompt when the request gives none: an official JSON caption for clips, else ""."""
    if task in (*IMAGES, *ACTIONS):
        return ""
    return json.dumps(json.loads((OFFICIAL / "neg_prompts.json").read_text(encoding="utf-8")))


def _system(convention: str, task: str, frames: int, asked: bool | None, default: bool) -> str | None:
    own = {"transfer": SYSTEM_TRANSFER, "image2image": SYSTEM_EDIT}.get(task)
    if asked is None:
        asked = own is not None if convention == "framework" else default or own is not None
    if not asked:
        return None
    # the framework's inference takes the image sentence for clips too
    return own or (SYSTEM_IMAGE if frames == 1 or convention == "framework" else SYSTEM_VIDEO)


def _framework(
    prompt: str, negative: str, task: str, frames: int, geometry: dict, aspect: str | None, metadata: Metadata
) -> tuple[str, str]:
    noun = "image" if task in IMAGES else "video"
    duration, resolution, no_duration, no_resolution = _templates(metadata, noun, "video")
    fields = _json_object(prompt)
    if fields is None:
        positive = _sentences(prompt, [duration] * (frames > 1) + [resolution], geometry)
    else:
        positive = _fields(fields, frames, geometry, aspect)
    mode = metadata.negative_metadata_mode or "none"
    if mode not in MODES:
        raise ValueError(f"negative_metadata_mode {mode!r} is not known; it is {', '.join(MODES)}.")
    if mode == "none" and metadata.negative_prompt_keep_metadata in (None, True):
        mode = "same"
    if mode == "none":
        return positive, negative
    templates = [duration] * (frames > 1) + [resolution] if mode == "same" else [no_duration, no_resolution]
    return positive, _sentences(negative, templates, geometry).lstrip(".").strip()


def _diffusers(prompt: str, negative: str, frames: int, geometry: dict, metadata: Metadata) -> tuple[str, str]:
    noun = "image" if frames == 1 else "video"
    duration, resolution, no_duration, no_resolution = _templates(metadata, noun, noun)
    first = slice(1 if frames == 1 else 0, None)  # images have no duration
    texts = []
    mode = metadata.negative_metadata_mode or "inverse"
    if mode not in MODES:
        raise ValueError(f"negative_metadata_mode {mode!r} is not known; it is {', '.join(MODES)}.")
    added = {"none": [], "same": [duration, resolution], "inverse": [no_duration, no_resolution]}
    for text, templates in ((prompt, added["same"]), (negative, added[mode])):
        for template in templates[first]:
            text = text.rstrip(".")
            sentence = _fill(template, geometry)
            text = f"{text}. {sentence}" if text else sentence
        texts.append(text)
    return texts[0], texts[1]


def _templates(m: Metadata, noun: str, inverse_noun: str) -> tuple[str, str, str, str]:
    """duration, resolution, and both denied."""
    return (
        _or(m.duration_template, "The video is {duration:.1f} seconds long and is of {fps:.0f} FPS."),
        _or(m.resolution_template, f"This {noun} is of {{height}}x{{width}} resolution."),
        _or(m.inverse_duration_template, "The video is not {duration:.1f} seconds long and is not of {fps:.0f} FPS."),
        _or(m.inverse_resolution_template, f"This {inverse_noun} is not of {{height}}x{{width}} resolution."),
    )


def _or(given: str | None, default: str) -> str:
    return default if given is None else given


def _sentences(text: str, templates: list[str], geometry: dict) -> str:
    """Each sentence behind ". ", for which the text before gives up the spaces and the periods at its end."""
    for template in templates:
        text = text.strip().rstrip(".") + ". " + _fill(template, geometry)
    return text if templates else text.strip()


def _fill(template: str, geometry: dict) -> str:
    try:
        for _, place, form, _ in string.Formatter().parse(template):
            if place is not None and (place not in geometry or len(form) > LONGEST_FORM):
                raise ValueError(f"at {place!r}")
        return template.format(**geometry)
    except ValueError as e:
        places = ", ".join(f"{{{k}}}" for k in geometry)
        raise ValueError(f"the template {template!r} cannot be filled ({e}); its places are {places}.") from e


def _json_object(prompt: str) -> dict | None:
    """The prompt as a dict, if it is a JSON object."""
    try:
        value = json.loads(prompt)
        json.dumps(value)
    except RecursionError as e:
        raise ValueError("the prompt is JSON nested too deeply to be read; flatten it.") from e
    except ValueError:  # a plain sentence
        return None
    return value if isinstance(value, dict) else None


def _fields(prompt: dict, frames: int, geometry: dict, aspect: str | None) -> str:
    """Metadata as fields: those that are there keep their place, the others are appended; ASCII-escaped as in json."""
    if frames > 1:
        prompt |= {"duration": f"{int(geometry['duration'])}s", "fps": float(geometry["fps"])}
    else:
        prompt.pop("duration", None)
        prompt.pop("fps", None)
    prompt["resolution"] = {"H": int(geometry["height"]), "W": int(geometry["width"])}
    if aspect is not None:
        prompt["aspect_ratio"] = aspect
    return json.dumps(prompt)
