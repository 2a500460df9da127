"""Positions and layouts against diffusers' helpers, bit for bit: where each token sits, how latents become tokens.

In: the transformer's config. Out: rows, all exact. Spec reference_parity.md §1.1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import Cosmos3OmniTransformer
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens

from cosmos_jax.config import ModelConfig
from cosmos_jax.parity import reference, rows
from cosmos_jax.parity.rows import Row
from data_pipelines import positions
from data_pipelines.packing import patchify

NAME = "positions and layout"
TEXT = 29
VIDEOS = ((3, 3, 4, 10.0), (13, 2, 5, 23.976), (48, 2, 2, 24.0), (1, 3, 3, 24.0))  # latent frames, rows, columns, fps
SOUNDS = (7, 197)  # latents
ACTIONS = ((4, 10.0), (16, 15.0), (61, 30.0))  # rows, fps


def check(cfg: ModelConfig) -> list[Row]:
    """All rows. Frame rates are not rounded to bfloat16 here: diffusers does not (docs/parity.md)."""
    spec = cfg.sequence
    text, after = get_3d_mrope_ids_text_tokens(TEXT, 0, use_float_positions=True)
    off = after + int(spec.temporal_margin)
    origin = positions.start_of_generation(TEXT, spec)
    out = [rows.exact((NAME, "positions", f"{TEXT} text tokens"), positions.text(TEXT), text.float().numpy())]
    for t, h, w, fps in VIDEOS:
        want, _ = get_3d_mrope_ids_vae_tokens(t, h, w, off, True, fps, spec.base_fps, spec.temporal_factor)
        what = f"vision, {t}×{h}×{w} tokens at {fps:g} fps"
        out.append(_same(what, positions.vision(t, h, w, origin, fps, spec), want))
    for n in SOUNDS if cfg.sound_dim else ():
        want, _ = get_3d_mrope_ids_vae_tokens(n, 1, 1, off, True, spec.sound_latent_fps, spec.base_fps, 1)
        out.append(_same(f"sound, {n} latents", positions.sound(n, origin, spec), want))
    for n, fps in ACTIONS if cfg.action_dim else ():
        want, _ = get_3d_mrope_ids_vae_tokens(
            n, 1, 1, off, True, fps, spec.base_fps, 1, base_temporal_compression_factor=spec.temporal_factor,
            start_frame_offset=1,
        )  # fmt: skip
        out.append(_same(f"action, {n} rows at {fps:g} fps", positions.action(n, origin, fps, spec), want))
    return out + [_patches(cfg, h, w) for h, w in ((4, 6), (5, 7))]


def _same(what: str, ours: np.ndarray, want: torch.Tensor) -> Row:
    return rows.exact((NAME, "positions", what), ours, want.float().numpy())


def _patches(cfg: ModelConfig, h: int, w: int) -> Row:
    """Latents → tokens, by the reference's own method."""
    x = reference.draw("patches", cfg.latent_channels, 3, h, w)
    p = cfg.patch
    host = type("Host", (), {"config": type("C", (), {"latent_patch_size": p, "latent_channel": cfg.latent_channels})})
    want, _ = Cosmos3OmniTransformer._patchify_and_pack_latents(host, [torch.from_numpy(x)[None]])
    n = 3 * math.ceil(h / p) * math.ceil(w / p)
    return rows.exact((NAME, "layout", f"{n} tokens of {h}×{w} latents"), patchify(x, p), want.numpy())
