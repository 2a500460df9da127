"""Prompts for the reasoners, as arguments of transformers' models and as a row of our batch.

In: the checkpoint's special ids, the grids of the pictures. Out: ids and flattened patches, so that nothing but the
networks is compared; the same prompt in the batch contract, placed by the project's own code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from cosmos_jax.config import ModelConfig
from cosmos_jax.parity.reference import draw, rng
from data_pipelines import patch_grid, positions
from data_pipelines.schema import Bucket, empty_batch

BUCKET = Bucket(1, 44, 4, 4, 0, 0, 1, 72)  # room for every case, and some padding


class Marks(NamedTuple):
    """Ids of the visual pads, and of what stands before and after a picture."""

    image: int
    video: int
    start: int
    end: int

    @classmethod
    def of(cls, config: Any) -> Marks:
        """From transformers' config of the checkpoint."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return cls(*(getattr(config, n) for n in names))


TINY = Marks(600, 601, 602, 603)


class Picture(NamedTuple):
    grid: tuple[int, int, int]  # frames (groups that share patches), rows, columns of patches
    patches: np.ndarray  # [frames·rows·cols, features] float32


class Prompt(NamedTuple):
    ids: np.ndarray  # [L]
    pictures: tuple[Picture, ...]  # images, then clips, in order of appearance
    marks: Marks = TINY


CASES: dict[str, tuple[tuple, tuple]] = {  # images (a side below the table's six, one above), clips, neither
    "images": (((1, 4, 10), (1, 8, 2)), ()),
    "video": ((), ((2, 4, 6),)),
    "image_and_video": (((1, 8, 2),), ((2, 4, 6),)),
    "text": ((), ()),
}


def prompt(case: str, cfg: ModelConfig, marks: Marks = TINY, seed: int = 0) -> Prompt:
    """Words, then every picture between its marks (a clip: frame by frame, a time stamp before each), then words."""
    word = iter(rng(case, seed).randint(0, min(*marks, TINY.image), 200).tolist())
    images, clips = CASES[case]
    ids = [next(word) for _ in range(6 if images or clips else 19)]
    for pad, grids in ((marks.image, images), (marks.video, clips)):
        for t, rows, cols in grids:
            for _ in range(t):
                ids += [next(word), next(word)] if pad == marks.video else []
                ids += [marks.start, *[pad] * (rows * cols // 4), marks.end]
    ids += [next(word) for _ in range(7)]
    width = cfg.sequence.vit_patch_dim
    pictures = tuple(
        Picture(g, draw(f"{case}{i}", int(np.prod(g)), width, seed=seed)) for i, g in enumerate((*images, *clips))
    )
    return Prompt(np.array(ids), pictures, marks)


def torch_inputs(p: Prompt, dtype: torch.dtype = torch.float32, device: Any = None) -> dict[str, torch.Tensor]:
    """Keyword arguments of the reference's forward and generate."""
    ids = torch.from_numpy(p.ids)[None]
    kinds = (ids == p.marks.image).int() + 2 * (ids == p.marks.video).int()
    kw = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds)
    clips = bool((ids == p.marks.video).any())
    images = p.pictures[:-1] if clips else p.pictures
    for pixels, grid, found in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", p.pictures[-1:] if clips else ()),
    ):
        if found:
            kw[pixels] = torch.from_numpy(np.concatenate([x.patches for x in found])).to(dtype)
            kw[grid] = torch.tensor([x.grid for x in found])
    return {k: v.to(device) for k, v in kw.items()}


def batch(p: Prompt, cfg: ModelConfig, bucket: Bucket = BUCKET) -> dict[str, np.ndarray]:
    """The same prompt as one row of our batch."""
    out = empty_batch(bucket, cfg.sequence)
    pads = np.isin(p.ids, p.marks[:2])
    out["und_ids"][0, : len(p.ids)] = p.ids
    out["und_segment_ids"][0, : len(p.ids)] = 0
    out["und_positions"][0, :, : len(p.ids)] = positions.reasoner(runs(p))
    out["und_vit_index"][0, : len(p.ids)][pads] = np.arange(pads.sum())
    if p.pictures:
        fields = patch_grid.places([x.grid for x in p.pictures], cfg.sequence)
        n = len(fields.frame_ids)
        out["vit_patches"][0, :n] = np.concatenate([x.patches for x in p.pictures])
        out["vit_segment_ids"][0, :n], out["vit_rowcol"][0, :n] = fields.frame_ids, fields.rowcol
        out["vit_interp_index"][0, :n], out["vit_interp_weight"][0, :n] = fields.interp_index, fields.interp_weight
    return out


def runs(p: Prompt) -> list[int | tuple[int, int]]:
    """The prompt as runs of text and merged grids (`positions.reasoner`)."""
    frames = iter([(rows // 2, cols // 2) for t, rows, cols in (x.grid for x in p.pictures) for _ in range(t)])
    out: list[int | tuple[int, int]] = []
    pads, i = p.marks[:2], 0
    while i < len(p.ids):
        if p.ids[i] in pads:
            rows, cols = next(frames)
            out.append((rows, cols))
            i += rows * cols
        else:
            n = next((k for k, x in enumerate(p.ids[i:]) if x in pads), len(p.ids) - i)
            out.append(n)
            i += n
    return out


def patches(p: Prompt) -> int:
    return sum(len(x.patches) for x in p.pictures)


def rounded(p: Prompt) -> Prompt:
    """The prompt with its patches rounded to bfloat16."""
    half = [torch.from_numpy(x.patches).bfloat16().float().numpy() for x in p.pictures]
    return p._replace(pictures=tuple(Picture(x.grid, y) for x, y in zip(p.pictures, half, strict=True)))
