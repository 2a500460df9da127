"""How the examples of each task are shown: what was made beside what is true.

In: the arrays of workdir/examples/<name>.npz (written by cosmos_jax/evaluate). Out: HTML.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cosmos_jax.report.charts import Line, chart
from cosmos_jax.report.html import card, cards, clip, compared, escape, table

CHANNELS = ("forward, mm", "sideways, mm", "turn, degrees", "gripper open")
Data = dict[str, np.ndarray]


def clips(data: Data) -> str:
    """Prompt, generated clip (with its sound, if any), true clip."""
    items = []
    for k, prompt in enumerate(data["prompt"]):
        heard = (data["sound"][k], data["true_sound"][k]) if "sound" in data else (None, None)
        figures = [clip(data["video"][k], "generated", heard[0]), clip(data["true_video"][k], "true", heard[1])]
        if heard[0] is not None:
            figures.append(_waves(*heard))
        items.append(card(f"“{escape(prompt)}”", *figures))
    return cards(items)


def _waves(made: np.ndarray, true: np.ndarray, rate: int = 8000, hop: int = 80) -> str:
    """Loudness over time: generated and true."""

    def line(name, wave, **look):
        loud = np.sqrt((wave[:, : wave.shape[1] // hop * hop].reshape(2, -1, hop) ** 2).mean((0, 2)))
        return Line(name, np.arange(len(loud)) * hop / rate, loud, **look)

    return chart(
        "loudness", [line("generated", made), line("true", true, dashed=True, colour=1)], "s", width=300, height=120
    )


def captions(data: Data) -> str:
    items = []
    for video, said, true in zip(data["video"], data["said"], data["true"], strict=True):
        text = f"<b>said:</b> {compared(str(said), str(true))}<br><b>true:</b> {escape(true)}"
        items.append(card(text, clip(video, "the clip; it looks at four frames")))
    return cards(items)


def questions(data: Data) -> str:
    items = []
    for k, video in enumerate(data["video"]):
        rows, css = [], []
        for q, said, true in zip(*(data[c][data["clip"] == k] for c in ("question", "said", "true")), strict=True):
            right = said == true
            rows.append([escape(q), escape(said) or "(nothing)", "right" if right else f"truth: {escape(true)}"])
            css.append("" if right else "lost")
        items.append(card("", clip(video, "the clip"), table(["question", "answer", ""], rows, css)))
    return cards(items)


def actions(data: Data) -> str:
    """The clip, and predicted against recorded actions."""
    items = []
    for k, prompt in enumerate(data["prompt"]):
        got, true = _readable(data["got"][k]), _readable(data["true"][k])
        x = np.arange(len(true))
        plots = [
            chart(name, [Line("predicted", x, got[:, c]), Line("true", x, true[:, c], dashed=True, colour=1)],
                  "step", width=230, height=130)
            for c, name in enumerate(CHANNELS)
        ]  # fmt: skip
        items.append(card(f"“{escape(prompt)}”", clip(data["video"][k], "given"), *plots))
    return cards(items, "wide")


def _readable(raw: np.ndarray) -> np.ndarray:
    """Raw actions [N,10] → [N,4]: millimetres forward and sideways, degrees of turn, gripper."""
    turn = np.degrees(np.arctan2(raw[:, 4], raw[:, 3]))
    return np.stack([1000 * raw[:, 0], 1000 * raw[:, 1], turn, raw[:, 9]], 1)


def rollouts(data: Data) -> str:
    """What happened in the simulator, and what the model imagined with its first actions."""
    items = []
    for k, (prompt, won) in enumerate(zip(data["prompt"], data["success"], strict=True)):
        word = '<b class="good">done</b>' if won else '<b class="bad">not done</b>'
        items.append(
            card(f"“{escape(prompt)}” {word}", clip(data["video"][k], "what happened"),
                 clip(data["imagined"][k], "what it imagined at first"))
        )  # fmt: skip
    return cards(items)


EXAMPLES: dict[str, list[tuple[str, Callable[[Data], str]]]] = {  # task → (file, how it is shown)
    "reason": [("caption", captions), ("question", questions)],
    "inverse_dynamics": [("inverse_dynamics", actions)],
    "policy": [("policy", rollouts)],
    **{t: [(t, clips)] for t in ("text2image", "text2video", "text2video_sound", "image2video", "video2video",
                                 "forward_dynamics")},
}  # fmt: skip
