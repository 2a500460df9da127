"""The comparison with PyTorch: every row of the tiny Nano and Edge passes, and a mistake of ours is named.

Each test of a mistake changes our side only: the parameters, the config, the batch, or a scheduler's file.
"""

import dataclasses
import functools
import json

import diffusers
import jax
import numpy as np
import pytest

from conversion import folder
from cosmos_jax import parity
from cosmos_jax.__main__ import main
from cosmos_jax.parity import denoise, pipeline_cases, reference, report, rows, run, schedule, sound, tiny, transformer
from cosmos_jax.parity.rows import BFLOAT16

PARTS = {
    "nano": [
        "positions and layout",
        "transformer",
        "gradients",
        "scheduler",
        "denoising",
        "video VAE",
        "sound tokeniser",
        "reasoner",
        "pipeline",
    ]
}
PARTS["edge"] = [part for part in PARTS["nano"] if part != "sound tokeniser"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family → its folder in the layout of a released repository."""

    @functools.cache
    def make(family):
        return tiny.write(tmp_path_factory.mktemp(family), family)[0]

    return make


@pytest.fixture(scope="module")
def golden(checkpoint):
    """(what PyTorch says of the tiny Nano's transformer, our parameters, our config)."""
    part = folder.open_folder(checkpoint("nano")).components["transformer"]
    load = reference.pretrained(diffusers.Cosmos3OmniTransformer, checkpoint("nano") / "transformer")
    cfg = dataclasses.replace(part.config, vision=None)
    return transformer.golden(load), part.load(), cfg


@pytest.mark.parametrize("family", ["nano", "edge"])
def test_every_row_passes(family, checkpoint, tmp_path, capsys, monkeypatch):
    cases = pipeline_cases.cases  # one request stands for all: test_pipeline_ours.py has them
    monkeypatch.setattr(pipeline_cases, "cases", lambda facts: [c for c in cases(facts) if c.name == "t2i"])
    assert main(["parity", f"--reference={checkpoint(family)}", f"--out={tmp_path}", "--what=all"]) == 0
    said = json.loads((tmp_path / "rows.json").read_text())
    assert said["passed"] and said["first_divergence"] is None
    found = said["rows"]
    assert list(dict.fromkeys(r["component"] for r in found)) == PARTS[family]
    assert all(r["verdict"] == "pass" for r in found) and f"All {len(found)} rows pass." in capsys.readouterr().out
    # it compared something: errors are neither zero nor far from the noise floor
    whole = [r for r in found if r["floor_from"] == "measured" and r["rel"] > 0]
    assert len(whole) > 100 and all(r["rel"] < 4 * r["floor"] + 2e-7 for r in whole)
    page, text = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    for name in PARTS[family]:
        assert f">{name}<" in page and f"## {name}\n" in text
    assert page.count("<svg") > 10 and "http" not in page.split("</style>", 1)[1].replace("http://www.w3.org", "")
    assert "noise floor" in page
    assert said["facts"]["versions"]["torch"] in page


def test_depths_of_thresholds():
    at = {n: rows.by_depth(n) for n in (1, 3, 8, 28, 36, 64)}
    assert at[1] == at[3] == 2e-6 and at[8] == 4e-6 and at[36] == pytest.approx(6e-6)
    assert at[8] < at[28] < at[36] < at[64] < 7e-6


def test_a_wrong_weight_is_found_in_its_layer(golden):
    g, params, cfg = golden
    wrong = jax.tree.map(np.array, params)
    wrong["layers"]["gen"]["mlp"]["up"][1] *= 1.001
    found = transformer.layer_rows(g, wrong, cfg, transformer.FULL)
    assert rows.first_divergence(found).what == "gen: layer 1 alone"
    bad = {r.what for r in rows.failures(found)}
    assert bad == {"gen: layer 1 alone", "gen: after layer 1", "gen: after layer 2"}


def test_a_wrong_eps_is_found_by_the_probe(golden):
    g, params, cfg = golden
    small = transformer.shrunk(params, cfg)
    for factor, off in ((10, 5e-2), (0.1, 5e-3)):
        wrong = dataclasses.replace(cfg, norm_eps=factor * cfg.norm_eps)
        first = rows.first_divergence(transformer.layer_rows(g, small, wrong, transformer.PROBE))
        assert first.what == "und: layer 0 alone" and first.rel > off
    assert not rows.failures(transformer.layer_rows(g, params, wrong, transformer.FULL))  # nothing else would notice


def test_a_wrong_batch_is_found_before_the_layers(golden):
    g, params, cfg = golden

    def swapped(batch):
        return batch | {"gen_positions": batch["gen_positions"][:, [0, 2, 1]]}

    found = transformer.check(g, params, cfg, swapped)
    assert rows.failures(found)[0].what == "rotary cosines"
    assert rows.first_divergence(found).what == "gen: layer 0 alone"


def test_a_wrong_flag_of_the_scheduler_is_found(checkpoint):
    config = json.loads((checkpoint("nano") / "scheduler" / "scheduler_config.json").read_text())
    right = schedule.golden(config, {})
    assert not rows.failures(schedule.check(right))
    wrong, _ = schedule.ours(config | {"use_karras_sigmas": False}, {})
    assert [r.what for r in rows.failures(schedule.check(right, wrong))][:2] == ["sigmas", "timesteps"]
    order, _ = schedule.ours(config | {"solver_order": 1}, {})
    first = rows.first_divergence(schedule.check(right, order))
    assert first.what.endswith("recorded velocities") and 1 <= first.index < 10  # the first steps are very short


def test_a_wrong_guidance_is_found_in_the_first_step(checkpoint, golden, monkeypatch):
    monkeypatch.setattr(schedule, "STEPS", 5)
    _, params, cfg = golden
    path = checkpoint("nano")
    config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    load = reference.pretrained(diffusers.Cosmos3OmniTransformer, path / "transformer")
    g = denoise.golden(load, config | {"use_karras_sigmas": False, "flow_shift": 10.0}, {})
    found = denoise.check(dataclasses.replace(g, guidance=5.9), params, cfg)
    assert rows.first_divergence(found).part == "next latents" and not rows.failures(
        r for r in found if r.part == "velocity"
    )


def test_a_wrong_stage_of_a_codec_is_found(checkpoint):
    part = folder.open_folder(checkpoint("nano")).components["sound_tokenizer"]
    path = checkpoint("nano") / "sound_tokenizer"
    g = sound.golden(reference.pretrained(diffusers.Cosmos3AVAEAudioTokenizer, path))
    wrong = jax.tree.map(np.array, part.load())
    wrong["decoder"]["block_1"]["residual_3"]["conv_1"]["bias"] *= 1.01
    assert rows.first_divergence(sound.stage_rows(g, wrong, part.config, "decode")).what == "block_1 alone"


def test_a_bfloat16_row_compares_with_pytorchs_own_error():
    truth = np.ones(4)
    for ours, passed in ((1.010, True), (1.012, True), (1.013, False), (np.nan, False)):
        row = rows.half(("c", BFLOAT16, "w"), truth * ours, truth * 1.01, truth)
        assert row.passed is passed, ours


def test_a_nan_fails_and_can_be_drawn(tmp_path):
    good = rows.compare(("c", "p", "good"), np.ones(4), np.ones(4) + 1e-7, 2e-6)
    bad = rows.compare(("c", "p", "bad"), np.full(4, np.nan), np.ones(4), 2e-6)
    assert good.passed and not bad.passed and bad.share == np.inf
    facts = run.describe(folder.Folder(tmp_path, "diffusers", {}, {}))
    report.write(run.Result([good, bad], facts), tmp_path)
    assert json.loads((tmp_path / "rows.json").read_text())["first_divergence"]["what"] == "bad"
    assert "1 of 2 rows FAIL. First divergence: c, p: bad" in (tmp_path / "report.md").read_text()


def test_a_failing_row_is_exit_code_1(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "TABLES", 1e-12)
    path = checkpoint("nano") / "transformer"
    assert main(["parity", f"--reference={path}", f"--out={tmp_path}"]) == 1
    assert "rows FAIL. First divergence: transformer, tables: rotary cosines" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "FAIL" in page and "The folder has no scheduler" in page


def sentence(capsys, *words):
    assert main(["parity", *words]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out
    return err


def test_mistakes_are_one_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    good, out = f"--reference={checkpoint('nano')}", f"--out={tmp_path / 'out'}"
    assert "parity needs --reference" in sentence(capsys, out)
    assert "parity needs --out" in sentence(capsys, good)
    assert "does not exist" in sentence(capsys, f"--reference={tmp_path / 'nowhere'}", out)
    assert "is no checkpoint that is known" in sentence(capsys, f"--reference={tmp_path / 'empty'}", out)
    assert "is a file" in sentence(capsys, good, f"--out={tmp_path / 'file'}")
    alone = f"--reference={checkpoint('nano') / 'transformer'}"
    lacks = "is no whole pipeline, it lacks vae, scheduler, text_tokenizer"
    assert lacks in sentence(capsys, alone, out, "--what=pipeline")
    assert "choice: 'some'" in sentence(capsys, good, out, "--what=some")
    monkeypatch.setattr(parity, "NEEDED", ("torch", "no_such_library"))
    assert "needs no_such_library, which is the reference; run: pip install" in sentence(capsys, good, out)
    assert not (tmp_path / "out").exists()
