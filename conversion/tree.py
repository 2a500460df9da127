"""Whole models in memory: tensors by name ↔ the nested dict of parameters. Exact: bytes are moved, nothing is computed.

In: entries. Out: the other side. Large models are streamed instead (conversion/weights.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flax.traverse_util import unflatten_dict

from conversion.names import Entry, compact, to_ours
from conversion.weights import Held, tensors


def from_torch(entries: Iterable[Entry], source: Mapping[str, np.ndarray]) -> dict:
    """Nested dict of numpy arrays in the source's dtypes. Run `check` first: here a missing name is a KeyError."""
    layers: dict[tuple, dict[int | None, np.ndarray]] = {}
    for e in entries:
        layers.setdefault(e.path, {})[e.layer] = compact(to_ours(e, source[e.source]))
    return unflatten_dict(
        {
            path: found[None] if None in found else np.stack([found[i] for i in sorted(found)])
            for path, found in layers.items()
        }
    )


def to_torch(entries: Iterable[Entry], params: Mapping) -> dict[str, np.ndarray]:
    """Name → array in the source's shapes and the parameters' dtypes.

    ConversionError if two parameters that are one tensor there (`Entry.tied`) have come to differ.
    """
    return dict(tensors(entries, Held(params))[1])
