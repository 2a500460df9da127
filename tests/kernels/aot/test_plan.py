"""`plan` with the vendors' compilers, no chip needed; `make check-kernels` runs it.

Small models, real widths once: what the compiler counts is what the fast estimate says, and what the step sends is what
the plan names.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from cosmos_jax.chips import CHIPS, GIB
from cosmos_jax.cli.options import read_config
from cosmos_jax.plan import make, memory
from cosmos_jax.plan.program import environment
from pallas_kernels.check import topology

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make check-kernels")
SMALL = [("optim.name", "adamw"), ("optim.lr_scale", "()"), ("model.vision", "None"), ("model.layers", "2")]
NANO = [
    ("model.vision", "None"), ("model.layers", "4"), ("model.vocab", "16384"), ("model.sound_dim", "0"),
    ("model.action_dim", "0"), ("data.bucket.und", "2048"), ("data.bucket.gen", "16384"),
    ("data.bucket.vision", "16384"), ("data.bucket.rows", "4"), ("mesh.fsdp", "4"), ("mesh.tp", "2"),
]  # fmt: skip


def planned(config: str, overrides: list[tuple[str, str]], name: str, **how) -> tuple[dict, dict]:
    """As compiled, as estimated."""
    if why := topology.missing(name):
        pytest.skip(why)
    cfg = read_config(f"configs/{config}.py", overrides)
    return make.plan(cfg, name, **how), make.plan(cfg, name, analytic=True, **how)


@pytest.mark.parametrize(
    ("name", "mesh", "kind", "kernel"),
    [
        ("v6e:4x4", dict(fsdp=8, tp=2), "TPU v6 lite", "mosaic_tpu"),
        ("v5e:2x2@2", dict(data=2, fsdp=2, cp=2), "TPU v5 lite", "mosaic_tpu"),
        ("h200:8", dict(fsdp=8), "NVIDIA H200", "mosaic_gpu"),
    ],
)
def test_the_toy_on_chips_that_are_not_here(name, mesh, kind, kernel):
    """It compiles, in their dtype and with their kernel; what is exact is exact; every collective has its axis."""
    sizes = [(f"mesh.{a}", str(n)) for a, n in mesh.items()]
    rows = mesh.get("data", 1) * mesh["fsdp"]
    plan, estimate = planned("toy", [*SMALL, *sizes, ("data.bucket.rows", str(rows))], name)
    assert (plan["kind"], plan["compute"], plan["fits"]) == (kind, "bfloat16", True)
    assert plan["attention"][0] == estimate["attention"][0] == kernel
    for part in ("parameters", "average", "batch"):
        assert plan["memory"][part] == estimate["memory"][part]
    kinds = {(c["kind"], *c["axes"]) for c in plan["collectives"]}
    assert ("all-gather", "fsdp") in kinds and not any(k[0] == "all-to-all" for k in kinds)
    assert all(c["sure"] and c["axes"] for c in plan["collectives"])
    assert (("all-reduce", "slices") in kinds) == ("@" in name)


@pytest.mark.parametrize("name", ["v5p:2x2x2", "h200:8"])
def test_layers_of_nano_take_what_the_estimate_says(name):
    """Four layers of the real width: memory within 15 %, weights and gradients on their way within 15 %."""
    plan, estimate = planned("nano", NANO, name)
    assert plan["needs"] == pytest.approx(estimate["needs"], rel=0.15)
    ours, theirs = (sum(c["wire"] for c in p["collectives"] if c["axes"] == ["fsdp"]) for p in (estimate, plan))
    assert theirs == pytest.approx(ours, rel=0.15)
    tokens = [sum(c["wire"] for c in p["collectives"] if c["axes"] == ["tp"]) for p in (estimate, plan)]
    assert tokens[0] < 1.2 * tokens[1] < 2.6 * tokens[0]  # XLA for GPU adds up some of them in float32


def test_a_compiler_that_runs_out_of_memory_is_read():
    """Nano on four small chips: refused, with the bytes that libtpu wanted."""
    if why := topology.missing("v5e:2x2"):
        pytest.skip(why)
    cfg = read_config("configs/nano.py", [("data.bucket.rows", "4"), ("model.vision", "None")])
    found = make.plan(cfg, "v5e:2x2")
    assert not found["fits"] and found["needs"] > found["has"] and "RESOURCE_EXHAUSTED" in found["how"]
    assert memory.estimate(cfg, topology.parse("v5e:2x2"))["memory"]["parameters"] == found["memory"]["parameters"]


BLOCKS = """
import json, sys, jax, jax.numpy as jnp
from cosmos_jax.plan import program
one = jax.sharding.SingleDeviceSharding(program.devices("v5e:2x2")[0])
layers, rows = 24, int(sys.argv[1])
def loss(weights, x):
    block = jax.checkpoint(lambda x, w: (x + jax.nn.silu(x @ w[0]) @ w[1], None))
    return (jax.lax.scan(block, x, weights)[0].astype(jnp.float32) ** 2).mean()
def step(weights, moments, x):
    grads = jax.grad(loss)(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights), x)
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)
    return jax.tree.map(lambda w, m: w - m, weights, moments), moments
shapes = [((layers, 2048, 6144), "float32"), ((layers, 6144, 2048), "float32"), ((rows, 2048), "bfloat16")]
a, b, x = (jax.ShapeDtypeStruct(*s, sharding=one) for s in shapes)
try:
    m = jax.jit(step, donate_argnums=(0, 1)).lower((a, b), (a, b), x).compile().memory_analysis()
    print(json.dumps([m.peak_memory_in_bytes, m.argument_size_in_bytes + m.temp_size_in_bytes]))
except jax.errors.JaxRuntimeError as e:
    print(json.dumps(str(e)))
"""


def test_libtpu_refuses_by_its_peak_and_not_by_its_temporaries():
    """What `platform.temporaries` rests on: arguments and temp_size may exceed the chip, the peak may not."""
    if why := topology.missing("v5e:2x2"):
        pytest.skip(why)

    def asked(rows: int):
        command = [sys.executable, "-c", BLOCKS, str(rows)]
        done = subprocess.run(command, env=os.environ | environment(), capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    has = CHIPS["v5e"].usable
    peak, together = asked(73728)
    assert 0.95 * has < peak < has < together
    refusal = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(15.75G\)", asked(81920))
    assert refusal and 1 < float(refusal[1]) * GIB / peak < 81920 / 73728


def test_a_denoising_step():
    two = [("model.vision", "None"), ("model.layers", "2"), ("mesh.fsdp", "1"), ("mesh.tp", "8")]
    plan, estimate = planned("nano", two, "h200:8", what="generate", size="256p")
    assert plan["fits"] and plan["samples"] == "1 × 256p, two guidance branches"
    assert plan["memory"]["parameters"] == estimate["memory"]["parameters"]
    assert plan["roofline"]["model"] == plan["roofline"]["executed"] > 0
