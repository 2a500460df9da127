"""What else lies beside a tiny reasoner: how pictures are prepared, and when an answer ends.

In: which family's classes are meant. Out: preprocessor_config.json, video_preprocessor_config.json and
generation_config.json, as released repositories have them at their top; limits of a few und tokens, not of thousands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosmos_jax.parity import tiny_tokenizer

SIDE = 8  # pixels per side of an und token: two patches of four
IMAGE = {"shortest_edge": 4 * SIDE**2, "longest_edge": 16 * SIDE**2}  # areas: 4 … 16 tokens
CLIP = {"shortest_edge": 8 * SIDE**2, "longest_edge": 48 * SIDE**2}  # of all frames together
HALF = [0.5, 0.5, 0.5]


def write(folder: Path, edge: bool) -> None:
    """Into a folder that is there. edge: the classes of Cosmos3-Edge, else those of Qwen3-VL, Nano and Super."""
    common: dict[str, Any] = {
        "patch_size": SIDE // 2, "merge_size": 2, "temporal_patch_size": 1 if edge else 2, "image_mean": HALF,
        "image_std": HALF, "processor_class": "Cosmos3EdgeProcessor" if edge else "Qwen3VLProcessor",
    }  # fmt: skip
    image, video = (
        ("Cosmos3EdgeImageProcessor", "Cosmos3EdgeVideoProcessor") if edge
        else ("Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor")
    )  # fmt: skip
    ends = [tiny_tokenizer.ID[token] for token in ("<|im_end|>", "<|endoftext|>")]
    for name, table in {
        "preprocessor_config": common | {"image_processor_type": image, "size": IMAGE},
        "video_preprocessor_config": common | {"video_processor_type": video, "size": CLIP, "return_metadata": True},
        "generation_config": {"eos_token_id": ends, "pad_token_id": ends[1]},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")
