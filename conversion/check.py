"""Proof that a name map is complete, before any data moves.

In: entries, names and shapes of the source, the abstract tree of parameters. Out: nothing, or one sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from flax.traverse_util import flatten_dict

from conversion.names import Entry, our_shape, their_shape

Shape = tuple[int, ...]


class ConversionError(ValueError):
    """A checkpoint that does not fit; the message names the tensor and says what to do."""


def check(
    entries: Iterable[Entry], source: Mapping[str, Shape], target: Mapping, dropped: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Raise ConversionError unless every tensor is accounted for; return the dropped ones with their reasons.

    source: name → shape of every tensor in the checkpoint. target: nested dict of parameters (arrays or shapes).
    dropped: glob pattern → why such tensors are not needed. Checked: each source tensor is used by all of its parts
    exactly once (and by tied entries once more) or dropped, none is missing, each parameter (each layer of a stacked
    one) is written exactly once, and all shapes agree.
    """
    entries, dropped = list(entries), dict(dropped or {})
    wanted = {e.source for e in entries}
    reasons = {name: _reason(name, dropped) for name in source if name not in wanted}
    unknown = sorted(name for name, why in reasons.items() if why is None)
    if unknown:
        raise ConversionError(
            f"the checkpoint holds {_some(unknown)}, which no rule maps or drops; is it another model?"
        )
    missing = sorted(wanted - set(source))
    if missing:
        raise ConversionError(f"the checkpoint lacks {_some(missing)}; is a file missing, or is it another model?")
    _parts_once(entries)
    _shapes(entries, source, {k: tuple(x.shape) for k, x in flatten_dict(dict(target)).items()})
    return {name: why for name, why in reasons.items() if why is not None}


def shapes(entries: Iterable[Entry], target: Mapping) -> dict[str, Shape]:
    """Name → shape of every tensor that a model with these parameters has in this layout, in the map's order."""
    flat = {k: tuple(x.shape) for k, x in flatten_dict(dict(target)).items()}
    return {e.source: their_shape(e, flat[e.path] if e.layer is None else flat[e.path][1:]) for e in entries}


def same(entry: Entry, first: np.ndarray, second: np.ndarray) -> None:
    """ConversionError unless two readings of one tensor agree. entry: the second's."""
    if first is not second and not np.array_equal(first, second):
        raise ConversionError(
            f"{entry.source!r} is one tensor in this layout, but here {'/'.join(entry.path)!r} and its twin have come "
            "to differ; export to a layout that holds both."
        )


def _reason(name: str, dropped: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in dropped.items() if fnmatchcase(name, pattern)), None)


def _parts_once(entries: Sequence[Entry]) -> None:
    seen = Counter((e.source, e.part) for e in entries if not e.tied)
    parts = {e.source: e.parts for e in entries}
    whole = {(name, k) for name, n in parts.items() for k in range(n)}
    bad = [key for key, n in seen.items() if n > 1] + sorted(whole - set(seen))
    if bad:
        raise ConversionError(f"the name map uses part {bad[0][1]} of {bad[0][0]!r} {seen[bad[0]]} times, not once.")
    twice = [key for key, n in Counter((e.source, e.part) for e in entries if e.tied).items() if n > 1]
    if twice:
        raise ConversionError(f"the name map ties {twice[0][0]!r} to more than one further parameter.")


def _shapes(entries: Sequence[Entry], source: Mapping[str, Shape], target: Mapping[tuple, Shape]) -> None:
    filled: dict[tuple, Counter] = {path: Counter() for path in target}
    for e in entries:
        name = "/".join(e.path)
        if e.path not in target:
            raise ConversionError(f"{e.source!r} maps to {name!r}, but the model has no such parameter.")
        want = target[e.path] if e.layer is None else target[e.path][1:]
        try:
            got = our_shape(e, source[e.source])
        except ValueError:
            got = None
        if got != want:
            raise ConversionError(
                f"{e.source!r} of shape {list(source[e.source])} does not fit {name!r} of shape {list(want)}; "
                "the config describes another model."
            )
        filled[e.path][0 if e.layer is None else e.layer] += 1
    layers = {e.path: e.layer is not None for e in entries}
    for path, shape in target.items():
        n = shape[0] if layers.get(path) else 1
        wrong = [i for i in range(n) if filled[path][i] != 1]
        if wrong or set(filled[path]) - set(range(n)):
            where = f" (layer {wrong[0]})" if wrong and layers.get(path) else ""
            raise ConversionError(f"the checkpoint fills {'/'.join(map(str, path))!r}{where} not exactly once.")


def _some(names: Sequence[str], n: int = 3) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(map(repr, names[:n])) + more
