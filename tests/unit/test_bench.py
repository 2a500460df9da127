"""`bench generate` at tiny sizes: the code that measures, not what it measures. No test here looks at a clock."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from cosmos_jax import bench, flops
from cosmos_jax.__main__ import main
from cosmos_jax.bench import ours, published, scaling, table, versus, work
from cosmos_jax.cli import options
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.config import Config, ConfigError, ModelConfig
from cosmos_jax.precision import Precision

TINY = ModelConfig(
    name="tiny", layers=2, hidden=48, heads=4, kv_heads=1, head_dim=16, mlp=80, rope_sections=(4, 2, 2), vocab=64,
    latent_channels=8, action_dim=0, sound_dim=0,
)  # fmt: skip
WAN = WanConfig(4, 4, 8, (1,), 1, (), 2, (0.1,) * 8, (0.9,) * 8)
TEXTS = (29, 41)
SIZES = {"clip": work.Size("text2video", 3, 5, 6, "tiny"), "image": work.Size("text2image", 1, 4, 6, "tiny")}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    monkeypatch.setattr(work, "SIZES", work.SIZES | SIZES)
    monkeypatch.setattr(ours, "peak", lambda *_: 1e9)  # not a second of matmuls in a test


def finite(row):
    return all(math.isfinite(x) for x in row.values() if isinstance(x, float))


def printed(kind, result):
    console = Console(width=200, record=True)
    table.show(kind, result, console)
    return console.export_text()


def test_operations_are_the_published_ones():
    """Nano with both branches, TFLOP: what the published table has for 2 × 2,676 text tokens."""
    nano = ModelConfig()
    want = {"256p": (80.0, 18.9), "480p": (520.1, 472.5), "720p": (1226.9, 2439.8)}
    for name, (linear, attention) in want.items():
        tokens = work.SIZES[name].tokens(nano)
        read, step = flops.denoising(nano, (2676, 2676), tokens)
        assert step["gen"] / 1e12 == pytest.approx(linear, abs=0.06)
        assert step["gen_attention"] / 1e12 == pytest.approx(attention, abs=0.06)
        assert sum(read.values()) / 1e12 == pytest.approx(78.9, abs=0.5)
        assert step["und"] == step["und_attention"] == read["gen"] == 0
    assert [work.SIZES[n].tokens(nano) for n in ("256p", "480p", "720p", "t2i")] == [2880, 18720, 44160, 920]
    assert sum(work.TEXTS) == 2 * 2676


def test_the_job_is_what_it_says():
    job = work.job(TINY, SIZES["clip"], TEXTS)
    lengths = [(b["und_segment_ids"] >= 0).sum() for b in (job.batch, job.uncond)]
    assert lengths == list(TEXTS)
    assert (job.batch["vision_index"] >= 0).sum() == SIZES["clip"].tokens(TINY) == 27
    assert job.schedule.steps == 35 and job.guidance.text == 6.0
    assert job.batch["und_ids"].max() < TINY.vocab


def test_against_diffusers_the_outputs_agree():
    said: list[str] = []
    result = versus.run(["clip", "image"], TINY, TEXTS, repeat=1, say=said.append)
    assert "clip: attention: xla (auto on cpu), all 27 × 68 scores of a head at once" in said
    for row, steps in zip(result["rows"], (35, 50), strict=True):
        assert finite(row) and row["steps"] == steps
        assert max(row["velocity_rel"]) <= 5e-6 and row["latents_rel"] <= 5e-6
        assert row["amortised_s"] == pytest.approx(row["step_s"] + row["prefill_s"] / steps)
        assert row["diffusers_tflop"] > row["tflop"]  # it reads the captions in every step
    assert {"jax_threads", "torch_threads"} <= set(result["machine"])
    assert "clip" in printed("versus", result)


def test_a_wrong_output_is_not_timed(monkeypatch):
    """Nothing fast and wrong is reported."""
    monkeypatch.setattr(versus, "VELOCITY", 1e-9)
    with pytest.raises(RuntimeError, match="speed means nothing"):
        versus.run(["clip"], TINY, TEXTS, repeat=1, say=lambda _: None)


def test_scaling_compares_with_the_operation_count():
    result = scaling.run(["clip", "image"], TINY, TEXTS, repeat=1, say=lambda _: None)
    for row in result["rows"]:
        assert finite(row) and 0 < row["attention_share"] < 1
        assert row["tflop"] * 1e12 == sum(flops.denoising(TINY, TEXTS, row["tokens"])[1].values())
        assert row["wall_tflops"] == pytest.approx(row["tflop"] / row["wall_s"])
    for unit in ("wall", "cpu"):  # deviations are from the (geometric) mean of all rates
        assert np.sum([np.log1p(r[f"{unit}_deviation"]) for r in result["rows"]]) == pytest.approx(0, abs=1e-9)
    assert "clip" in printed("scaling", result)


def test_the_table_of_published_sizes_runs_anywhere(tmp_path):
    """The same code as on an accelerator, with another model, VAE and dtype."""
    result = published.run(TINY, ["image"], TEXTS, WAN, Precision(), say=lambda _: None)
    (row,) = result["rows"]
    assert finite(row) and row["vllm_omni_s"] is None
    assert (row["steps"], row["shift"], row["guidance"]) == (50, 3.0, 4.0)
    assert row["total_s"] == pytest.approx(row["prefill_s"] + row["denoise_s"] + row["decode_s"])
    read, step = (sum(x.values()) for x in flops.denoising(TINY, TEXTS, row["tokens"]))
    assert row["tflop"] * 1e12 == pytest.approx(read + row["steps"] * step)
    assert "–" in printed("published", result)
    assert json.loads(table.write("published", result, tmp_path / "new").read_text()) == result


def test_what_does_not_fit_is_refused_before_weights_are_made(monkeypatch):
    monkeypatch.setattr(ours, "random", lambda *_: pytest.fail("weights were made"))
    with pytest.raises(ConfigError, match=r"bench generate, clip \(tiny\): .* needs .* more than the 0.00 GiB"):
        published.run(TINY, ["clip"], TEXTS, WAN, Precision(), free=1000, say=lambda _: None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "needs one of --reference=diffusers, --scaling and --accelerator"),
        ("--scaling --accelerator", "needs one of"),
        ("--scaling --shape=25p", "did you mean '256p'"),
        ("--scaling --repeat=0", "must be at least 1"),
        ("--reference=torch", "invalid choice: 'torch'"),
        ("--scaling --out=README.md", "is a file"),
    ],
)
def test_mistakes_are_one_sentence(words, says, capsys):
    assert main(["bench", "generate", *words.split()]) == 2
    assert says in capsys.readouterr().err


def test_options_reach_the_bench(monkeypatch, tmp_path, capsys):
    """`bench generate --scaling`: what is asked for is run, shown and written."""
    row = dict.fromkeys(("tokens", "tflop", "attention_share", "wall_s", "cpu_s", "wall_tflops", "cpu_tflops"), 1.0)
    row |= {"size": "256p", "wall_deviation": 0.0, "cpu_deviation": 0.0}
    seen = []

    def run(names, repeat):
        seen.append((tuple(names), repeat))
        return {"machine": {"jax_peak": 3e11}, "rows": [row]}

    monkeypatch.setattr(scaling, "run", run)
    o = options.parse(["bench", "generate", "--scaling", "--shape=256p,480p", "--repeat=2", f"--out={tmp_path}"])
    bench.prepare(o, Config(model=TINY))()
    assert seen == [(("256p", "480p"), 2)]
    assert "300 GFLOP/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "generate-scaling.json").read_text())["rows"] == [row]
