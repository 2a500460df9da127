"""Multi-axis rotary position ids, float32, in the reference's own order of operations.

In: lengths and grids. Out: [3, N] float32 arrays (T, H, W).
Source: spec model.md §4.4 (generation) and §3.2 (reasoner).
The order of operations matters: at 15 000 the float32 grid is 2⁻¹⁰ (NUM-11).
"""

from __future__ import annotations

import numpy as np

from data_pipelines.schema import SequenceSpec

F32 = np.float32


def text(length: int, offset: int = 0) -> np.ndarray:
    """Token i sits at (i, i, i). [3, length]."""
    return np.broadcast_to(np.arange(offset, offset + length, dtype=F32), (3, length)).copy()


def start_of_generation(text_length: int, spec: SequenceSpec) -> float:
    """O = L + margin: the temporal origin that vision, action and sound of a sample share."""
    return float(F32(text_length) + F32(spec.temporal_margin))


def conditioning_fps(fps: float, round_to_bf16: bool = True) -> float:
    """The frame rate as the framework that made the weights sees it: rounded to bfloat16 (23.976 → 24; DISC-4).

    diffusers does not round; pass False to follow it.
    """
    if not round_to_bf16:
        return float(fps)
    bits = np.float32(fps).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # round to nearest, ties to even
    return float(bits.astype(np.uint32).view(np.float32))


def vision(frames: int, rows: int, cols: int, origin: float, fps: float, spec: SequenceSpec) -> np.ndarray:
    """Latent frame k, patch (y, x) at (origin + k·base/fps, y, x). Token order t, y, x. [3, frames·rows·cols]."""
    t = temporal(np.arange(frames), fps / spec.temporal_factor, spec.base_fps / spec.temporal_factor, origin)
    grid = np.meshgrid(t, np.arange(rows, dtype=F32), np.arange(cols, dtype=F32), indexing="ij")
    return np.stack([g.reshape(-1) for g in grid])


def after(where: np.ndarray) -> float:
    """Where the next vision item of a sample starts: past the largest position on any axis, at a whole number."""
    return float(np.ceil(where.max()) + 1)


def action(rows: int, origin: float, fps: float, spec: SequenceSpec, start: int = 1) -> np.ndarray:
    """Row j at origin + (j + start)·6/fps: with start 1, the end of video interval j. [3, rows]."""
    return _line(temporal(np.arange(rows) + start, fps, spec.base_fps / spec.temporal_factor, origin))


def sound(latents: int, origin: float, spec: SequenceSpec) -> np.ndarray:
    """Latent i at origin + 24·i/25: 24 positions a second, four times video's rate (DISC-8, as released). [3, n]."""
    return _line(temporal(np.arange(latents), spec.sound_latent_fps, spec.base_fps, origin))


def temporal(index: np.ndarray, rate: float, base: float, origin: float) -> np.ndarray:
    """index / rate · base + origin, each step in float32."""
    return (index.astype(F32) / F32(rate) * F32(base) + F32(origin)).astype(F32)


def reasoner(segments: list[int | tuple[int, int]]) -> np.ndarray:
    """Positions of a prompt with pictures (Qwen3-VL): an int is a run of text, a pair a picture's merged (rows, cols).

    Text counts up on all axes; a picture at s lies at (s, s + y, s + x); the next token follows its largest position.
    """
    parts, at = [], 0
    for s in segments:
        if isinstance(s, tuple):
            rows, cols = s
            y, x = (g.reshape(-1) for g in np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"))
            parts.append(np.stack([np.full(rows * cols, at), at + y, at + x]).astype(F32))
            at += max(rows, cols)
        else:
            parts.append(text(s, at))
            at += s
    return np.concatenate(parts, 1) if parts else np.zeros((3, 0), F32)


def _line(t: np.ndarray) -> np.ndarray:
    """A stream without space: H = W = 0."""
    return np.stack([t, np.zeros_like(t), np.zeros_like(t)])
