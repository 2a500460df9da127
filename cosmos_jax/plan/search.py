"""Which settings would make it fit, the smallest change first, each of them compiled.

In: `Config` and the plan that does not fit. Out: sentences. Candidates are ordered by how much of the run they change;
the estimate says which are worth a compile: what it puts further beyond the limit than it may err is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cosmos_jax.chips import CHIPS, GIB
from cosmos_jax.config import Config, ConfigError
from cosmos_jax.plan import memory
from pallas_kernels.check import topology as topologies
from pallas_kernels.check.topology import Topology

ERROR = 1.15  # the estimate may be wrong by so much (tests/plan/test_estimate.py)
MOST = 3  # candidates that are compiled


Change = tuple[str, Any]  # path of a setting, its value


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to change, (path, value) each, perhaps on more chips."""

    changes: tuple[Change, ...]
    topology: str

    def apply(self, cfg: Config) -> Config:
        for path, value in self.changes:
            group, name = path.split(".")
            cfg = dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **{name: value})})
        return cfg

    def words(self, before: str) -> str:
        said = [f"--config.{path}={value}" for path, value in self.changes if path != "data.bucket"]
        said += [f"--config.data.bucket.rows={b.rows}" for path, b in self.changes if path == "data.bucket"]
        return " ".join(said + [f"--topology={self.topology}"] * (self.topology != before))


Plan = Callable[[Config, str], dict]


def settings(cfg: Config, found: dict, plan: Plan) -> list[str]:
    """What to print. plan(config, topology): compiles (or estimates) one candidate."""
    t = topologies.parse(found["topology"])
    said, tried = [], 0
    likely = [c for c in candidates(cfg, t, found["what"], found["mesh"]) if estimated(cfg, c, found) <= ERROR]
    for c in likely:
        if tried == MOST:
            break
        tried += 1
        other = plan(c.apply(cfg), c.topology)
        how = "estimated" if other["analytic"] else "compiled"
        size, has = other["needs"] / GIB, other["has"] / GIB
        if other["fits"]:
            said.append(f"would fit: {c.words(t.name)} ({how}: {size:.2f} of {has:.2f} GiB)")
            break
        said.append(f"would not: {c.words(t.name)} ({how}: {size:.2f} of {has:.2f} GiB)")
    if said and said[-1].startswith("would fit"):
        return said
    state = sum(v for k, v in found["memory"].items() if k in ("parameters", "optimiser", "average"))
    if state > found["has"]:
        said.append(
            f"no setting helps: parameters, optimiser and average alone are {state / GIB:.2f} GiB of each device."
        )
    elif not likely:
        said.append("no setting that plan knows helps on these chips.")
    return said + _larger(cfg, found, t, plan)


def _larger(cfg: Config, found: dict, t: Topology, plan: Plan) -> list[str]:
    """The next topology of the family that would hold it, by the estimate first."""
    for name in larger(t):
        bigger = topologies.parse(name)
        before = {"data": 1, "fsdp": 0, "tp": found["mesh"]["tp"], "cp": found["mesh"]["cp"]}  # 0: always another
        for new in layouts(cfg, bigger.devices, before):
            changes = tuple((f"mesh.{a}", n) for a, n in new.items() if n != found["mesh"][a])
            c = Candidate((*changes, *_rows(cfg, new, 1, found["what"] == "train")), name)
            if estimated(cfg, c, found) > 1:
                continue
            other = plan(c.apply(cfg), name)
            how = "estimated" if other["analytic"] else "compiled"
            would = "would fit" if other["fits"] else "would not fit"
            size = f"{other['needs'] / GIB:.2f} of {other['has'] / GIB:.2f} GiB"
            return [f"on more chips it {would}: {c.words(t.name)} ({how}: {size})"]
    return []


def candidates(cfg: Config, t: Topology, what: str, mesh: Mapping[str, int]) -> Iterator[Candidate]:
    """Smallest change first: what is recomputed, how the step is cut, what waits on the host, how the model is cut."""
    train = what == "train"
    remat: list[tuple[Change, ...]] = [()]
    if train and cfg.model.remat != "full":
        remat.append((("model.remat", "full"),))
    rows = cfg.data.bucket.rows // (mesh["data"] * mesh["fsdp"])
    most = rows // cfg.optim.accumulate if train else 1
    cuts = [n * cfg.optim.accumulate for n in (2, 4, 8, 16) if n <= most and most % n == 0]
    yield from (Candidate(r, t.name) for r in remat[1:])
    for r in remat:
        yield from (Candidate((*r, ("optim.accumulate", n)), t.name) for n in cuts)
    if train and not cfg.optim.offload:
        yield from (Candidate((*r, ("optim.offload", True)), t.name) for r in remat)
    for new in layouts(cfg, t.devices // mesh.get("cfg", 1), mesh):
        changes = tuple((f"mesh.{a}", n) for a, n in new.items() if n != mesh[a])
        yield from (Candidate((*r, *changes, *_rows(cfg, new, rows, train)), t.name) for r in remat)


def layouts(cfg: Config, devices: int, mesh: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Other meshes: first fsdp for data, then cp for fsdp, then tp, then both; never less of cp or tp than before."""
    for cut in (1, 2, 4, 8, 16):
        for cp in (cut, *(c for c in (8, 4, 2, 1) if c < cut)):
            tp = cut // cp
            size = {"cp": mesh["cp"] * cp, "tp": mesh["tp"] * tp}
            for data in sorted({1, mesh["data"]}, reverse=True):
                if devices % (data * size["cp"] * size["tp"]) or cfg.model.kv_heads % size["tp"]:
                    continue
                new = {"data": data, "fsdp": devices // (data * size["cp"] * size["tp"]), **size}
                if any(n != mesh[a] for a, n in new.items()):
                    yield new


def _rows(cfg: Config, new: Mapping[str, int], rows: int, train: bool) -> tuple[Change, ...]:
    """As many packs for each group as before, at least one."""
    wanted = max(1, rows) * new["data"] * new["fsdp"]
    if not train or wanted == cfg.data.bucket.rows:
        return ()
    return (("data.bucket", dataclasses.replace(cfg.data.bucket, rows=wanted)),)


def larger(t: Topology) -> Iterator[str]:
    """Twice the chips, four times, … of the same family: the shortest side grows; machines of GPUs become more."""
    shape, copies = list(t.shape), t.copies
    for _ in range(6):
        if t.platform == "gpu":
            copies *= 2
        else:
            i = min(range(len(shape)), key=lambda i: (shape[i], -i))
            shape[i] *= 2
        name = f"{t.family}:{'x'.join(map(str, shape))}" + (f"@{copies}" if copies > 1 else "")
        yield name


def estimated(cfg: Config, c: Candidate, found: dict) -> float:
    """Estimated need ÷ what there is; infinite for a mesh that does not divide the model."""
    t = topologies.parse(c.topology)
    try:
        answer = memory.estimate(c.apply(cfg), t, found["what"], found["size"])
    except ConfigError:
        return float("inf")
    return sum(answer["memory"].values()) / CHIPS[t.family].usable
