"""Requests that take every road through the pipeline, with their media, tiny: 48×80 pixels, 9 frames, 4 steps.

In: what a checkpoint can do. Out: `Case`s: a request with the official keys, and arrays made here, which `write` puts
into lossless files that the request names. Latents are 3×5: odd, so that patches are padded.
"""

from __future__ import annotations

import copy
import json
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from conversion.folder import Folder
from cosmos_jax.parity.reference import rng
from cosmos_jax.sampling import scheduler_config
from data_pipelines.transfer import HINTS

STEPS, LONG, CHUNK = 10, 35, 4
PIPELINE, MODULAR, LOOP = "Cosmos3OmniPipeline", "modular pipeline", "hand-driven loop"
SIZE = (48, 80)
BASE: dict[str, Any] = dict(
    height=SIZE[0], width=SIZE[1], num_frames=9, num_steps=STEPS, guidance=3.0, fps=24, seed=7,
    prompt="A small robot moves across a table.", negative_prompt="bad",
)  # fmt: skip
ACTION: dict[str, Any] = dict(
    prompt="Pick the cup", negative_prompt="", num_steps=STEPS, guidance=1.0, fps=10, action_chunk_size=CHUNK,
    image_size=256, seed=7,
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a checkpoint can do."""

    sound_rate: int | None = None  # Hz; None: no sound
    action: bool = False
    distilled: bool = False

    @classmethod
    def of(cls, folder: Folder) -> Facts:
        have = folder.components
        sound = have["sound_tokenizer"].config.sampling_rate if "sound_tokenizer" in have else None
        sigmas = scheduler_config.fixed_sigmas(folder.scheduler or {}, folder.index or {})
        return cls(sound, bool(have["transformer"].config.action_dim), sigmas is not None)


@dataclass(frozen=True)
class Case:
    """One request. Its media keys hold names of `media` until `write` has put them somewhere."""

    name: str
    request: dict[str, Any]
    by: str = PIPELINE  # who answers it on PyTorch's side; LOOP: with the framework's prompts (except with sound)
    media: dict[str, np.ndarray] = field(default_factory=dict)  # file name → array
    rate: int = 0  # Hz of the sounds among them

    def write(self, folder: Path) -> Path:
        """Media files and request.json in `folder`, which is made; returns the path of the request."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, x in self.media.items():
            _write(folder / name, x, self.rate)
        request = copy.deepcopy(self.request)
        for table in (request, *(request[h] for h in HINTS if h in request)):
            table |= {k: str((folder / v).resolve()) for k, v in table.items() if k.endswith("_path")}
        path = folder / "request.json"
        path.write_text(json.dumps({"name": self.name} | request, indent=1) + "\n")
        return path


def cases(facts: Facts) -> list[Case]:
    """All that this checkpoint can be asked."""
    if facts.distilled:
        return distilled()
    found = [*vision(), *transfer(), *loops()]
    if facts.action:
        found += actions()
    if facts.sound_rate:
        found += [*sound(), *sound_loops(facts.sound_rate)]
    return found


def _picture(size: tuple[int, int] = (60, 70)) -> dict[str, np.ndarray]:
    return {"first.png": film("picture", 1, *size)[0]}


def _clip(frames: int = 11, size: tuple[int, int] = (50, 90)) -> dict[str, np.ndarray]:
    return {"clip.mp4": film("clip", frames, *size)}


I2V = dict(BASE, model_mode="image2video", vision_path="first.png")
V2V = dict(BASE, model_mode="video2video", vision_path="clip.mp4", condition_frame_indexes_vision=[0, 1], num_frames=13)


def vision() -> list[Case]:
    """Pictures and clips, without sound."""
    return [
        Case("t2i", dict(BASE, model_mode="text2image", num_frames=1)),
        Case("t2v", dict(BASE, model_mode="text2video")),
        Case("i2v", dict(I2V, num_steps=LONG, guidance=6.0, prompt='{"scene": "table"}'), media=_picture()),
        Case("v2v", dict(V2V, fps=12), media=_clip()),
        Case(
            "v2v_last", dict(V2V, num_frames=9, condition_video_keep="last", condition_frame_indexes_vision=[0]),
            media=_clip(),
        ),
    ]  # fmt: skip


def sound() -> list[Case]:
    """The same with sound."""
    with_sound = dict(enable_sound=True)
    return [
        Case("t2i_sound", dict(BASE, model_mode="text2image", num_frames=1) | with_sound),
        Case("t2v_sound", dict(BASE, model_mode="text2video", num_steps=LONG, guidance=6.0) | with_sound),
        Case("i2v_sound_fps10", dict(I2V, fps=10) | with_sound, media=_picture()),
        Case("v2v_sound", V2V | with_sound, media=_clip()),
    ]


def actions() -> list[Case]:
    """Three tasks, three embodiments, three shapes: padded by more than itself, by less, and made smaller."""
    wrist = dict(view_point="wrist_view", guidance=2.0)
    return [
        Case(
            "policy",
            dict(ACTION, model_mode="wam", domain_name="bridge_orig_lerobot", vision_path="first.png"),
            media=_picture((100, 150)),
        ),
        Case(
            "forward_dynamics",
            dict(ACTION, model_mode="forward_dynamics", domain_name="av", vision_path="clip.mp4",
                 action_path="actions.json"),
            media=_clip(3, (150, 150)) | {"actions.json": rows("forward", CHUNK, 9)},
        ),
        Case(
            "inverse_dynamics",
            dict(ACTION, model_mode="inverse_dynamics", domain_name="fractal", vision_path="clip.mp4") | wrist,
            media=_clip(CHUNK + 1, (112, 400)),
        ),
    ]  # fmt: skip


def transfer() -> list[Case]:
    """Controls, in two chunks that share a frame; what both make together is cut to `max_frames`."""
    request = dict(
        BASE, prompt='{"scene": "table"}', fps=30, num_video_frames_per_chunk=9, num_conditional_frames=1, max_frames=13
    )  # fmt: skip
    del request["num_frames"]
    edge, depth = ({h: {"control_path": f"{h}.mp4"}} for h in ("edge", "depth"))
    files = {f"{h}.mp4": film(h, 13, 50, 90) for h in ("edge", "depth")}
    return [
        Case("transfer", request | edge | {"control_guidance": 1.5}, MODULAR, {"edge.mp4": files["edge.mp4"]}),
        Case("transfer_two", request | edge | depth | {"control_guidance": 1.0}, MODULAR, files),
    ]


def distilled() -> list[Case]:
    """A checkpoint with a fixed list of sigmas and no guidance."""
    request = {k: v for k, v in BASE.items() if k not in ("num_steps", "guidance", "negative_prompt")}
    return [
        Case("t2i", dict(request, model_mode="text2image", num_frames=1), MODULAR),
        Case("t2v", dict(request, model_mode="text2video"), MODULAR),
        Case("i2v", dict(request, model_mode="image2video", vision_path="first.png"), MODULAR, _picture()),
    ]


def loops() -> list[Case]:
    """Modes that exist in cosmos-framework alone, with its prompts; media have the size of the result."""
    weighted = {h: {"control_path": f"{h}.mp4", "weight": w} for h, w in (("edge", 1.0), ("depth", 3.0))}
    request = dict(BASE, model_mode="transfer", control_guidance=1.0, emphasize_control_in_prompt=False,
                   num_video_frames_per_chunk=9)  # fmt: skip
    return [
        Case("i2i", dict(BASE, model_mode="image2image", vision_path="first.png", num_frames=1), LOOP, _picture(SIZE)),
        Case("transfer_weighted", request | weighted, LOOP, {f"{h}.mp4": film(h, 9, *SIZE) for h in weighted}),
    ]


def sound_loops(rate: int) -> list[Case]:
    """Sound as a condition, and sound alone."""
    heard = {"heard.wav": noise("heard", rate * BASE["num_frames"] // BASE["fps"])}
    return [
        Case(
            "s2v", dict(I2V, model_mode="audio_image2video", sound_path="heard.wav"), LOOP, _picture(SIZE) | heard, rate
        ),
        Case("v2s", dict(BASE, model_mode="video2sound", vision_path="clip.mp4"), LOOP, _clip(9, SIZE)),
    ]


def film(name: str, frames: int, height: int, width: int) -> np.ndarray:
    """A smooth random clip, uint8 [T,H,W,3]."""
    coarse = rng(f"film {name}").randint(0, 256, (frames, 6, 8, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC)) for x in coarse])


def rows(name: str, count: int, width: int) -> np.ndarray:
    """Normalised actions, float32 [count, width]."""
    return (0.5 * rng(f"rows {name}").standard_normal((count, width))).clip(-1, 1).astype(np.float32)


def noise(name: str, samples: int) -> np.ndarray:
    """A sound that 16 bits hold exactly, float32 [2, samples]."""
    return (rng(f"noise {name}").randint(-12000, 12000, (2, samples)) / 32768).astype(np.float32)


def _write(path: Path, x: np.ndarray, rate: int) -> None:
    kind = path.suffix
    if kind == ".png":
        Image.fromarray(x).save(path)
    elif kind == ".json":
        path.write_text(json.dumps(x.astype(float).tolist()))
    elif kind == ".wav":
        with wave.open(str(path), "wb") as f:
            f.setnchannels(2)
            f.setsampwidth(2)
            f.setframerate(rate)
            f.writeframes((x.T * 32768).astype("<i2").tobytes())
    else:
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264rgb", rate=24)
            stream.height, stream.width, stream.pix_fmt = x.shape[1], x.shape[2], "rgb24"
            stream.options = {"qp": "0"}  # lossless
            for frame in x:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
