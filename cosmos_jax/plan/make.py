"""One plan: numbers from the compiler or from formulas, in one dict.

In: `Config`, topology, what. Out: the dict that `report` prints and --out stores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from cosmos_jax.chips import CHIPS, GIB, Chip
from cosmos_jax.config import Config
from cosmos_jax.plan import links, memory, packing, roofline
from cosmos_jax.plan.ahead import Request, compiled
from cosmos_jax.plan.hlo import Collective
from cosmos_jax.plan.links import Joined
from pallas_kernels.check import topology as topologies

BRANCHES = (packing.CAPTION, packing.NEGATIVE)  # text tokens of both guidance branches
STEPS = {"720p": 35, "480p": 35, "256p": 35, "t2i": 50}


def plan(
    cfg: Config, topology: str, what: str = "train", size: str = "720p", analytic: bool = False,
    mix: tuple[str, ...] = packing.MIX,
) -> dict:  # fmt: skip
    """Plan one run. ConfigError (or PlanError) for what cannot be."""
    t = topologies.parse(topology)
    chip = CHIPS[t.family]
    guess = memory.estimate(cfg, t, what, size)  # refuses a mesh that does not divide the model before compiling it
    answer = guess if analytic else compiled(Request(cfg, topology, what, size))
    p = {
        "what": what, "model": cfg.model.name, "topology": topology, "analytic": analytic, "has": chip.usable,
        "remat": cfg.model.remat, "accumulate": cfg.optim.accumulate, "size": size,
    } | described(cfg, answer, what, size, mix)  # fmt: skip
    if "exhausted" in answer:
        return p | _exhausted(p, answer, guess)
    p |= {k: answer[k] for k in ("memory", "peak", "prefill", "host", "jax", "seconds") if answer.get(k)}
    p |= {"estimate": guess["estimate"], "estimated": max(sum(guess["memory"].values()), guess.get("prefill", 0))}
    p["needs"] = sum(answer["memory"].values())
    if answer.get("prefill"):
        p["needs"] = max(p["needs"], answer["prefill"])
    found = [Collective(**c | {"axes": tuple(c["axes"])}) for c in answer["collectives"]]
    joined = {tuple(k.split(",")): Joined(**v) for k, v in answer["joined"].items()}
    p["collectives"] = grouped(found, joined, chip)
    p["roofline"] = _clocks(cfg, p, chip, sum(c["seconds"] for c in p["collectives"]), mix)
    p["fits"] = p["needs"] <= p["has"]
    p["verdict"] = verdict(p)
    return p


def described(cfg: Config, answer: dict, what: str, size: str, mix: tuple[str, ...]) -> dict:
    """What is planned, in words."""
    kept = {k: answer[k] for k in ("mesh", "kind", "compute", "attention", "devices") if k in answer}
    how = "estimated by formulas, nothing compiled" if "jax" not in answer else (
        f"compiled in {answer.get('seconds', 0):.0f} s by jax {answer['jax']}, nothing run"
    )  # fmt: skip
    if what == "generate":
        n = answer.get("samples", 1)
        return kept | {"how": how, "samples": f"{n} × {size}, two guidance branches", "rows": n}
    b, pack = cfg.data.bucket, packing.pack(cfg, mix)
    return kept | {
        "how": how,
        "bucket": f"{b.rows} rows of {b.und:,} und + {b.gen:,} gen tokens",
        "packing": f"{pack.says}: {pack.share:.0%} of the tokens are real",
        "tokens": {"real": pack.real.und + pack.real.gen, "capacity": b.und + b.gen},
    }


def _exhausted(p: dict, answer: dict, estimate: dict) -> dict:
    """The compiler gave up: arguments by the formulas, the rest of what it wanted are temporaries."""
    parts = {k: v for k, v in estimate["memory"].items() if k != "temporaries"}
    needs = answer["exhausted"] or sum(estimate["memory"].values())
    p = {k: estimate[k] for k in ("mesh", "kind", "compute", "attention", "devices")} | p
    p |= {"estimate": estimate["estimate"], "estimated": sum(estimate["memory"].values())}
    p |= {"memory": parts | {"temporaries": max(0, needs - sum(parts.values()))}, "needs": needs, "fits": False}
    p |= {"how": "the compiler refused it: " + answer["says"].split(". HLO")[0], "exhausted": True}
    return p | {"verdict": verdict(p)}


def verdict(p: dict) -> str:
    """The one line."""
    needs, has = p["needs"] / GIB, p["has"] / GIB
    if p["fits"]:
        return f"FITS: needs {needs:.2f} GiB of each device's {has:.2f}, {has - needs:.2f} GiB to spare."
    return (
        f"DOES NOT FIT: needs {needs:.2f} GiB of each device, {needs - has:.2f} GiB more than the {has:.2f} there are."
    )


def grouped(found: list[Collective], joined: Mapping[tuple[str, ...], Joined], chip: Chip) -> list[dict]:
    """By kind and axes, the slowest first."""
    sums: dict[tuple, dict] = defaultdict(lambda: {"count": 0, "bytes": 0, "wire": 0.0, "seconds": 0.0, "sure": True})
    for c in found:
        how = joined.get(c.axes) or Joined(c.group, 1, 1 if chip.wraps else 0)
        s = sums[c.kind, c.axes]
        s["count"] += c.times
        s["bytes"] += c.times * c.bytes
        s["wire"] += c.times * c.wire
        s["seconds"] += links.seconds(c, how, chip)
        s["sure"] &= c.sure
        s["over"] = how.says
    rows = [{"kind": kind, "axes": list(axes), **s} for (kind, axes), s in sums.items()]
    return sorted(rows, key=lambda r: -r["seconds"])


def _clocks(cfg: Config, p: dict, chip: Chip, interconnect: float, mix: tuple[str, ...]) -> dict:
    fused = p["attention"][0] != "xla"
    if p["what"] == "train":
        r = roofline.train(cfg, packing.pack(cfg, mix), p["mesh"], chip, interconnect, fused)
    else:
        tokens = packing.tokens(p["size"], cfg.model.patch)
        r = roofline.generate(cfg.model, BRANCHES, tokens, p["mesh"], chip, interconnect, fused)
    clocks = {
        "model": r.model, "executed": r.executed, "bytes": r.bytes, "compute": r.compute, "memory": r.memory,
        "interconnect": r.interconnect, "least": r.least, "alone": r.alone, "limit": r.limit,
        "mfu_most": r.mfu(r.least), "mfu_alone": r.mfu(r.alone),
    }  # fmt: skip
    if p["what"] == "generate":
        clocks |= {"steps": STEPS[p["size"]], "per_video": STEPS[p["size"]] * r.least}
    return clocks
