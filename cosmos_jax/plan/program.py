"""One plan's program, compiled in a process of its own: `python -m cosmos_jax.plan.program < request.json`.

In: a request {config, topology, what, size} and, set before jax is imported, `environment`. Out: one line of JSON: what
the compiler made of it, or why it made nothing. A process because libtpu and the CUDA plugin want one each, because
the backend must not be a real accelerator of this machine, and because a compiler that dies must not take us along.

Nothing is computed and no parameter exists: the state is `state.abstract`, the batch is the shapes of its bucket.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

MARK = "plan: "  # before the line that is ours; compilers print too


def environment() -> dict[str, str]:
    """What such a process needs to find set."""
    return {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }  # fmt: skip


def main() -> None:
    from cosmos_jax.config import ConfigError

    request = json.load(sys.stdin)
    try:
        answer = run(**request)
    except ConfigError as e:  # a setting that cannot be, in the words of whoever refused it
        answer = {"refused": str(e)}
    except Exception as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        answer = {"exhausted": exhausted(str(e)), "says": " ".join(str(e).split())[:600]}
    print(MARK + json.dumps(answer), flush=True)


def exhausted(message: str) -> int | None:
    """Bytes that the compiler wanted in all, if it says: libtpu's "HLO temporaries" count arguments and results too."""
    for pattern in (
        r"temporaries \(([\d.]+)([GMK])",
        r"Used ([\d.]+)([GMK]) of",
        r"requir\w+ .*?([\d.]+)([GMK])i?B?\b",
    ):
        if found := re.search(pattern, message):
            return int(float(found[1]) * 2 ** {"G": 30, "M": 20, "K": 10}[found[2]])
    return None


def run(config: dict, topology: str, what: str = "train", size: str = "") -> dict[str, Any]:
    """Compile for the topology. ConfigError for what cannot be; RESOURCE_EXHAUSTED from the compiler."""
    import jax

    from cosmos_jax import mesh as meshes
    from cosmos_jax import precision
    from cosmos_jax.config import Config, from_dict
    from cosmos_jax.plan import programs
    from pallas_kernels import attention, platform

    cfg: Config = from_dict(config)
    mesh = meshes.build(cfg.mesh, devices(topology))
    with jax.set_mesh(mesh):
        exact = precision.resolve(cfg.precision)
        answer: dict[str, Any] = {
            "kind": platform.device().kind, "mesh": dict(mesh.shape), "compute": exact.compute,
            "attention": attention.choose(cfg.model.attention, exact.dtype), "jax": jax.__version__,
            "joined": joined(mesh, topology),
        }  # fmt: skip
        begin = time.perf_counter()
        made = programs.train(cfg, mesh) if what == "train" else programs.generate(cfg, mesh, size)
        return answer | made | {"seconds": time.perf_counter() - begin}


def devices(topology: str):
    """The chips. ConfigError where the vendor's library knows no such shape."""
    from jax.errors import JaxRuntimeError

    from cosmos_jax.config import ConfigError
    from pallas_kernels import targets

    try:
        return targets.topology(topology).devices
    except JaxRuntimeError as e:
        raise ConfigError(f"--topology={topology} is refused by its own library: {str(e).splitlines()[0]}") from e


def joined(mesh, topology: str) -> dict[str, dict]:
    """For every set of axes that are larger than 1: how its devices are joined."""
    import dataclasses
    import itertools

    import numpy as np

    from cosmos_jax.chips import CHIPS
    from cosmos_jax.plan import hlo, links
    from pallas_kernels.check.topology import parse

    t = parse(topology)
    names = [a for a, n in mesh.shape.items() if n > 1]
    found = {hlo.SLICES: dataclasses.asdict(links.Joined(1, t.copies))}
    for r in range(1, len(names) + 1):
        for axes in itertools.combinations(names, r):
            at = tuple(slice(None) if a in axes else 0 for a in mesh.axis_names)
            places = [_place(d) for d in np.asarray(mesh.devices[at]).flat]
            found[",".join(axes)] = dataclasses.asdict(links.from_places(places, t.shape, CHIPS[t.family]))
    return found


def _place(device) -> tuple[int, tuple[int, ...]]:
    if device.platform == "tpu":
        return getattr(device, "slice_index", None) or 0, tuple(device.coords)
    return device.process_index, ()


if __name__ == "__main__":
    main()
