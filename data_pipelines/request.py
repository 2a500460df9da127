"""From what a user asks for to a `Sample`: conditions encoded, everything else zeros that the sampler will replace.

In: a task, a prompt, media as arrays. Out: a `Sample` that the training code plans and packs. Every mistake is one
`ValueError` sentence, raised before jax is asked for anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.sample import Sample, validate
from data_pipelines.schema import SequenceSpec
from data_pipelines.tasks import ALL, Task, task

CAPTION_REQUEST = "Describe the video."


@dataclass(frozen=True)
class Canvas:
    """What a request that does not say otherwise makes, and the geometry of the codecs."""

    frames: int
    height: int
    width: int
    fps: float
    spatial: int  # pixels per latent side
    sound_rate: int  # samples per second of the waveform
    domain: int = 0  # embodiment of actions
    look: tuple[float, ...] = (0.0, 1.0)  # which frames the reasoner sees, as shares of the clip


def request_to_sample(
    name: str,
    prompt: str | None = None,
    *,
    assets,
    spec: SequenceSpec,
    canvas: Canvas,
    image: np.ndarray | None = None,
    video: np.ndarray | None = None,
    actions: np.ndarray | None = None,
    sound: bool | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    sample_id: int = 0,
) -> Sample:
    """The sample of a request; `validate` has seen it.

    image uint8 [H,W,3]; video uint8 [T,H,W,3], whose leading frames are the condition; actions [rows,width] in raw
    units; sound: make sound too, where the task leaves the choice (default: with a clip, if the model can); num_frames
    of the result, 1 + 4k. assets: codecs, action statistics and tokenizer (`toy_world.samples.ToyAssets` or its like).
    """
    row = task(name)
    if image is not None and video is not None:
        raise ValueError(f"{name}: got both an image and a video; pass one of them.")
    if not row.generates:
        return _question(row, prompt, image, video, actions, spec, canvas, fps or canvas.fps, sample_id)
    if row.context != "none" or row.sound == "clean":
        given = {"source": "a source image", "controls": "control videos", "none": "a sound track"}[row.context]
        raise ValueError(f"{name}: starts from {given}, which a toy model was not trained on.")
    if not prompt and (row.clean_frames == 0 or row.prompt == "instruction"):
        raise ValueError(f"{name}: needs a prompt (a {row.prompt}).")
    if (row.action == "clean") != (actions is not None):
        raise ValueError(f"{name}: {'needs' if actions is None else 'takes no'} actions.")
    if sound is not None and row.sound != "optional" and sound != (row.sound == "noisy"):
        raise ValueError(f"{name}: {'makes no sound' if sound else 'always makes sound'}; drop the sound option.")
    if sound and not spec.sound_dim:
        raise ValueError(f"{name}: this model has no sound stream; drop the sound option.")

    frames = _length(row, video, actions, num_frames, spec, canvas)
    seen = _condition(row, image, video, spec)
    h, w = seen.shape[1:3] if seen is not None else (canvas.height, canvas.width)
    shape = (spec.latent_channels, 1 + (frames - 1) // spec.temporal_factor, h // canvas.spatial, w // canvas.spatial)
    latents = np.zeros(shape, np.float32)
    if seen is not None:
        known = assets.video.encode(seen)
        latents[:, : known.shape[1]] = known

    fps = fps or canvas.fps
    wants_sound = row.sound == "noisy" or (bool(spec.sound_dim) and (row.usually_sounds if sound is None else sound))
    seconds = frames / fps
    s = Sample(
        name,
        prompt or "",
        sample_id,
        vision_latents=latents,
        sound_latents=np.zeros((spec.sound_dim, _ceil(seconds * spec.sound_latent_fps)), np.float32)
        if wants_sound
        else None,
        actions=_actions(row, actions, assets, frames),
        domain=canvas.domain,
        fps=fps,
    )
    validate(s, spec)
    return s


def _ceil(x: float) -> int:
    return int(np.ceil(x - 1e-6))  # 42.500000001 latents are 43, 42.0000000001 are 42


def _grid(frames: int, factor: int, what: str) -> None:
    """Refuse a number of frames that is not 1 + factor·k."""
    if frames < 1 or (frames - 1) % factor:
        below = 1 + factor * max((frames - 1) // factor, 0)
        raise ValueError(f"{what} is {frames}, but clips have 1 + {factor}k frames; use {below} or {below + factor}.")


def _length(row: Task, video, actions, num_frames: int | None, spec: SequenceSpec, canvas: Canvas) -> int:
    """Frames of the result."""
    f = spec.temporal_factor
    if row.vision == "image":
        if num_frames not in (None, 1):
            raise ValueError(f"{row.name}: makes one frame, not num_frames={num_frames}; use text2video for a clip.")
        return 1
    given = None
    if row.clean_frames == ALL and video is not None:
        given, what = len(video), f"{row.name}: the length of the video"
    elif actions is not None:
        given, what = len(actions) + 1, f"{row.name}: the number of action rows plus one"
    if given is not None:
        _grid(given, f, what)
        if num_frames not in (None, given):
            raise ValueError(f"{row.name}: num_frames={num_frames}, but {what.split(': ')[1]} is {given}; drop one.")
        return given
    frames = num_frames or canvas.frames
    _grid(frames, f, f"{row.name}: num_frames")
    return frames


def _condition(row: Task, image, video, spec: SequenceSpec) -> np.ndarray | None:
    """The pixels that the task conditions on: uint8 [1+4k,H,W,3], or None."""
    if row.clean_frames == 0:
        if image is not None or video is not None:
            raise ValueError(f"{row.name}: takes no image or video; use image2video or video2video.")
        return None
    need = 1 if row.clean_frames == ALL else 1 + spec.temporal_factor * (row.clean_frames - 1)
    if row.clean_frames == ALL and video is None:
        raise ValueError(f"{row.name}: needs a video.")
    if video is None and (image is None or need > 1):
        raise ValueError(f"{row.name}: needs {'an image' if need == 1 else f'a video of at least {need} frames'}.")
    seen = image[None] if video is None else video
    if len(seen) < need:
        raise ValueError(f"{row.name}: conditions on {need} frames, but the video has {len(seen)}; pass a longer one.")
    return seen if row.clean_frames == ALL else seen[:need]


def _actions(row: Task, raw, assets, frames: int) -> np.ndarray | None:
    """Normalised actions: the given ones, or zeros to be replaced."""
    if row.action == "none":
        return None
    if raw is not None:
        return assets.stats.normalise(np.asarray(raw, np.float32))
    return np.zeros((frames - 1, len(assets.stats.lo)), np.float32)


def _question(row: Task, prompt, image, video, actions, spec, canvas: Canvas, fps: float, sample_id: int) -> Sample:
    """A question about an image or a video; only a few frames of it are looked at."""
    if actions is not None:
        raise ValueError(f"{row.name}: takes no actions.")
    if image is None and video is None:
        raise ValueError(f"{row.name}: needs an image or a video to talk about.")
    clip = image[None] if video is None else video
    at = np.round(np.asarray(canvas.look) * (len(clip) - 1)).astype(int) if len(clip) > 1 else np.zeros(1, int)
    groups = [at[i : i + spec.vit_temporal] for i in range(0, len(at), spec.vit_temporal)]
    times = tuple(float(g.mean()) / fps for g in groups)
    s = Sample(
        row.name,
        prompt or CAPTION_REQUEST,
        sample_id,
        fps=fps,
        frames=np.ascontiguousarray(clip[at]),
        frame_times=times,
    )
    validate(s, spec)
    return s
