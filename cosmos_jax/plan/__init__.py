"""`plan`: will it fit, and how fast can it be, before there is a machine.

In: a config and the name of a topology. Out: lines, and JSON on request. The real program is compiled by the vendor's
compiler for chips that are not here; `--analytic` estimates the same without a compiler, in less than a second.

    packing (tokens) ─┐
    ahead ► program ──┼► make ─► report (lines)          does not fit ─► search ─► make …
    memory (estimate) ┘     roofline, links

Nothing of this package but `program` and `programs`, which run in a process of their own, imports jax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from cosmos_jax.config import Config, ConfigError
from cosmos_jax.plan import make, packing, report, search
from pallas_kernels.check import topology


def prepare(options, config: Config) -> Callable[[], int]:
    """Check all that can be checked without compiling; the work returns 0 if it fits, 1 if not."""
    if not options.topology:
        raise ConfigError("plan needs --topology, for example --topology=v5p:4x4x4 or h200:8.")
    name = options.topology
    topology.parse(name)
    mix = tuple(options.mix.split(",")) if options.mix else packing.MIX
    for size in (*mix, options.size):
        packing.tokens(size, config.model.patch)
    if not options.analytic and (why := topology.missing(name)):
        raise ConfigError(f"{why}; or estimate without it: --analytic.")
    if options.out and Path(options.out).is_file():
        raise ConfigError(f"--out={options.out} is a file; name a directory.")

    def work() -> int:
        def plan(config: Config, name: str) -> dict:
            return make.plan(config, name, options.what, options.size, options.analytic, mix)

        found = plan(config, name)
        if not found["fits"] and options.search is not False:
            found["settings"] = search.settings(config, found, plan)
        print("\n".join(report.lines(found)))
        if options.out:
            print(f"  {store(found, options)}")
        return 0 if found["fits"] else 1

    return work


def store(found: dict, options) -> Path:
    """Write the plan with the words that ask for it again; returns the file."""
    words = [f"--config={options.config}", f"--topology={options.topology}", f"--what={options.what}"]
    words += [f"--size={options.size}"] if options.what == "generate" else []
    words += [f"--mix={options.mix}"] if options.mix else []
    words += ["--analytic"] if options.analytic else []
    words += [f"--config.{k}={v}" for k, v in options.overrides]
    mesh = "".join(f"-{a}{n}" for a, n in found["mesh"].items() if n > 1)
    name = f"{found['model']}-{options.topology.replace(':', '-').replace('@', '-x')}{mesh}"
    name += f"-{options.size}" if options.what == "generate" else f"-{found['remat']}"
    others = [f"{k.rpartition('.')[2]}-{v}" for k, v in options.overrides if not k.startswith("mesh.")]
    others += ["estimate"] * options.analytic
    name = re.sub(r"[^\w.-]+", "-", "-".join([name, *others]))  # no two plans in one file
    file = Path(options.out) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"command": " ".join(words), **found}, indent=1) + "\n")
    return file
