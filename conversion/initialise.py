"""A fresh Cosmos 3 from a trained reasoner: the und tower is the reasoner, the gen tower starts as a copy of it.

In: parameters of a reasoner (conversion/reasoner.py). Out: a whole tree. Spec training.md §3.6: `init_moe` of the
framework copies every parameter of the gen tower from its und twin; what has no twin keeps its fresh values.
"""

from __future__ import annotations

from collections.abc import Mapping

from flax.traverse_util import flatten_dict, unflatten_dict

from conversion.check import ConversionError


def from_reasoner(fresh: Mapping, reasoner: Mapping) -> tuple[dict, list[str]]:
    """(parameters, paths that stay fresh). fresh: a randomly initialised whole model; reasoner: of the same config.

    The result shares arrays with both. ConversionError if a parameter of the reasoner is unknown or has another shape.
    """
    out = flatten_dict(dict(fresh))
    taken = dict(flatten_dict(dict(reasoner)))
    for path, x in list(taken.items()):
        if path not in out or out[path].shape != x.shape:
            have = out[path].shape if path in out else "no such parameter"
            raise ConversionError(f"the reasoner's {'/'.join(path)} {x.shape} does not fit the model ({have}).")
        twin = _twin(path)
        if twin is not None and twin in out:
            taken[twin] = x
    return unflatten_dict(out | taken), sorted("/".join(path) for path in set(out) - set(taken))


def _twin(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """The parameter of the gen tower that starts as a copy of this one of the und tower."""
    if path[:2] == ("layers", "und"):
        return ("layers", "gen", *path[2:])
    return ("norm_gen", *path[1:]) if path[0] == "norm_und" else None
