"""Checks of single values: each takes what JSON held and returns it typed, or says in words what it should have been.

In: JSON values, free of NaN and of deep nesting (`tame`). Out: the value; else `Wrong`, whose text completes "KEY …".
"""

from __future__ import annotations

import difflib
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[Any], Any]
LONGEST = 200_000  # characters of a prompt: some 50,000 tokens
OTHERWISE = "change it or leave it out"
_FORMAT = re.compile(r"[-+ ,]?\d?(\.\d)?[dfg]?")  # of a number in a template; widths of 10⁹ would fill the memory


class RequestError(ValueError):
    """A request that cannot be run: one sentence with the file (and line), the key, what is wrong and what to do."""


class Wrong(ValueError):
    """A value that a key cannot hold. what: completes "KEY …"; at: the place inside the value, such as ".weight"."""

    def __init__(self, what: str, at: str = ""):
        super().__init__(what)
        self.what, self.at = what, at


def show(value: Any) -> str:
    """A value as JSON, on one line, cut short."""
    x = json.dumps(value)
    return x if len(x) <= 60 else x[:57] + "…"


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean …?)', or nothing."""
    close = difflib.get_close_matches(word[:100], list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _not(value: Any, wanted: str) -> Wrong:
    return Wrong(f"is {show(value)}, not {wanted}; {OTHERWISE}")


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _not(value, "true or false")
    return value


def number(low: float, high: float, above: bool = False) -> Check:
    """A finite number from low (above: but not low itself) to high."""

    def check(value: Any) -> float:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not ok or (above and value == low):
            raise _not(value, f"a number {'above' if above else 'from'} {low:g} up to {high:g}")
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    """A whole number from low to high; 24.0 is one, true is not."""

    def check(value: Any) -> int:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not ok or value != int(value):
            raise _not(value, f"a whole number from {low} to {high}")
        return int(value)

    return check


def text(longest: int = LONGEST) -> Check:
    """A string that can be written as UTF-8 and holds no NUL."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise _not(value, "a text")
        if len(value) > longest:
            raise Wrong(f"has {len(value)} characters; at most {longest} make sense")
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise Wrong("holds characters that no text has (NUL or half of a surrogate pair); write it anew")
        return value

    return check


def name(value: Any) -> str:
    """A text that can be a folder's name."""
    value = text(120)(value)
    plain = re.fullmatch(r"[^/\\\x00-\x1f\x7f]+", value) and len(value.encode()) <= 200
    if not plain or value != value.strip() or value[0] == ".":
        raise Wrong(f"is {show(value)}, which cannot name a folder; use letters, digits, '-' and '_'")
    return value


def word(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed or not isinstance(value, str):
            hint = nearest(value, allowed) if isinstance(value, str) else ""
            raise _not(value, f"one of {', '.join(json.dumps(a) for a in allowed)}{hint}")
        return value

    return check


def items(value: Any, least: int, most: int) -> list:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise _not(value, f"a list of {least} to {most} items")
    return value


def item_list(check: Check, least: int, most: int) -> Check:
    """A list of values, each of which passes `check`; a tuple."""

    def check_all(value: Any) -> tuple:
        out = []
        for i, x in enumerate(items(value, least, most)):
            try:
                out.append(check(x))
            except Wrong as e:
                raise Wrong(e.what, f"[{i}]{e.at}") from None
        return tuple(out)

    return check_all


def interval(value: Any) -> tuple[float, float]:
    """[lo, hi] on the 0–1000 timestep."""
    ends = [number(0, 1000)(x) for x in value] if isinstance(value, list) and len(value) == 2 else []
    if not ends or ends[0] >= ends[1]:
        raise _not(value, "[lo, hi] with 0 ≤ lo < hi ≤ 1000")
    return ends[0], ends[1]


def table(checks: Mapping[str, Check] | None, at: str = "") -> Check:
    """An object; checks: what its keys may hold (None: anything). Null values count as absent."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Wrong(f"is {show(value)}, not an object {{…}}; {OTHERWISE}", at)
        if checks is None:
            return value
        out = {}
        for k, x in value.items():
            if k not in checks:
                raise Wrong(f"has no key {show(k)}{nearest(k, checks)}; it may have {', '.join(checks)}", at)
            if x is not None:
                try:
                    out[k] = checks[k](x)
                except Wrong as e:
                    raise Wrong(e.what, f"{at}.{k}{e.at}") from None
        return out

    return check


def template(*known: str) -> Check:
    """A format string with these names of numbers, and nothing that could reach further than numbers."""

    def check(value: Any) -> str:
        value = text(1000)(value)
        try:
            for _, field, form, conversion in string.Formatter().parse(value):
                if field is not None and (field not in known or conversion or not _FORMAT.fullmatch(form or "")):
                    raise ValueError
            value.format(**{k: (1 if k in ("height", "width") else 1.0) for k in known})
        except (ValueError, IndexError, KeyError):
            names = ", ".join("{" + k + "}" for k in known)
            raise _not(value, f"a template with {names} (or {{{known[0]}:.1f}})") from None
        return value

    return check


def tame(value: Any) -> None:
    """Refuse what is nested more than 30 deep or holds a number too large to be one (1e999). `Wrong`."""
    stack = [(value, 0)]
    while stack:
        x, depth = stack.pop()
        if depth > 30:
            raise Wrong("is nested more than 30 deep; flatten it")
        if isinstance(x, float) and not math.isfinite(x):
            raise Wrong("holds a number that is not finite; replace it")
        if isinstance(x, dict | list):
            stack += [(y, depth + 1) for y in (x.values() if isinstance(x, dict) else x)]
