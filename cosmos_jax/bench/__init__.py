"""Speed, measured: `python -m cosmos_jax bench generate | attention | flow | denoise | train | data`.

In: options. Out: a table and, with --out, JSON. What each number means, and this machine's: docs/speed.md,
docs/kernels.md, docs/data.md (`data`: the loader alone).

    work, packs (what is timed) ─► ours, contenders (programs) ─► clock (seconds, peaks of this machine) ─►
        generate: versus | scaling | published          kernels: attention | flow | denoise | train          ─► table
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cosmos_jax.config import Config, ConfigError, nearest

KINDS = {"reference": "versus", "scaling": "scaling", "accelerator": "published"}


def prepare(options, config: Config, given: bool = False) -> Callable[[], None]:
    """Check the options; the returned work measures and prints. config: its model is that of `generate --accelerator`;
    if it was `given` to `train`, its step is what is measured.

    ConfigError (one sentence): options that do not belong together, an unknown size, a library that is not there, an
    --out that is a file.
    """
    from cosmos_jax.bench import table

    if options.repeat < 1:
        raise ConfigError(f"--repeat={options.repeat} must be at least 1.")
    if options.workers and options.what != "data":
        raise ConfigError(f"--workers belongs to bench data; leave it out of bench {options.what}.")
    if given and options.what not in ("generate", "train"):
        raise ConfigError(f"--config belongs to bench generate and train; leave it out of bench {options.what}.")
    of = {"generate": _generate, "data": _data, "train": _config if given else _kernels}.get(options.what, _kernels)
    kind, measured = of(options, config)
    out = Path(options.out) if options.out else None
    if out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out} is a file; name a directory.")

    def measure() -> None:
        result = measured()
        table.show(kind, result)
        if out:
            print(f"Wrote {table.write(kind, result, out)}")

    return measure


def _generate(options, config: Config) -> tuple[str, Callable[[], dict]]:
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
    return kind, lambda: published.run(config.model, names or published.NAMES)


def _data(options, _: Config) -> tuple[str, Callable[[], dict]]:
    from cosmos_jax.bench import data

    _no_generate(options)
    names = list(data.MIXTURES) if options.shape in (None, "all") else _names(options.shape, data.MIXTURES)
    counts = (options.workers or "0,2").split(",")
    if not all(n.isdecimal() for n in counts):
        raise ConfigError(f"--workers={options.workers}: give numbers of processes separated by commas, as in 0,2,4.")
    return "data", lambda: data.run(names, [int(n) for n in counts], repeat=options.repeat)


def _no_generate(options) -> None:
    for name in KINDS:
        if getattr(options, name):
            raise ConfigError(f"--{name} belongs to bench generate; leave it out of bench {options.what}.")


def _config(options, config: Config) -> tuple[str, Callable[[], dict]]:
    from cosmos_jax import mesh, precision
    from cosmos_jax.bench import train
    from cosmos_jax.model import attention

    _no_generate(options)
    if options.shape:
        raise ConfigError("--shape and --config are both given; the sizes of a config are its data.bucket.")
    mesh.check(config, mesh.build(config.mesh))
    attention.check(config.model, precision.resolve(config.precision))
    return "train", lambda: train.measure({config.model.name: train.of(config)}, options.repeat)


def _kernels(options, _: Config) -> tuple[str, Callable[[], dict]]:
    import jax

    from cosmos_jax.bench import attention, denoise, flow, packs, train

    _no_generate(options)
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
