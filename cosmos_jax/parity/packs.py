"""Several samples in one row, told apart by their segment numbers: what a packed batch of training is.

In: batches of one row and one sample each, without padding (`tight`). Out: one batch whose row holds them one after the
other, then padding. The project's own packer starts from samples; here positions come from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.schema import FIELDS, MODALITIES, PAD, Bucket, SequenceSpec, empty_batch

LENGTHS = {  # the axes along which samples follow each other: a field that tells how long each is
    "U": "und_ids", "G": "gen_source", "V": "vision_index", "A": "action_index", "S": "sound_index",
    "N": "segment_task", "P": "vit_segment_ids",
}  # fmt: skip
MERGE = 4  # patches per token of the und stream


def tight(und: int, gen: int = 0, vision: int = 0, action: int = 0, sound: int = 0, vit: int = 0) -> Bucket:
    """Room for exactly one sample."""
    return Bucket(1, und, gen, vision, action, sound, 1, vit)


def pack(samples: Sequence[dict], bucket: Bucket, spec: SequenceSpec) -> dict[str, np.ndarray]:
    """The samples as segments 0, 1, … of one row. ValueError if the bucket is too small."""
    out = empty_batch(bucket, spec)
    at, frames = dict.fromkeys(LENGTHS, 0), 0
    for n, one in enumerate(samples):
        for name, x in _moved(one, n, at, frames, _starts(out)).items():
            axis = next(i for i, letter in enumerate(FIELDS[name].axes) if letter in LENGTHS)
            first = at[FIELDS[name].axes[axis]]
            if first + x.shape[axis] > out[name].shape[axis]:
                raise ValueError(f"{name}: {first + x.shape[axis]} entries do not fit into {bucket}; make it larger.")
            out[name][(slice(None),) * axis + (slice(first, first + x.shape[axis]),)] = x
        for letter, field in LENGTHS.items():
            at[letter] += one[field].shape[1]
        frames += int(one["vit_segment_ids"].max(initial=PAD)) + 1
    return out


def _starts(batch: dict) -> list[int]:
    """Where each modality starts in the concatenation that `gen_source` counts."""
    return [0, *np.cumsum([batch[f"{m}_index"].shape[1] for m in MODALITIES])]


def _moved(one: dict, segment: int, at: dict[str, int], frames: int, starts: list[int]) -> dict[str, np.ndarray]:
    """A sample's fields with everything that names a place or a segment renumbered."""
    out = dict(one)
    shifts = {f"{m}_index": at["G"] for m in MODALITIES}
    shifts |= {"und_vit_index": at["P"] // MERGE, "vit_segment_ids": frames}
    for name, shift in shifts.items():
        out[name] = np.where(one[name] >= 0, one[name] + shift, PAD)
    for name in ("und", "gen", *MODALITIES):
        field = f"{name}_segment_ids"
        out[field] = np.where(one[field] >= 0, segment, PAD)
    source, own = one["gen_source"], _starts(one)
    which = np.searchsorted(own, source, side="right") - 1
    jump = np.array([starts[i] + at[letter] - own[i] for i, letter in enumerate("VAS")] + [0])
    out["gen_source"] = np.where(source >= 0, source + jump[which], PAD)
    return out
