"""A config.json read field by field: each is understood, known to be harmless, or refused.

In: a parsed table. Out: its values; ConversionError for a field that could change numbers and that nobody took.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conversion.check import ConversionError

# Fields that change no number of a forward pass with dropout off.
HARMLESS = {
    "_class_name", "_diffusers_version", "_name_or_path", "architectures", "attention_dropout", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "image_token_id", "initializer_range",
    "is_encoder_decoder", "label2id", "max_position_embeddings", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache", "video_token_id", "vision_end_token_id", "vision_start_token_id",
}  # fmt: skip


class Fields:
    """A table whose fields are taken one by one; what is left must be harmless."""

    def __init__(self, table: Mapping[str, Any], where: str):
        self.left, self.where = dict(table), where

    def take(self, name: str, default: Any = ...) -> Any:
        if name not in self.left and default is ...:
            raise ConversionError(f"{self.where} lacks {name!r}; is it the configuration of another model?")
        return self.left.pop(name, default)

    def expect(self, name: str, *values: Any) -> None:
        """The field, if there, has one of these values; the implementation knows no other."""
        x = self.left.pop(name, values[0])
        if x not in values:
            raise ConversionError(f"{self.where}: {name} = {x!r} is not supported; only {_or(values)} is.")

    def whole(self, name: str) -> int:
        """A number where transformers also allows one per axis."""
        x = self.take(name)
        if type(x) is not int:
            raise ConversionError(f"{self.where}: {name} = {x!r} is not supported; only one whole number is.")
        return x

    def root(self, name: str) -> int:
        """The side of a square grid of so many places."""
        n = self.take(name)
        side = math.isqrt(n)
        if side**2 != n:
            raise ConversionError(f"{self.where}: {name} = {n} is not a square grid.")
        return side

    def done(self) -> None:
        unknown = sorted(set(self.left) - HARMLESS)
        if unknown:
            raise ConversionError(
                f"{self.where}: unknown field {unknown[0]!r}; it could change numbers, so it is refused."
            )


def _or(values: tuple) -> str:
    return " or ".join(map(repr, values))
