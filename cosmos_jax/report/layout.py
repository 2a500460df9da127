"""Who sees whom: the tokens of a packed row and its attention mask, drawn from the batch itself.

In: a packed batch (data_pipelines/schema.py). Out: HTML. The mask is made of the same two functions that the reference
attention masks with (pallas_kernels/attention/reference.py): und is causal, gen sees [und; gen], both inside a segment.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np

from cosmos_jax.report.html import picture
from data_pipelines.schema import MODALITIES
from pallas_kernels.attention import segments
from pallas_kernels.attention.reference import same_segment, seen

KINDS = {  # what a token is → colour
    "text": "#7a869a",
    "visual features": "#0b7285",
    "text that predicts the answer": "#9c36b5",
    "vision, clean": "#8db4f5",
    "vision, noisy": "#2557d6",
    "action, clean": "#f7b267",
    "action, noisy": "#d9480f",
    "sound, clean": "#8ce99a",
    "sound, noisy": "#2b8a3e",
    "padding": "#e4e7ec",
}
NAMES = list(KINDS)
RGB = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in KINDS.values()], np.uint8)
BAND = 6  # pixels of the bands along the mask


def kinds(batch: dict, row: int) -> tuple[np.ndarray, np.ndarray]:
    """What each und and each gen token of a row is: two arrays of indices into KINDS."""
    und = np.where(batch["und_vit_index"][row] >= 0, 1, np.where(batch["und_targets"][row] >= 0, 2, 0))
    und = np.where(batch["und_segment_ids"][row] < 0, NAMES.index("padding"), und)
    gen = np.full(batch["gen_segment_ids"].shape[1], NAMES.index("padding"))
    for m in MODALITIES:
        index, noisy = batch[f"{m}_index"][row], batch[f"{m}_noisy"][row]
        for word, which in (("clean", ~noisy), ("noisy", noisy)):
            place = index[which & (index >= 0)]
            if place.size:
                gen[place] = NAMES.index(f"{m}, {word}")
    return und, gen


def mask(batch: dict, row: int) -> np.ndarray:
    """[U+G, U+G] bool: may the query of this line see the key of this column?"""
    und, gen = batch["und_segment_ids"][row : row + 1], batch["gen_segment_ids"][row : row + 1]
    u, g = und.shape[1], gen.shape[1]
    out = np.zeros((u + g, u + g), bool)
    (ids,), (limit,) = segments.causal(und)[1:]
    out[:u, :u] = seen(und, ids, limit)[0]
    if g:
        weight = batch["control_weight"][row]
        together: list[Any] = [gen] if not len(weight) else [np.where(w > 0, gen, -1) for w in weight]
        out[u:, :u] = same_segment(gen, und)[0]
        out[u:, u:] = np.logical_or.reduce([same_segment(ids, ids)[0] for ids in together])
    return out


def draw(batch: dict, row: int, caption: str, scale: int = 1) -> str:
    """The mask as a figure. Lines are queries, columns keys; a cell has its key's colour, white is not seen."""
    und, gen = kinds(batch, row)
    colours = RGB[np.concatenate([und, gen])]
    cells = np.where(mask(batch, row)[..., None], colours[None], 255).astype(np.uint8)
    n, u = len(cells), len(und)
    image = np.full((n + BAND + 2, n + BAND + 2, 3), 255, np.uint8)
    image[BAND + 2 :, BAND + 2 :] = cells
    image[:BAND, BAND + 2 :], image[BAND + 2 :, :BAND] = colours[None], colours[:, None]
    if len(gen):  # the border of the towers
        line = BAND + 2 + u
        image[line - 1, BAND + 2 :: 2] = image[BAND + 2 :: 2, line - 1] = 0
    return picture(image, caption, scale, "mask")


def strips(batch: dict, row: int) -> str:
    """The two streams as bars: runs of equal tokens with their lengths."""
    out = []
    for name, stream in zip(("und", "gen"), kinds(batch, row), strict=True):
        runs = [(k, len(list(same))) for k, same in groupby(stream.tolist())]
        spans = "".join(
            f'<span style="flex:{n};background:{KINDS[NAMES[k]]}" title="{n} × {NAMES[k]}">{n if n > 5 else ""}</span>'
            for k, n in runs
        )
        text = "no tokens" if not runs else f"{len(stream)} tokens"
        out.append(f'<div class="note">{name}: {text}</div><div class="strip">{spans}</div>')
    return "".join(out)


def key() -> str:
    return "".join(
        f'<span class="note"><span class="key" style="background:{c}"></span>{k}</span>' for k, c in KINDS.items()
    )
