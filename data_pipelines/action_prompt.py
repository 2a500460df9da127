"""The caption of an action clip: a JSON object that says who looks, what happens, how long and how large.

In: an instruction and the geometry of the clip. Out: the text the model was trained on. The two conventions differ in
empty instructions, idle frames, the names of odd aspects and the view points they know (cosmos-framework,
data/generator/action/utils/json_formatter.py; diffusers, `Cosmos3OmniPipeline._build_action_json_prompt`; spec
model.md §8.6).
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass

from data_pipelines import canvas

FRAMING = {
    "ego_view": "This video is captured from a first-person perspective looking at the scene.",
    "third_person_view": "This video is captured from a third-person perspective looking towards the agent from the "
    "front.",
    "wrist_view": "This video is captured from a wrist-mounted camera.",
    "concat_view": "This video contains concatenated views from multiple camera perspectives.",
    "top_down_2d_view": "This video is captured from a top-down view of a flat 2D scene.",
    "video_game_view": "This video is captured from an in-game camera perspective in a virtual environment.",
}
DIFFUSERS_VIEWS = tuple(FRAMING)[:4]  # of the others it drops the sentence


@dataclass(frozen=True)
class Scene:
    """What an action caption says beside its instruction."""

    frames: int  # of the clip: action rows + 1
    fps: float
    height: int  # of the padded canvas
    width: int
    view_point: str | None = "ego_view"  # one of FRAMING; None = no sentence
    view_description: str | None = None  # more about the view: which cameras are tiled, and how (framework)
    idle_frames: int | None = None  # rows in which nothing moves (framework; training data, not inverse dynamics)


def caption(convention: str, instruction: str, scene: Scene) -> str:
    """The caption. ValueError for a view point nobody knows, or an fps that is not positive.

    framework: an empty instruction is the empty caption; keys without a value are left out. diffusers: always JSON.
    """
    if scene.view_point is not None and scene.view_point not in FRAMING:
        close = difflib.get_close_matches(str(scene.view_point), FRAMING, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"view_point {scene.view_point!r} is not known{hint}; they are {', '.join(FRAMING)}.")
    if not (scene.fps > 0 and math.isfinite(scene.fps)):
        raise ValueError(f"fps={scene.fps} must be positive; give the frame rate of the clip.")
    text = instruction.strip()
    framework = convention == "framework"
    if framework and not text:
        return ""
    view = scene.view_point if framework or scene.view_point in DIFFUSERS_VIEWS else None
    framing = FRAMING.get(view, "") if view else ""
    happening = {"description": text if text.endswith((".", "!", "?")) or not text else text + "."}
    if framework:
        framing = " ".join(s for s in (framing, (scene.view_description or "").rstrip()) if s)
        if scene.idle_frames is not None:
            happening["idle_frame"] = f"{scene.idle_frames} out of {scene.frames - 1}."
    seconds = scene.frames / scene.fps
    minutes, rest = divmod(round(seconds), 60)  # half to even
    aspect = canvas.named_aspect if framework else canvas.closest_aspect
    return json.dumps(
        {
            **({"cinematography": {"framing": framing}} if framing else {}),
            "actions": [{"time": f"0:00-{minutes}:{rest:02d}", **happening}],
            "duration": f"{int(seconds)}s",
            "fps": float(scene.fps),
            "resolution": {"H": int(scene.height), "W": int(scene.width)},
            "aspect_ratio": aspect(scene.height, scene.width),
        }
    )
