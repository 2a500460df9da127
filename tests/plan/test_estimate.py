"""The fast estimate: exact where it can be, within 15 % of the compiler elsewhere, and fast.

`compiled.json` holds plans that the vendors' compilers made (docs/plan.md has the commands): what they needed is what
the estimate is held to. No compiler for chips runs here; `make check-kernels` compiles some of these again.
"""

import json
import pathlib
import subprocess
import sys
import types

import jax
import pytest
from flax.traverse_util import flatten_dict

from cosmos_jax import mesh as meshes
from cosmos_jax import optim, precision, shard, state
from cosmos_jax.chips import CHIPS, GIB
from cosmos_jax.cli.options import read_config
from cosmos_jax.config import PrecisionConfig
from cosmos_jax.model import cosmos
from cosmos_jax.plan import memory, programs, shapes
from cosmos_jax.sampling.memory import held
from pallas_kernels.check import topology
from pallas_kernels.platform import temporaries

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = ("toy", "nano", "super", "edge")
ROWS = json.loads((ROOT / "tests/plan/compiled.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_are_those_of_the_model(name):
    """Path, shape and logical axes of every parameter, without jax as with it."""
    cfg = read_config(f"configs/{name}.py", [])
    real, axes = flatten_dict(cosmos.abstract(cfg.model)), flatten_dict(cosmos.logical_axes(cfg.model))
    listed = {p.path: (p.shape, p.axes) for p in shapes.parameters(cfg.model)}
    assert listed == {"/".join(map(str, k)): (real[k].shape, axes[k]) for k in real}


def test_the_axes_lie_where_the_model_puts_them():
    used = {
        a for name in CONFIGS for p in shapes.parameters(read_config(f"configs/{name}.py", []).model) for a in p.axes
    }
    rules = {a: shard.RULES[a] or () for a in used}
    assert {a: shapes.AXES.get(a, ()) for a in used} == {a: (r,) if isinstance(r, str) else r for a, r in rules.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_trained_is_what_the_optimiser_selects(name):
    cfg = read_config(f"configs/{name}.py", [])
    real, _ = optim.select(cfg.optim, cosmos.abstract(cfg.model))
    ours = shapes.trained(cfg.optim, list(shapes.parameters(cfg.model)))
    assert {p.path for p in ours} == {"/".join(map(str, k)) for k in flatten_dict(real)}


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_state_and_batch_are_exact(optimiser):
    """Bytes of parameters, moments, average and batch: the formulas against the arrays of `train`."""
    cfg = read_config("configs/toy.py", [("optim.name", optimiser)])
    mesh = meshes.build(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        at = state.abstract(cfg)
        real = {"parameters": held(at["params"]), "average": held(at["ema"])}
        real["batch"] = held(programs.batch(cfg.data.bucket, cfg.model.sequence, mesh))
        optimiser_state = held(at["opt"])
    parts = memory.train(cfg, dict(mesh.shape), "xla")
    assert {k: parts[k] for k in real} == real
    assert parts["optimiser"] == pytest.approx(optimiser_state, abs=64)  # counters of steps


@pytest.mark.parametrize("row", ROWS, ids=[r["name"] for r in ROWS])
def test_within_fifteen_per_cent_of_the_compiler(row):
    cfg = read_config(row["config"], [tuple(o) for o in row["overrides"]])
    t = topology.parse(row["topology"])
    answer = memory.estimate(cfg, t, row["what"], row["size"])
    needs = max(sum(answer["memory"].values()), answer.get("prefill", 0))
    assert needs == pytest.approx(row["needs"], rel=0.15)
    assert answer["mesh"] == row["mesh"] and answer["attention"][0] == row["attention"]
    fits = needs <= CHIPS[t.family].usable
    assert fits == row["fits"] or abs(row["needs"] / CHIPS[t.family].usable - 1) < 0.15


def test_it_needs_no_jax():
    """Importing it would be most of the two seconds that an estimate may take."""
    code = (
        "import sys\nfrom cosmos_jax.__main__ import main\n"
        "main(['plan', '--config=configs/nano.py', '--topology=v5p:4x4x4', '--analytic', '--config.mesh.fsdp=16',\n"
        "      '--config.mesh.tp=4', '--config.data.bucket.rows=16'])\n"
        "print('jax' in sys.modules, 'flax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split()[-2:] == ["False", "False"] and "FITS" in done.stdout


def for_a_tpu():
    """Inside, programs are traced for a TPU, as a plan does on a CPU."""
    chip = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip))


def account(**of) -> types.SimpleNamespace:
    """What a compiler says of a program with 2 GiB of arguments, donated but for 0.5, and 1 GiB on the host."""
    known = dict(argument=2.0, output=1.75, alias=1.5, temp=9.0, host_argument=1.0, host_temp=0.0)
    said = {f"{k}_size_in_bytes": int(v * GIB) for k, v in known.items()}
    return types.SimpleNamespace(**said, **{k: int(v * GIB) for k, v in of.items()})


def test_a_tpus_temporaries_are_what_its_peak_leaves():
    with for_a_tpu():
        assert temporaries(account(peak_memory_in_bytes=8.0)) == (8.0 - 1.0 - 2.0 - 0.25) * GIB
        assert temporaries(account(peak_memory_in_bytes=0)) == 9 * GIB, "unknown, as in a program from the cache"
    assert temporaries(account(peak_memory_in_bytes=8.0)) == 9 * GIB, "elsewhere they are one block"


def test_the_compute_dtype_is_that_of_the_chip_which_is_traced_for():
    """Not of this machine: a plan for a TPU, made on a CPU, computes in bfloat16."""
    assert precision.resolve(PrecisionConfig()).compute == "float32"
    with for_a_tpu():
        assert precision.resolve(PrecisionConfig()).compute == "bfloat16"
    assert precision.resolve(PrecisionConfig(compute="float32")).compute == "float32"
