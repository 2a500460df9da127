"""Rows on disk, what resuming does to them, and the analytic FLOPs against published tables."""

import dataclasses
import json

import pytest
import synthetic

from cosmos_jax import flops, metrics
from cosmos_jax.config import ModelConfig, VisionConfig

NANO = ModelConfig()
SUPER = ModelConfig(layers=64, hidden=5120, heads=64, mlp=25600)
EDGE = ModelConfig(layers=28, hidden=2048, heads=16, mlp=9216, mlp_act="relu2", qk_norm_und=False)


def record(path, start, steps, every=1, loss=1.0):
    with metrics.Recorder(path, 10, start, every) as recorder:
        for step in range(start + 1, steps + 1):
            values = {"loss": loss, "loss/sigma_0": float("nan"), "finite": True}
            recorder.log(step, values, tokens=100, flops=10**9, waited=0.0)


def test_rows_and_rates(tmp_path, capsys):
    record(tmp_path, 0, 10, every=5)
    rows = metrics.read(tmp_path)
    assert [r["step"] for r in rows] == [5, 10]
    assert rows[0]["tokens_per_second"] > 0 and rows[0]["model_tflops"] > 0 and "loss/sigma_0" not in rows[0]
    assert "step 10/10 · loss 1.0000" in capsys.readouterr().out


def test_resuming_truncates_the_rows_that_will_come_again(tmp_path):
    record(tmp_path, 0, 6, loss=1.0)
    with (tmp_path / metrics.FILE).open("a") as f:
        f.write('{"step": 7, "lo')  # killed while writing
    assert len(metrics.read(tmp_path)) == 6
    record(tmp_path, 4, 8, loss=2.0)
    assert [(r["step"], r["loss"]) for r in metrics.read(tmp_path)] == [(s, 1.0 + (s > 4)) for s in range(1, 9)]
    assert all(json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines())


def test_tensorboard_is_optional_and_works(tmp_path):
    with metrics.Recorder(tmp_path, 1, 0, 1, tensorboard=True) as recorder:
        recorder.log(1, {"loss": 1.0}, 1, 1, 0.0)
    assert list((tmp_path / "tensorboard").iterdir())


# Published table for two guidance branches, 2 × 2676 und tokens (spec flops.md): gen matmuls and gen attention, TFLOP.
@pytest.mark.parametrize(
    ("cfg", "gen", "matmul", "attention"),
    [
        (NANO, 2880, 80.0, 18.9), (NANO, 18720, 520.1, 472.5), (NANO, 44160, 1226.9, 2439.8),
        (SUPER, 2880, 359.5, 67.1), (SUPER, 44160, 5512.2, 8674.8),
        (EDGE, 2880, 16.2, 7.3), (EDGE, 44160, 248.9, 948.8),
    ],
)  # fmt: skip
def test_flops_of_the_released_models(cfg, gen, matmul, attention):
    counts = flops.Counts(und=2676, gen=gen, gen_pairs=gen * (gen + 2676), und_pairs=2676 * 2677 // 2)
    parts = flops.forward(cfg, counts)
    assert 2 * parts["gen"] / 1e12 == pytest.approx(matmul, abs=0.06)
    assert 2 * parts["gen_attention"] / 1e12 == pytest.approx(attention, rel=0.01)


def test_counts_of_a_batch():
    batch = synthetic.batch(0)
    n = flops.count(batch)
    assert n.und == (batch["und_segment_ids"] >= 0).sum() and n.gen == n.vision + n.action + n.sound
    pairs = 0
    for und, gen in zip(batch["und_segment_ids"], batch["gen_segment_ids"], strict=True):
        pairs += sum((gen == s).sum() * ((und == s).sum() + (gen == s).sum()) for s in (0, 1))
    assert n.gen_pairs == pairs and n.segments == 16 and n.vit == n.vit_pairs == 0


def test_what_training_adds():
    n = flops.Counts(und=10, gen=20, und_pairs=55, gen_pairs=600, text=5, vit=8, vit_pairs=64)
    cfg = dataclasses.replace(NANO, remat="full", vision=VisionConfig())
    parts = flops.forward(cfg, n)
    assert flops.train_step(cfg, n) == 3 * sum(parts.values())
    und = parts["und"] + parts["und_attention"] + parts["vit"] + parts["vit_attention"]
    assert flops.train_step(cfg, n, train_und=False) == 3 * sum(parts.values()) - 2 * und
    layers = parts["und"] + parts["gen"] + sum(v for k, v in parts.items() if k.endswith("attention"))
    assert flops.train_step(cfg, n, remat=True) == 3 * sum(parts.values()) + layers
