"""The batch contract: every field's axes, dtype and padding value.

In: nothing. Out: `SequenceSpec` (what a token is), `Bucket` (how many fit), `FIELDS` and `empty_batch`, which the
packer fills and the model reads. `docs/design.md` explains each field in words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VIT_KINDS = ("qwen3vl", "siglip2")  # vision encoders: of Nano and Super, of Edge
PAD = -1  # padding value of every index and segment field
MODALITIES = ("vision", "action", "sound")  # order inside one sample's gen run (framework order, spec model.md §4.2)


@dataclass(frozen=True)
class SequenceSpec:
    """What one token carries. Derived from the model config, so data and model cannot disagree."""

    latent_channels: int  # C of the video latents
    patch: int  # p: a vision token is a p×p block of latent pixels
    action_dim: int  # padded action width; 0 = the model has no actions
    sound_dim: int  # channels of a sound latent; 0 = the model has no sound
    vit_kind: str = "qwen3vl"  # one of VIT_KINDS
    vit_patch: int = 0  # pixels per side of a ViT patch; 0 = no vision encoder
    vit_grid: int = 0  # side of the learned position table
    vit_temporal: int = 2  # frames per ViT patch
    base_fps: float = 24.0  # positions per second × temporal factor (spec model.md §4.4)
    temporal_factor: int = 4  # pixel frames per latent frame
    sound_latent_fps: float = 25.0  # sound latents per second
    temporal_margin: float = 15000.0  # gap between the last text position and the first generated one

    @property
    def patch_dim(self) -> int:
        return self.patch * self.patch * self.latent_channels

    @property
    def vit_patch_dim(self) -> int:
        return 3 * self.vit_temporal * self.vit_patch**2

    @property
    def vit_corners(self) -> int:
        """Rows of the position table that a patch names: four in Qwen3-VL; none in SigLIP2, which weighs them all."""
        return 4 if self.vit_kind == "qwen3vl" else 0


@dataclass(frozen=True)
class Bucket:
    """Capacities of one batch: all shapes the device ever sees follow from these."""

    rows: int  # B: packs per batch
    und: int  # U
    gen: int  # G
    vision: int  # V
    action: int  # A
    sound: int  # S
    segments: int  # N: most samples per row
    vit: int = 0  # P: ViT patches per row (a multiple of 4)
    controls: int = 0  # C: most weighted controls of a sample; each costs an attention call


@dataclass(frozen=True)
class Field:
    axes: tuple[str, ...]  # letters of Bucket/SequenceSpec dimensions, first is always B
    dtype: type
    pad: float | int | bool


FIELDS: dict[str, Field] = {
    "und_ids": Field(("B", "U"), np.int32, 0),
    "und_targets": Field(("B", "U"), np.int32, PAD),
    "und_positions": Field(("B", "3", "U"), np.float32, 0.0),
    "und_segment_ids": Field(("B", "U"), np.int32, PAD),
    "und_vit_index": Field(("B", "U"), np.int32, PAD),
    "gen_positions": Field(("B", "3", "G"), np.float32, 0.0),
    "gen_segment_ids": Field(("B", "G"), np.int32, PAD),
    "gen_source": Field(("B", "G"), np.int32, PAD),
    "control_weight": Field(("B", "C", "G"), np.float32, 0.0),
    "vision_extent": Field(("B", "V", "2"), np.int32, 0),
    "action_width": Field(("B", "A"), np.int32, 0),
    "action_domain": Field(("B", "A"), np.int32, 0),
    "segment_sample_id": Field(("B", "N"), np.int32, PAD),
    "segment_task": Field(("B", "N"), np.int32, PAD),
    "segment_is_image": Field(("B", "N"), np.bool_, False),
    "segment_shift": Field(("B", "N"), np.float32, 1.0),
    "segment_items": Field(("B", "N", "3"), np.int32, 0),
    "vit_patches": Field(("B", "P", "Fp"), np.float32, 0.0),
    "vit_segment_ids": Field(("B", "P"), np.int32, PAD),
    "vit_rowcol": Field(("B", "P", "2"), np.int32, 0),
    "vit_interp_index": Field(("B", "P", "K"), np.int32, 0),
    "vit_interp_weight": Field(("B", "P", "W"), np.float32, 0.0),
}
for _name, _axis, _feature in (("vision", "V", "Fv"), ("action", "A", "Fa"), ("sound", "S", "Fs")):
    FIELDS |= {
        f"{_name}_x0": Field(("B", _axis, _feature), np.float32, 0.0),
        f"{_name}_index": Field(("B", _axis), np.int32, PAD),
        f"{_name}_segment_ids": Field(("B", _axis), np.int32, PAD),
        f"{_name}_token_ids": Field(("B", _axis), np.int32, 0),
        f"{_name}_noisy": Field(("B", _axis), np.bool_, False),
        f"{_name}_weight": Field(("B", _axis), np.float32, 0.0),
    }


def field_shape(name: str, bucket: Bucket, spec: SequenceSpec) -> tuple[int, ...]:
    """Static shape of a field in a batch of this bucket."""
    sizes = {
        "B": bucket.rows,
        "U": bucket.und,
        "G": bucket.gen,
        "V": bucket.vision,
        "A": bucket.action if spec.action_dim else 0,
        "S": bucket.sound if spec.sound_dim else 0,
        "N": bucket.segments,
        "P": bucket.vit if spec.vit_patch else 0,
        "C": bucket.controls,
        "Fv": spec.patch_dim,
        "Fa": spec.action_dim,
        "Fs": spec.sound_dim,
        "Fp": spec.vit_patch_dim,
        "2": 2,
        "3": 3,
        "K": spec.vit_corners,
        "W": spec.vit_corners or spec.vit_grid**2,
    }
    return tuple(sizes[axis] for axis in FIELDS[name].axes)


def empty_batch(bucket: Bucket, spec: SequenceSpec) -> dict[str, np.ndarray]:
    """A batch in which everything is padding, ready to be filled row by row."""
    return {
        name: np.full(field_shape(name, bucket, spec), field.pad, dtype=field.dtype) for name, field in FIELDS.items()
    }
