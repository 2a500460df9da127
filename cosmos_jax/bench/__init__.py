"""Speed, measured: `python -m cosmos_jax bench generate --reference=diffusers | --scaling | --accelerator`.

In: options. Out: a table and, with --out, JSON. What each number means, and this machine's: docs/speed.md.

    work (what is timed) ─► ours (our programs, timed) ─► versus | scaling | published ─► table
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from cosmos_jax.config import ConfigError, ModelConfig, nearest

KINDS = {"reference": "versus", "scaling": "scaling", "accelerator": "published"}


def prepare(options, model: ModelConfig) -> Callable[[], None]:
    """Check the options; the returned work measures and prints. model: of --accelerator.

    ConfigError (one sentence): not exactly one kind, an unknown size, a library that is not there, an --out that is a
    file.
    """
    from cosmos_jax.bench import published, scaling, table, versus, work

    asked = [kind for name, kind in KINDS.items() if getattr(options, name)]
    if len(asked) != 1:
        raise ConfigError("bench generate needs one of --reference=diffusers, --scaling and --accelerator.")
    kind = asked[0]
    names = options.shape.split(",") if options.shape else None
    for n in names or ():
        if n not in work.SIZES:
            raise ConfigError(f"--shape={n} is not a size{nearest(n, work.SIZES)}; they are {', '.join(work.SIZES)}.")
    if options.repeat < 1:
        raise ConfigError(f"--repeat={options.repeat} must be at least 1.")
    if kind == "versus" and (lacking := [n for n in ("torch", "diffusers") if importlib.util.find_spec(n) is None]):
        raise ConfigError(f"--reference=diffusers needs {' and '.join(lacking)}; run: pip install -e '.[test]'")
    out = Path(options.out) if options.out else None
    if out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out} is a file; name a directory.")

    def measure() -> None:
        if kind == "versus":
            result = versus.run(names or ("256p", "480p", "t2i"), repeat=options.repeat)
        elif kind == "scaling":
            result = scaling.run(names or scaling.NAMES, repeat=options.repeat)
        else:
            result = published.run(model, names or published.NAMES)
        table.show(kind, result)
        if out:
            print(f"Wrote {table.write(kind, result, out)}")

    return measure
