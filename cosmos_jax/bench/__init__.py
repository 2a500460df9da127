"""Speed, measured: `python -m cosmos_jax bench generate | attention | flow | denoise | train`.

In: options. Out: a table and, with --out, JSON. What each number means, and this machine's: docs/speed.md,
docs/kernels.md.

    work, packs (what is timed) ─► ours, contenders (programs) ─► clock (seconds, peaks of this machine) ─►
        generate: versus | scaling | published          kernels: attention | flow | denoise | train          ─► table
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cosmos_jax.config import ConfigError, ModelConfig, nearest

KINDS = {"reference": "versus", "scaling": "scaling", "accelerator": "published"}


def prepare(options, model: ModelConfig) -> Callable[[], None]:
    """Check the options; the returned work measures and prints. model: of `generate --accelerator`.

    ConfigError (one sentence): options that do not belong together, an unknown size, a library that is not there, an
    --out that is a file.
    """
    from cosmos_jax.bench import table

    if options.repeat < 1:
        raise ConfigError(f"--repeat={options.repeat} must be at least 1.")
    kind, measured = (_generate if options.what == "generate" else _kernels)(options, model)
    out = Path(options.out) if options.out else None
    if out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out} is a file; name a directory.")

    def measure() -> None:
        result = measured()
        table.show(kind, result)
        if out:
            print(f"Wrote {table.write(kind, result, out)}")

    return measure


def _generate(options, model: ModelConfig) -> tuple[str, Callable[[], dict]]:
    from cosmos_jax.bench import published, scaling, versus, work

    asked = [kind for name, kind in KINDS.items() if getattr(options, name)]
    if len(asked) != 1:
        raise ConfigError("bench generate needs one of --reference=diffusers, --scaling and --accelerator.")
    kind = asked[0]
    names = _names(options.shape, work.SIZES) if options.shape else None
    if kind == "versus" and (lacking := [n for n in ("torch", "diffusers") if importlib.util.find_spec(n) is None]):
        raise ConfigError(f"--reference=diffusers needs {' and '.join(lacking)}; run: pip install -e '.[test]'")
    if kind == "versus":
        return kind, lambda: versus.run(names or ("256p", "480p", "t2i"), repeat=options.repeat)
    if kind == "scaling":
        return kind, lambda: scaling.run(names or scaling.NAMES, repeat=options.repeat)
    return kind, lambda: published.run(model, names or published.NAMES)


def _kernels(options, _: ModelConfig) -> tuple[str, Callable[[], dict]]:
    import jax

    from cosmos_jax.bench import attention, denoise, flow, packs, train

    for name in KINDS:
        if getattr(options, name):
            raise ConfigError(f"--{name} belongs to bench generate; leave it out of bench {options.what}.")
    kinds: dict[str, tuple[Any, Collection[str]]] = {
        "attention": (attention, packs.PACKS), "flow": (flow, flow.SIZES),
        "denoise": (denoise, denoise.WORKLOADS), "train": (train, train.WORKLOADS),
    }  # fmt: skip
    module, known = kinds[options.what]
    scaled = [n for n in known if n.startswith("scaled")]
    full = [n for n in known if n not in scaled]
    small = jax.default_backend() == "cpu"
    if options.shape in (None, "all"):
        names = (scaled or ["nano-480p"]) if small and options.shape is None else full
        if options.shape is None and small:
            print(f"On a CPU: {', '.join(names)}. Others by --shape: {', '.join(n for n in known if n not in names)}.")
    else:
        names = _names(options.shape, known)
    return options.what, lambda: module.run(names, repeat=options.repeat)


def _names(words: str, known) -> list[str]:
    names = words.split(",")
    for n in names:
        if n not in known:
            raise ConfigError(f"--shape={n} is not a size{nearest(n, known)}; they are {', '.join(known)}.")
    return names
