"""What a checkpoint can do, and what becomes of a request for it.

In: what the folder of a checkpoint says. Out: `Facts`, which go into `request_resolve.resolve`; `Resolved`, which comes
out of it: all that a run needs to know, and its record for run.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.request_fields import Hint, Request


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

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation for reasoner.Frontend: pictures before the words, as cosmos-framework places them."""
        r = self.request
        if r.turns:
            return [
                turn
                | {"content": [_placed(p, r.path(f"turns[{i}].content[{j}]")) for j, p in enumerate(turn["content"])]}
                for i, turn in enumerate(r.turns)
            ]
        seen = [{"type": m.kind, m.kind: m.path} for m in r.media.values()]
        return [{"role": "user", "content": [*seen, {"type": "text", "text": r.prompt}]}]

    @property
    def decoding(self) -> dict[str, Any]:
        """How an answer is drawn, in the words of `cosmos_jax.config.SampleConfig`."""
        r = self.request
        draw = {"temperature": r.temperature, "top_k": r.top_k or 0, "top_p": r.top_p} if r.do_sample else {}
        return (
            {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
            | draw
            | {
                "max_new_tokens": r.max_new_tokens,
                "repetition_penalty": r.repetition_penalty,
                "presence_penalty": r.presence_penalty,
            }
        )

    def record(self) -> dict[str, Any]:
        """For run.json: every value, and how it came about."""
        keys = {k: dataclasses.asdict(v) if isinstance(v, Hint) else v for k, v in self.request.said.items()}
        own = {k: getattr(self, k) for k in ("task", "height", "width", "frames", "fps", "sound", "seeds")}
        media = {
            k: {"path": str(m.path), "sha256": hashlib.sha256(m.path.read_bytes()).hexdigest()}
            for k, m in self.request.media.items()
        }
        return keys | own | {"media": media} | {k: list(getattr(self, k)) for k in ("defaults", "notes", "warnings")}


def _placed(part: dict[str, Any], path: Path | None) -> dict[str, Any]:
    return part | {part["type"]: path} if path else part
