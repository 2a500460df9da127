"""The steps of a checkpoint directory: which are there, which are whole, and what is wrong with the others.

In: a directory of numbered steps (checkpoint.py says what lies in one). Out: the newest sound one. Reads files only.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

from cosmos_jax import integrity

JSON_ITEMS = ("data", "config", "assets")
WRITING, DELETING = ".writing", ".deleting"  # what follows the number while a step comes or goes
LEFT = (WRITING, DELETING, ".orbax-checkpoint-tmp")


class CheckpointError(RuntimeError):
    """A checkpoint that is absent, incomplete, or of another model; the message is one sentence with a remedy."""


def complete(directory: Path) -> list[int]:
    """Steps that have all their parts, ascending; whether the parts are sound is for `find` to say."""
    return [s for s in numbered(directory) if _missing(directory / str(s)) is None]


def interrupted(directory: Path) -> list[str]:
    """Names of step directories whose writing never finished."""
    steps = {str(s) for s in complete(directory)}
    names = (p.name for p in _entries(directory))
    return sorted(n for n in names if n[0].isdigit() and n not in steps and not n.endswith(DELETING))


def find(directory: Path, step: int | None = None) -> Path:
    """Directory of a complete and undamaged step (default: the newest), or CheckpointError. For one process."""
    steps, bad = numbered(directory), dict[int, str]()
    for candidate in [step] if step in steps else reversed(steps) if step is None else ():
        path = directory / str(candidate)
        if (what := fault(path)) is None:
            note_skipped(directory, bad)
            note_unverified(path)
            return path
        if step is not None:
            raise CheckpointError(f"Checkpoint {path} is damaged: {what}.")
        bad[candidate] = what
    if bad:
        raise CheckpointError(none_left(directory, bad))
    what = f"no checkpoint of step {step}" if step is not None else "no checkpoint"
    have = f"; it has steps {', '.join(map(str, steps))}" if steps else ""
    torn = f"; ignored because its writing was interrupted: {', '.join(t)}" if (t := interrupted(directory)) else ""
    raise CheckpointError(f"There is {what} in {directory}{have}{torn}.")


def _entries(directory: Path) -> list[Path]:
    return [p for p in directory.iterdir() if p.is_dir()] if directory.is_dir() else []


def numbered(directory: Path) -> list[int]:
    """Steps that have their final name, ascending."""
    return sorted(int(p.name) for p in _entries(directory) if p.name.isdigit())


def _missing(path: Path) -> str | None:
    """The first part that a step lacks."""
    parts = ["_CHECKPOINT_METADATA", "state/_METADATA", *(f"{i}/data.json" for i in JSON_ITEMS)]
    return next((p for p in parts if not (path / p).exists()), None)


def fault(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a step, as a clause; None if it is sound, or as far as one can see without a list."""
    if not (path / integrity.NAME).exists():
        if lacking := _missing(path):
            return f"{lacking} is missing"
        try:
            for name in ("_CHECKPOINT_METADATA", *(f"{i}/data.json" for i in JSON_ITEMS)):
                table = json.loads((path / name).read_text())
                if name == "_CHECKPOINT_METADATA" and (table.get("custom_metadata") or {}).get("integrity"):
                    return f"{integrity.NAME} is missing"
        except (OSError, ValueError) as e:
            return f"{name} is unreadable ({type(e).__name__})"
        return None
    stats = ((p, p.stat()) for p in sorted(path.rglob("*")))
    return _damage(path, part, parts, tuple((str(p), x.st_size, x.st_mtime_ns) for p, x in stats))


@functools.lru_cache(maxsize=8)
def _damage(path: Path, part: int, parts: int, files: tuple) -> str | None:
    """`integrity.damage`, read once as long as no file changes."""
    return integrity.damage(path, part, parts)


def note_skipped(directory: Path, bad: dict[int, str]) -> None:
    """A sentence for each. bad: step → what is wrong with it."""
    for step, what in bad.items():
        print(f"cosmos_jax: Checkpoint {directory / str(step)} is skipped: {what}.", file=sys.stderr, flush=True)


def note_unverified(path: Path) -> None:
    if not (path / integrity.NAME).exists():
        _tell_once(f"Checkpoint {path} is unverified: it was written without checksums.")


@functools.cache
def _tell_once(text: str) -> None:
    print(f"cosmos_jax: {text}", file=sys.stderr, flush=True)


def none_left(directory: Path, bad: dict[int, str]) -> str:
    shown = "; ".join(f"step {step}: {what}" for step, what in list(bad.items())[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"Every checkpoint in {directory} is damaged ({shown}{more}); put back a copy of one, or move them away to "
        "start afresh."
    )


def delete(path: Path) -> None:
    """Remove a step; it loses its name first, so a kill leaves no half of it."""
    if path.exists():
        gone = path.with_name(path.name + DELETING)
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)


def clear(directory: Path) -> None:
    """Remove what interrupted saves and deletions left."""
    for path in _entries(directory):
        if path.name[0].isdigit() and path.name.endswith(LEFT):
            shutil.rmtree(path)
