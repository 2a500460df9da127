"""`bench attention|flow|denoise|train` at tiny sizes: the code that measures, not what it measures. No test here looks
at a clock."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import pallas_kernels.attention as kernels
from cosmos_jax import bench, flops
from cosmos_jax.__main__ import main
from cosmos_jax.bench import attention, clock, contenders, denoise, flow, ours, packs, table, train, work
from cosmos_jax.bench.packs import Pack
from cosmos_jax.cli import options
from cosmos_jax.config import Config, ConfigError, DataConfig, ModelConfig
from data_pipelines.schema import Bucket
from pallas_kernels import platform

TINY = ModelConfig(
    name="tiny", layers=2, hidden=48, heads=4, kv_heads=1, head_dim=16, mlp=80, rope_sections=(4, 2, 2), vocab=64,
    latent_channels=8, action_dim=0, sound_dim=0,
)  # fmt: skip
MIXED = Pack(((5, 20), (7, 12), (5, 20)), 4, 2)
CAUSAL = Pack(((9, 0), (14, 0)), 4, 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ours, "peak", lambda *_: 1e9)
    monkeypatch.setattr(clock, "LEAST", 0.0)  # one call is enough
    monkeypatch.setattr(packs, "PACKS", packs.PACKS | {"mixed": MIXED, "causal": CAUSAL})
    monkeypatch.setattr(attention, "PACKS", packs.PACKS)
    monkeypatch.setattr(work, "SIZES", work.SIZES | {"clip": work.Size("text2video", 3, 5, 6, "tiny")})


def printed(kind, result):
    console = Console(width=240, record=True)
    table.show(kind, result, console)
    return console.export_text()


def finite(row):
    return all(math.isfinite(x) for x in row.values() if isinstance(x, float))


def test_operations_are_counted_from_visible_pairs():
    """As flops.py counts them: Nano at 720p, one guidance branch."""
    nano = packs.PACKS["nano-720p"]
    assert nano.operations() * 36 == flops.denoising(ModelConfig(), (300,), 44_160)[1]["gen_attention"]
    mask = np.equal.outer(np.repeat([0, 1], [9, 14]), np.repeat([0, 1], [9, 14])) & np.tri(23, dtype=bool)
    assert CAUSAL.pairs == mask.sum()
    assert "1 × (300 + 18720), 8 × (200 + 1950), 12 × (150 + 920) tokens" in packs.PACKS["nano-mixture"].says()


@pytest.mark.parametrize("name", [n for n, p in packs.PACKS.items() if len(p.samples) > 1])
def test_one_sample_has_as_many_operations(name):
    pack = packs.PACKS[name]
    assert len(pack.single().samples) == 1
    assert pack.single().operations() == pytest.approx(pack.operations(), rel=0.1 if "scaled" in name else 0.02)


def test_libraries_agree_whatever_they_are_given():
    """xla packed, PyTorch one batch for each size of sample: outputs and gradients, equal and unequal lengths."""
    said: list[str] = []
    result = attention.run(["mixed", "causal"], repeat=1, say=said.append)
    rows = {(r["shape"], r["library"], r["pass"]): r for r in result["rows"]}
    assert set(rows) == {(s, lib, p) for s in ("mixed", "causal") for lib in ("xla", "torch") for p in attention.PASSES}
    for (shape, library, what), row in rows.items():
        assert finite(row) and set(row["errors"]) == {"output", "dq", "dk", "dv"}
        assert row["error"] <= 2e-6 and (library == "xla") == (row["of_single"] is not None)
        operations = packs.PACKS[shape].operations() * (1 if what == "forward" else 2.5)
        assert row["tflops"] * row["s"] * 1e12 == pytest.approx(operations)
        assert row["share"] == pytest.approx(row["tflops"] * 1e12 / 1e9)
        assert row["ratio"] == pytest.approx(rows[shape, "xla", what]["s"] / row["s"])
    assert any(s.startswith("without cudnn: ") for s in said)
    assert any(s.startswith("without mosaic_tpu: ") for s in said)
    assert "mixed" in printed("attention", result)


def test_a_wrong_answer_is_not_timed(monkeypatch):
    """Nothing fast and wrong is reported: here xla sees too little in one sample."""
    right = kernels.gen_plan

    def wrong(segments, **how):
        return right(segments._replace(gen_limit=jnp.full(segments.gen.shape, 30)), **how)

    monkeypatch.setattr(kernels, "gen_plan", wrong)
    monkeypatch.setattr(clock, "medians", lambda *_: pytest.fail("a wrong answer was timed"))
    with pytest.raises(RuntimeError, match="mixed: torch differs from xla, .* its speed means nothing"):
        attention.run(["mixed"], repeat=1, say=lambda _: None)


def test_simulated_kernels_are_never_timed():
    with platform.interpreted(), pytest.raises(ConfigError, match="simulated kernels are never timed"):
        attention.run(["mixed"], repeat=1)


def test_a_library_that_is_not_there_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    here, absent = contenders.names("float32")
    assert here == ["xla"] and absent["torch"] == "PyTorch is not installed."


def test_flow_is_held_against_the_bytes_it_must_move(monkeypatch):
    monkeypatch.setattr(flow, "SIZES", {"clip": 64})
    result = flow.run(["clip"], repeat=1, say=lambda _: None)
    assert [r["operation"] for r in result["rows"]] == ["noise", "noise_backward", "error", "error_backward", "update"]
    for row in result["rows"]:
        assert finite(row) and row["kernel"] is None and row["xla_rate"] == pytest.approx(row["bytes"] / row["xla_s"])
        assert row["xla_share"] == pytest.approx(row["copy_s"] / row["xla_s"])
    noise = result["rows"][0]  # x0, noise and the result; which are noisy; a sigma for each token
    assert noise["bytes"] == 64 * 192 * (3 * 4 + 1) + 64 * 4
    assert "noise_backward" in printed("flow", result)


def test_a_denoising_step_and_its_parts(monkeypatch):
    monkeypatch.setattr(denoise, "WORKLOADS", {"tiny": denoise.Workload(TINY, "clip", (29, 41))})
    result = denoise.run(["tiny"], repeat=1, say=lambda _: None)
    (row,) = result["rows"]
    assert finite(row)
    counted = flops.denoising(TINY, (29, 41), row["tokens"])[1]
    assert row["tflop"] * 1e12 == pytest.approx(sum(counted.values()))
    parts = {p: row[f"{p}_tflops"] * row[f"{p}_s"] * 1e12 for p in ("qkv", "attention", "mlp")}
    assert parts["attention"] == pytest.approx(counted["gen_attention"])
    assert parts["qkv"] + parts["mlp"] == pytest.approx(counted["gen"])
    assert row["other_s"] == pytest.approx(row["step_s"] - sum(row[f"{p}_s"] for p in parts))
    assert "tiny" in printed("denoise", result)


def test_a_training_step_and_its_share_of_the_peak(monkeypatch):
    samples = ((11, (2, 4, 4)), (7, (1, 4, 6)))
    monkeypatch.setattr(train, "WORKLOADS", {"tiny": train.Workload(train.frozen_text(TINY), samples)})
    (row,) = train.run(["tiny"], repeat=1, say=lambda _: None)["rows"]
    assert finite(row) and (row["samples"], row["tokens"]) == (2, 11 + 7 + 8 + 6)
    counts = flops.count(train.batch(train.WORKLOADS["tiny"]))
    assert counts.gen_pairs == 8 * (11 + 8) + 6 * (7 + 6)
    assert row["tflop"] * 1e12 == pytest.approx(flops.train_step(TINY, counts, train_und=False))
    assert row["share"] == pytest.approx(row["tflops"] * 1e12 / 1e9)


def test_the_step_of_a_config(monkeypatch):
    """Its bucket, every row filled as `plan` counts, its trained parameters, its recomputing."""
    bucket = Bucket(rows=2, und=16, gen=24, vision=24, action=0, sound=0, segments=2)
    config = Config(model=TINY, data=DataConfig(bucket=bucket))
    (row,) = train.measure({"tiny": train.of(config)}, repeat=1, say=lambda _: None)["rows"]
    assert (row["samples"], row["tokens"], row["devices"]) == (2, 2 * (16 + 24), 1)
    counts = flops.count(train.batch(train.of(config)))
    assert row["tflop"] * 1e12 == pytest.approx(flops.train_step(TINY, counts, train_und=True))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("attention --config=configs/nano.py", "--config belongs to bench generate and train"),
        ("train --config=configs/toy.py --shape=nano-packed", "--shape and --config are both given"),
        ("train --config=configs/toy.py --config.mesh.fsdp=3", "does not fit"),
        ("atention", "invalid choice: 'atention'"),
        ("attention --shape=nano-720", "did you mean 'nano-720p'"),
        ("flow --shape=nano-packed", "--shape=nano-packed is not a size"),
        ("attention --repeat=0", "must be at least 1"),
        ("denoise --scaling", "--scaling belongs to bench generate"),
        ("train --reference=diffusers", "--reference belongs to bench generate"),
        ("attention --out=README.md", "is a file"),
    ],
)
def test_mistakes_are_one_sentence(words, says, capsys):
    assert main(["bench", *words.split()]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "names"),
    [("", packs.SCALED), ("--shape=all", packs.FULL), ("--shape=nano-720p,edge-480p", ("nano-720p", "edge-480p"))],
)
def test_options_reach_the_bench(words, names, monkeypatch, tmp_path, capsys):
    """On a CPU the sizes that it can take, and it says so."""
    monkeypatch.setattr(packs, "PACKS", {n: packs.PACKS[n] for n in (*packs.FULL, *packs.SCALED)})
    seen = []
    row = {"shape": "s", "library": "xla", "pass": "forward", "error": 1e-7, "s": 0.5, "tflops": 1.5}

    def run(names, repeat):
        seen.append((tuple(names), repeat))
        return {"machine": {"jax_peak": 3e11}, "rows": [row]}

    monkeypatch.setattr(attention, "run", run)
    o = options.parse(["bench", "attention", *words.split(), "--repeat=2", f"--out={tmp_path}"])
    bench.prepare(o, Config(model=TINY))()
    assert seen == [(tuple(names), 2)]
    out = capsys.readouterr().out
    assert "300 GFLOP/s" in out and ("On a CPU: scaled-256p" in out) == (words == "")
    assert json.loads((tmp_path / "attention.json").read_text())["rows"] == [row]
