"""Compiled programs that outlive the process, so that the second run of a command does not compile.

In: a directory. Out: JAX keeps programs there (its persistent compilation cache), and hits and misses are counted.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

DEFAULT = Path("~/.cache/cosmos_jax/xla")
HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@dataclasses.dataclass
class Programs:
    """Where compiled programs are kept; how many came from there since (`hits`), and how many were added to it."""

    directory: Path
    hits: int = 0
    misses: int = 0

    def __str__(self) -> str:
        return f"compiled programs are kept in {self.directory}; {self.hits} came from there, {self.misses} were added"

    def _count(self, event: str, **_) -> None:
        self.hits += event == HIT
        self.misses += event == MISS


def keep(directory: str | Path | None = None) -> Programs:
    """Keep every program that takes a second to compile. A program that calls back to Python is never kept.

    directory: made if it is missing; by default what JAX_COMPILATION_CACHE_DIR names, else ~/.cache/cosmos_jax/xla.
    """
    chosen = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or DEFAULT
    programs = Programs(Path(chosen).expanduser().absolute())
    programs.directory.mkdir(parents=True, exist_ok=True)
    compilation_cache.reset_cache()  # what was compiled before had no directory, and JAX looks only once
    jax.config.update("jax_compilation_cache_dir", str(programs.directory))
    jax.monitoring.register_event_listener(programs._count)
    return programs
