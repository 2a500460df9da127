"""The preprocessing files of a checkpoint → `Eyes`. Every field is understood, known to be harmless, or refused.

In: a folder with preprocessor_config.json and video_preprocessor_config.json, or with one processor_config.json that
holds both. Out: what vision.py needs. Fields that are absent or null take the defaults of the class that the file
names, as in transformers.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.patch_grid import MERGE
from data_pipelines.vision import EDGE, ClipSettings, Eyes, PictureSettings

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE = {  # the classes' own defaults, not the released ones (`vision.QWEN3_VL`), which the files spell out
    "Qwen2VLImageProcessor": PictureSettings(56**2, 28**2 * 1280, patch=14, mean=CLIP_MEAN, std=CLIP_STD),
    "Cosmos3EdgeImageProcessor": EDGE.image,
}
VIDEO = {
    "Qwen3VLVideoProcessor": ClipSettings(128 * 32**2, 768 * 32**2),
    "Cosmos3EdgeVideoProcessor": EDGE.video,
}
HARMLESS = {  # change no number here: where a tensor lives, what a reply holds, sizes that the classes never read
    "auto_map", "crop_size", "data_format", "default_to_square", "device", "disable_grouping", "image_processor_type",
    "image_seq_length", "max_image_size", "pad_size", "processor_class", "return_metadata", "return_tensors",
    "video_processor_type",
}  # fmt: skip
FIXED = {  # fields with one value that vision.py knows; None = the field must be absent
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False,
    "do_pad": False, "do_sample_frames": True, "input_data_format": None, "max_duration": None, "merge_size": MERGE,
    "num_frames": None, "resample": 3, "video_metadata": None,
}  # fmt: skip


def load(folder: str | pathlib.Path) -> Eyes:
    """Read a checkpoint's files. ValueError, naming file and field, for whatever could change a number unseen."""
    folder = pathlib.Path(folder)
    both = _read(folder / "processor_config.json") if (folder / "processor_config.json").exists() else {}
    image, where = _table(folder, both, "image_processor", "preprocessor_config.json")
    video, there = _table(folder, both, "video_processor", "video_preprocessor_config.json")
    return Eyes(
        _settings(image, IMAGE, "image_processor_type", where), _settings(video, VIDEO, "video_processor_type", there)
    )


def _settings(table: Mapping[str, Any], classes: Mapping[str, Any], key: str, where: str) -> Any:
    """The settings of a class with the fields of the table put in."""
    name = str(table.get(key, "")).removesuffix("Fast")
    if name not in classes:
        raise ValueError(f"{where}: {key} = {table.get(key)!r} is not supported; only {' or '.join(classes)} is.")
    base, left = classes[name], {k: v for k, v in table.items() if v is not None}
    for field, known in FIXED.items():
        if (x := left.pop(field, known)) != known:
            raise ValueError(f"{where}: {field} = {x!r} is not supported; only {known!r} is.")
    size = left.pop("size", None) or {"shortest_edge": base.min_pixels, "longest_edge": base.max_pixels}
    if set(size) != {"shortest_edge", "longest_edge"} or not all(size.values()):
        raise ValueError(f"{where}: size = {size!r} must give shortest_edge and longest_edge, areas in pixels.")
    size = dict(size)
    if name == "Qwen2VLImageProcessor":  # the older spelling, which wins
        size["shortest_edge"] = left.pop("min_pixels", None) or size["shortest_edge"]
        size["longest_edge"] = left.pop("max_pixels", None) or size["longest_edge"]
    values = {
        "min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"],
        "patch": left.pop("patch_size", base.patch), "temporal": left.pop("temporal_patch_size", base.temporal),
        "mean": _three(left.pop("image_mean", base.mean), f"{where}: image_mean"),
        "std": _three(left.pop("image_std", base.std), f"{where}: image_std"),
        "rescale": left.pop("rescale_factor", base.rescale),
    }  # fmt: skip
    if isinstance(base, ClipSettings):
        for field in ("fps", "min_frames", "max_frames"):
            values[field] = left.pop(field, getattr(base, field))
        if name == "Qwen3VLVideoProcessor":
            values["cap_pixels_per_frame"] = left.pop("cap_pixels_per_frame", False)
            values["max_video_tokens"] = left.pop("max_video_tokens", base.max_video_tokens)
    if base.kind == "siglip2" and values["temporal"] != 1:
        raise ValueError(f"{where}: temporal_patch_size = {values['temporal']} is not supported; Edge has only 1.")
    unknown = sorted(set(left) - HARMLESS)
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; it could change numbers, so it is refused.")
    return type(base)(**values, kind=base.kind, widen_first=base.widen_first)


def _three(x: Any, what: str) -> tuple[float, ...]:
    """One number for all channels, or three."""
    values = tuple(float(v) for v in x) if isinstance(x, list | tuple) else (float(x),) * 3
    if len(values) != 3:
        raise ValueError(f"{what} has {len(values)} numbers; pictures have three channels.")
    return values


def _table(folder: pathlib.Path, both: Mapping, part: str, name: str) -> tuple[Mapping[str, Any], str]:
    if part in both:
        return both[part], f"{folder / 'processor_config.json'}: {part}"
    if not (folder / name).exists():
        raise ValueError(f"{folder} lacks {name}, which says how pictures are prepared; take it from the checkpoint.")
    return _read(folder / name), str(folder / name)


def _read(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}).") from e
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds {type(table).__name__}, not a table of fields.")
    return table
