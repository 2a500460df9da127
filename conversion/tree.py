"""Whole models in memory: tensors by name ↔ the nested dict of parameters. Exact: bytes are moved, nothing is computed.

In: entries. Out: the other side. Large models are streamed instead (conversion/weights.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion.check import ConversionError
from conversion.names import Entry, to_ours, to_theirs


def from_torch(entries: Iterable[Entry], source: Mapping[str, np.ndarray]) -> dict:
    """Nested dict of numpy arrays in the source's dtypes. Run `check` first: here a missing name is a KeyError."""
    layers: dict[tuple, dict[int | None, np.ndarray]] = {}
    for e in entries:
        layers.setdefault(e.path, {})[e.layer] = to_ours(e, source[e.source])
    return unflatten_dict(
        {
            path: np.ascontiguousarray(found[None]) if None in found else np.stack([found[i] for i in sorted(found)])
            for path, found in layers.items()
        }
    )


def to_torch(entries: Iterable[Entry], params: Mapping) -> dict[str, np.ndarray]:
    """Name → array in the source's shapes and the parameters' dtypes. ConversionError as in `assemble`."""
    flat = flatten_dict(dict(params))

    def read(e: Entry) -> np.ndarray:
        return np.asarray(flat[e.path] if e.layer is None else flat[e.path][e.layer])

    return {name: assemble(found, read) for name, found in by_source(entries).items()}


def by_source(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Name → the entries of that tensor: one per piece in order, then the tied ones."""
    found: dict[str, list[Entry]] = {}
    for e in entries:
        found.setdefault(e.source, []).append(e)
    return {name: sorted(es, key=lambda e: (e.tied, e.part)) for name, es in found.items()}


def assemble(entries: Sequence[Entry], read: Callable[[Entry], np.ndarray]) -> np.ndarray:
    """One whole tensor of the source from its entries (`by_source`); `read` gives the parameter or layer of an entry.

    ConversionError if two parameters that are one tensor there (`Entry.tied`) have come to differ.
    """
    pieces: dict[int, np.ndarray] = {}
    for e in entries:
        x = to_theirs(e, read(e))
        if e.tied and not np.array_equal(x, pieces[e.part]):
            raise ConversionError(
                f"{e.source!r} is one tensor in this layout, but here {'/'.join(e.path)!r} has come to differ from its "
                "twin; export to a layout that holds both."
            )
        pieces.setdefault(e.part, x)
    return pieces[0] if len(pieces) == 1 else np.concatenate(list(pieces.values()))
