"""One topology in a process of its own: `python -m pallas_kernels.check.program TOPOLOGY DUMP CASE…`.

In: a topology, a directory that the compilers may fill, names of cases; and, set before jax is imported, `environment`.
Out: for each case a line of JSON when it begins, another with its `Outcome`. A process because libtpu and the CUDA
plugin want one each, because both read their options when they are loaded, and because a compiler that dies or hangs
must not take the others with it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.check import dumps
from pallas_kernels.check.cases import TABLE, Case
from pallas_kernels.check.dumps import Kernel
from pallas_kernels.check.topology import platform


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one case. error: why there is no program, as the compiler says it."""

    topology: str
    case: str
    seconds: float = 0.0
    kernels: tuple[Kernel, ...] = ()
    error: str | None = None

    @staticmethod
    def read(line: dict) -> Outcome:
        return Outcome(**line | {"kernels": tuple(Kernel(**k) for k in line["kernels"])})


def environment(topology: str, dump: Path) -> dict[str, str]:
    """What such a process needs to find set."""
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return quiet | {"TF_CPP_MIN_LOG_LEVEL": "3"} | dumps.flags(platform(topology), dump)


def compiled(case: Case, topology: str, mesh, dump: Path) -> Outcome:
    """Compile one case for the first device of `mesh`. Whatever the compiler raises is the outcome's error."""
    import jax

    from pallas_kernels import targets

    for old in dump.iterdir():
        old.unlink()
    kind, begin = platform(topology), time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            function, arguments = case.build(kind)
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
            traced = jax.jit(function).trace(*arguments)
            program = traced.lower().compile()
        spent = time.perf_counter() - begin
        if kind == "gpu":
            kernels = dumps.gpu(dump, targets.SHARED_MEMORY)
        else:
            kernels = dumps.tpu(dump, program.as_text(), prefetched(traced.jaxpr))
    except Exception as e:  # any refusal is a result: the parent judges it, a negative control wants it
        return Outcome(topology, case.name, time.perf_counter() - begin, error=f"{type(e).__name__}: {e}")
    return Outcome(topology, case.name, spent, tuple(kernels))


def prefetched(jaxpr) -> dict[str, int]:
    """Name of each Pallas kernel in a program → bytes of its operands in scalar memory."""
    found: dict[str, int] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            mapping = eqn.params["grid_mapping"]
            lists = eqn.invars[mapping.num_dynamic_grid_bounds :][: mapping.num_index_operands]
            found[eqn.params["name"]] = sum(x.aval.size * x.aval.dtype.itemsize for x in lists)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found |= prefetched(inner) if hasattr(inner, "eqns") else {}
    return found


def main(topology: str, directory: str, names: Sequence[str]) -> None:
    """Every case of these names, one after the other, on standard output."""
    import jax

    from pallas_kernels import targets

    mesh = jax.sharding.Mesh(targets.topology(topology).devices[:1], ("device",))
    for case in TABLE:
        if case.name in names:
            print(json.dumps({"begins": case.name}), flush=True)
            outcome = compiled(case, topology, mesh, Path(directory))
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
