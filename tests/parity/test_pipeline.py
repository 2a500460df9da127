"""`parity.pipeline`: pieces of this project equal diffusers' pipelines, and every known mistake is named.

The errors of reference_parity.md §4.2 were measured at flow shift 10, guidance 6, 35 steps, with sound; so is this.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import torch
from parity import pipeline_pieces

from conversion import folder
from cosmos_jax import parity
from cosmos_jax.__main__ import main
from cosmos_jax.parity import pipeline, pipeline_cases, pipeline_reference, rows, run, tiny
from cosmos_jax.precision import Precision

SHIFTED = {"use_karras_sigmas": False, "flow_shift": 10.0}
LAST = pipeline_cases.LONG - 1
CASES = {"nano": ("i2v", "t2v_sound"), "edge": ("i2v",)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that PyTorch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """family → (its folder, what was recorded)."""
    run.quiet()

    @functools.cache
    def make(family):
        path = tiny.write(tmp_path_factory.mktemp(family), family)[0]
        if family == "nano":
            file = path / "scheduler" / "scheduler_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | SHIFTED))
        opened = folder.open_folder(path)
        cases = pipeline_cases.cases(pipeline_cases.Facts.of(opened))
        return opened, pipeline_reference.record_all(opened, [c for c in cases if c.name in CASES[family]])

    return make


@pytest.fixture(scope="module")
def ours(recorded, tmp_path_factory):
    """(what was recorded of t2v_sound, mistakes → ours of the same request)."""
    opened, found = recorded("nano")
    r = next(r for r in found if r.case.name == "t2v_sound")
    return r, functools.partial(pipeline_pieces.Checkpoint(opened), r.case.write(tmp_path_factory.mktemp("request")))


def check(r, made):
    with jax.default_matmul_precision("highest"):
        return pipeline.check(r, made, depth=3)


def error(found, what):
    return next(row.rel for row in found if row.what == what)


@pytest.mark.parametrize("family", CASES)
def test_every_row_passes(family, recorded):
    opened, found = recorded(family)
    with jax.default_matmul_precision("highest"):
        said = pipeline.compare(found, pipeline_pieces.connect, opened)
    assert not rows.failures(said)
    for name in CASES[family]:
        own = {row.what: row for row in said if row.part == name}
        assert own["cond: token ids"].limit == own["sigmas"].limit == own["uncond: positions of vision"].limit == 0
        last = own[f"step {LAST}: vision, all on our own"]
        assert 1e-8 < last.rel < 3e-6 and last.limit == 5e-5  # it compared something, and is near the noise floor
        assert own[f"step {LAST}: vision velocity"].floor > 1e-8
        assert own["pixels"].peak_limit == pytest.approx(own["pixels"].limit) and own["pixels"].limit < 0.02
        assert ("wave" in own) == (name == "t2v_sound")
        assert ("vision: conditions" in own) == (name == "i2v")
    half = [row for row in said if row.part == rows.BFLOAT16]
    assert len(half) == (2 if family == "nano" else 1) and all(1e-3 < row.floor < 3e-2 for row in half)


TEXT, SCHEDULE = "cond: token ids", "sigmas"
MISTAKES = {  # mistake: (what it is to `Pieces`, first divergence, published error at the end)
    "no vision_start": (dict(vision_start=False), TEXT, 0.31),
    "no system prompt": (dict(system=False), TEXT, 0.68),
    "no templates": (dict(templates=False), TEXT, 0.48),
    "float timestep": (dict(float_timestep=True), "timesteps", 1.2e-4),
    "Karras": (dict(scheduler=dict(use_karras_sigmas=True)), SCHEDULE, 3.1e-2),
    "native grid": (dict(native=True), SCHEDULE, 2.2e-3),
    "no corrector": (dict(scheduler=dict(disable_corrector=list(range(35)))), "next latents", 6.3e-3),
    "order 1": (dict(scheduler=dict(solver_order=1)), "next latents", 3.9e-2),
    "guidance 5.9": (dict(guidance=5.9), "step 0: vision: next latents", 1.1e-2),
    "cond + s(cond − uncond)": (
        dict(combine=lambda c, u, s: c + np.float32(s) * (c - u)),
        "step 0: vision: next",
        0.11,
    ),
    "bfloat16 latents": (dict(half_latents=True), "step 0: vision: next latents", 3.0e-2),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_has_its_published_error(name, ours):
    mistake, first, published = MISTAKES[name]
    r, make = ours
    found = check(r, make(**mistake))
    assert first in rows.first_divergence(found).what
    end = error(found, f"step {LAST}: vision, all on our own")
    assert published / 4 < end < published * 4, end


def test_short_runs_show_the_step_that_fails_first(ours):
    """Of ten steps one row remains per comparison, and it is a failing one if any fails."""
    r, make = ours
    t = r.traces[0]
    found = pipeline.forced_rows(r, 0, make(), 3)[:40]
    short = type("Short", (), {"timesteps": t.timesteps[:10]})
    assert pipeline.brief(found, t) is found
    kept = pipeline.brief(found, short)
    assert [row.what.split(": ", 1)[1] for row in kept] == [
        "vision velocity", "vision: next latents", "sound velocity", "sound: next latents"
    ]  # fmt: skip
    assert kept[0].rel == max(row.rel for row in found if row.what.endswith("vision velocity"))
    wrong = found[:8] + [dataclasses.replace(row, rel=1.0) for row in found[8:]]
    assert pipeline.brief(wrong, short)[0].what == "step 2: vision velocity"


def test_a_wrong_branch_embodiment_or_mask_is_named(ours):
    r, make = ours
    for change, first in (
        (lambda o: o.branches.pop("uncond"), "uncond: token ids"),
        (lambda o: o.noisy.update(vision=np.array([False, True, True])), "vision: what is noisy"),
        (lambda o: o.noisy.pop("sound"), "sound: what is noisy"),
    ):
        made = make()
        change(made)
        assert rows.first_divergence(pipeline.plan_rows(r, made)).what == first


def test_without_a_picture_or_a_sound_that_were_made_a_row_fails(ours):
    r, _ = ours
    empty = pipeline.Made([], [], None)
    assert [row.what for row in rows.failures(pipeline.media_rows(r, empty))] == ["pixels", "wave"]
    off = r.video.copy()
    off[0, 0, 0] += 1.5 / 255
    assert [row.what for row in rows.failures(pipeline.media_rows(r, pipeline.Made([], [], off, r.wave)))] == ["pixels"]


def test_bfloat16_that_loses_more_fails(recorded, tmp_path):
    """Ours sees latents that are off by 0.02, and so predicts velocities that are further off than PyTorch's."""
    opened, found = recorded("nano")
    connect = pipeline_pieces.connect(opened, Precision("bfloat16", "highest"))

    class Rough:
        def __init__(self, path):
            self.own = connect(path)

        def forced(self, loop, latents, context, fresh):
            rough = [{m: x + 0.02 * np.sign(x) for m, x in at.items()} for at in latents]
            return self.own.forced(loop, rough, context, fresh)

    path = found[0].case.write(tmp_path)
    assert rows.failures(pipeline.half_rows(found[:1], [Rough(path)]))


def test_the_command_compares_a_connected_pipeline(recorded, tmp_path, monkeypatch, capsys):
    opened, _ = recorded("nano")
    monkeypatch.setattr(parity, "pipeline_of_ours", lambda: pipeline_pieces.connect)
    monkeypatch.setattr(pipeline_cases, "cases", lambda facts: [c for c in pipeline_cases.vision() if c.name == "t2v"])
    assert main(["parity", f"--reference={opened.path}", f"--out={tmp_path}", "--what=pipeline"]) == 0
    said = json.loads((tmp_path / "rows.json").read_text())
    assert {(r["component"], r["part"]) for r in said["rows"]} == {("pipeline", "t2v"), ("pipeline", rows.BFLOAT16)}
    assert said["notes"] == [] and "pipeline: 15 rows, all pass" in capsys.readouterr().out


def test_what_is_no_whole_pipeline_is_a_sentence(recorded, tmp_path, monkeypatch, capsys):
    opened, _ = recorded("nano")
    monkeypatch.setattr(parity, "pipeline_of_ours", lambda: pipeline_pieces.connect)
    alone = opened.path / "transformer"
    assert main(["parity", f"--reference={alone}", f"--out={tmp_path}", "--what=pipeline"]) == 2
    assert "is no whole pipeline, it lacks vae, scheduler, text_tokenizer" in capsys.readouterr().err
