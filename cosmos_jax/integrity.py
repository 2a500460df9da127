"""The list of files of a folder, with sizes and checksums: written last, so that later damage has a name.

In: a folder that nobody writes any more. Out: `integrity.json` in it; or, for a folder that has one, the first file
that is not what it was. Also the hashes of files that a conversion writes down.

    {"format": 1, "hash": "crc32", "files": {"state/d/9ae2…": [bytes, "8 hex digits"], …}, "own": that of "files"}

CRC-32 finds every error of up to 32 neighbouring bits and misses one in four billion others: it is there for disks and
networks, not against somebody who wants to deceive. It costs 0.17 s of one core per GB (SHA-256 0.57 s, BLAKE2b 0.87 s
on the same core), and zlib lets go of the interpreter while it works. Runs in a thread; touches no device.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

NAME, FORMAT = "integrity.json", 1
BLOCK = 16 << 20
THREADS = 4


def write(folder: Path) -> None:
    """List every file of `folder` in its integrity.json, which appears whole or not at all."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        entries = zip(paths, pool.map(_entry, paths), strict=True)
        files = {p.relative_to(folder).as_posix(): entry for p, entry in entries}
    table = {"format": FORMAT, "hash": "crc32", "files": files, "own": _own(files)}
    replace(folder / NAME, json.dumps(table, indent=0) + "\n")


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files listed in integrity.json, as a clause that names the first bad one; or None.

    Sizes are compared for all files, contents for every `parts`-th one from `part`: several processes share the work.
    """
    try:
        table = json.loads((folder / NAME).read_text())
        files = table["files"]
        if (table["format"], table["hash"], table["own"]) != (FORMAT, "crc32", _own(files)):
            return f"{NAME} is damaged or of another version"
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{NAME} is unreadable ({type(e).__name__})"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (have := path.stat().st_size) != size:
            return f"{name} has {have} bytes and not {size}"
    mine = sorted(files)[part::parts]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for name, fault in zip(mine, pool.map(lambda n: _fault(folder / n, files[n][1]), mine), strict=True):
            if fault:
                return f"{name} {fault}"
    return None


def sha256(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """sha256 of files, by their names relative to root."""

    def one(path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as f:
            while block := f.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        paths = sorted(set(paths))
        return {str(p.relative_to(root)): h for p, h in zip(paths, pool.map(one, paths), strict=True)}


def replace(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one, also after a power cut."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    new.replace(path)
    settle(path.parent)


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _own(files: dict) -> str:
    return f"{zlib.crc32(json.dumps(files).encode()):08x}"


def _crc(path: Path) -> str:
    value = 0
    with path.open("rb", buffering=0) as f:
        while block := f.read(BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _entry(path: Path) -> tuple[int, str]:
    return path.stat().st_size, _crc(path)


def _fault(path: Path, crc: str) -> str | None:
    try:
        return None if _crc(path) == crc else "has another checksum than when it was written"
    except OSError as e:
        return f"cannot be read ({e.strerror})"
