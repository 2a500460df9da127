"""`parity.pipeline` itself: what it says of ours (test_pipeline_ours.py), of what is missing, of whom it cannot ask."""

import dataclasses
import json

import engines
import numpy as np
import pytest

from conversion import folder
from cosmos_jax.__main__ import main
from cosmos_jax.parity import pipeline, pipeline_cases, pipeline_ours, pipeline_reference, rows, run, tiny
from cosmos_jax.precision import HIGHEST, Precision


@pytest.fixture(scope="module", autouse=True)
def tools():
    with engines.beside_torch():
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    run.quiet()
    return folder.open_folder(tiny.write(tmp_path_factory.mktemp("nano"), "nano")[0])


@pytest.fixture(scope="module")
def case():
    """A clip with sound, of a short run."""
    (found,) = (c for c in pipeline_cases.sound() if c.name == "t2v_sound")
    short = {k: pipeline_cases.BASE[k] for k in ("num_steps", "guidance")}
    return dataclasses.replace(found, request=found.request | short)


@pytest.fixture(scope="module")
def recorded(opened, case):
    return pipeline_reference.record(opened, case)


@pytest.fixture(scope="module")
def ours(opened, recorded, tmp_path_factory):
    """(what was recorded, () → ours of the same request)."""
    connect = pipeline_ours.connect(opened, HIGHEST)
    path = recorded.case.write(tmp_path_factory.mktemp("request"))
    return recorded, lambda: connect(path)


def test_short_runs_show_the_step_that_fails_first(ours):
    """Of ten steps one row remains per comparison, and it is a failing one if any fails."""
    r, make = ours
    t = r.traces[0]
    found = pipeline.forced_rows(r, 0, make(), 3)[:40]
    long = type("Long", (), {"timesteps": range(pipeline_cases.LONG)})
    assert pipeline.brief(found, long) is found and len(found) == 40
    kept = pipeline.brief(found, t)
    assert [row.what.split(": ", 1)[1] for row in kept] == [
        "vision velocity", "vision: next latents", "sound velocity", "sound: next latents"
    ]  # fmt: skip
    assert kept[0].rel == max(row.rel for row in found if row.what.endswith("vision velocity"))
    wrong = found[:8] + [dataclasses.replace(row, rel=1.0) for row in found[8:]]
    assert pipeline.brief(wrong, t)[0].what == "step 2: vision velocity"


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


def test_bfloat16_that_loses_more_fails(opened, recorded, tmp_path):
    """Ours sees latents that are off by 0.02, and so predicts velocities that are further off than PyTorch's."""
    connect = pipeline_ours.connect(opened, Precision("bfloat16", "highest"))

    class Rough:
        def __init__(self, path):
            self.own = connect(path)

        def forced(self, loop, latents, context, fresh):
            rough = [{m: x + 0.02 * np.sign(x) for m, x in at.items()} for at in latents]
            return self.own.forced(loop, rough, context, fresh)

    path = recorded.case.write(tmp_path)
    assert rows.failures(pipeline.half_rows([recorded], [Rough(path)]))


def test_the_command_compares_the_pipeline(opened, case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline_cases, "cases", lambda facts: [case])
    assert main(["parity", f"--reference={opened.path}", f"--out={tmp_path}", "--what=pipeline"]) == 0
    told = json.loads((tmp_path / "rows.json").read_text())
    found = {r["what"].split(": ")[-1]: r for r in told["rows"] if r["part"] == case.name}
    assert found["vision velocity"]["floor"] > 1e-8 and found["sigmas"]["limit"] == 0
    half = [r for r in told["rows"] if r["part"] == rows.BFLOAT16]
    assert len(half) == 2 and all(1e-3 < r["floor"] < 3e-2 for r in half)
    assert told["notes"] == [] and f"pipeline: {len(told['rows'])} rows, all pass" in capsys.readouterr().out


def test_what_is_no_whole_pipeline_is_a_sentence(opened, tmp_path, capsys):
    alone = opened.path / "transformer"
    assert main(["parity", f"--reference={alone}", f"--out={tmp_path}", "--what=pipeline"]) == 2
    assert "is no whole pipeline, it lacks vae, scheduler, text_tokenizer" in capsys.readouterr().err
