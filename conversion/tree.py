"""Whole models in memory: tensors by name ↔ the nested dict of parameters. Exact: bytes are moved, nothing is computed.

In: entries. Out: the other side. Large models are streamed instead (conversion/weights.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion.check import same
from conversion.names import Entry, compact, to_ours, to_theirs


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
    flat = flatten_dict(dict(params))
    parts: dict[str, dict[int, np.ndarray]] = {}
    for e in entries:
        x = np.asarray(flat[e.path] if e.layer is None else flat[e.path][e.layer])
        x = to_theirs(e, x)
        same(e, parts.setdefault(e.source, {}).setdefault(e.part, x), x)
    return {
        name: found[0] if len(found) == 1 else np.concatenate([found[i] for i in sorted(found)])
        for name, found in parts.items()
    }
