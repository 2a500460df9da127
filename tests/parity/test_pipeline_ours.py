"""The pipeline of `generate --request` equals PyTorch's, row by row; known mistakes, made in it, are named.

The errors of reference_parity.md §4.2 were measured at flow shift 10, guidance 6, 35 steps, with sound; so is this.
"""

import dataclasses
import functools
import json

import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversion import folder
from cosmos_jax.inference import job
from cosmos_jax.parity import denoise, pipeline, pipeline_cases, pipeline_ours, pipeline_reference, rows, run, tiny
from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import scheduler_config
from cosmos_jax.sampling.guidance import Guidance
from data_pipelines import conditioning, prompts
from data_pipelines.tokenizer import ChatTokenizer

LAST = pipeline_cases.LONG - 1
CASES = {
    "nano": (
        "t2i_sound", "i2v", "v2v_last", "t2v_sound", "policy", "forward_dynamics", "inverse_dynamics", "transfer",
        "transfer_weighted", "i2i", "s2v",
    ),
    "edge": ("t2v",),
    "distilled": ("i2v",),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tools():
    with engines.beside_torch():
        yield


def record(opened, names, short=True):
    """name → what was recorded. short: long runs are made as short, and guided as little, as the others."""
    cases = [c for c in pipeline_cases.cases(pipeline_cases.Facts.of(opened)) if c.name in names]
    like = {k: pipeline_cases.BASE[k] for k in ("num_steps", "guidance")}
    long = [short and c.request.get("num_steps") == pipeline_cases.LONG for c in cases]
    cases = [dataclasses.replace(c, request=c.request | like) if x else c for c, x in zip(cases, long, strict=True)]
    found = pipeline_reference.record_all(opened, cases, doubles=False, half=False)
    return {c.name: r for c, r in zip(cases, found, strict=True)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """family → (name → what was recorded, path of a request → ours)."""
    run.quiet()

    @functools.cache
    def make(family):
        opened = folder.open_folder(tiny.write(tmp_path_factory.mktemp(family), family)[0])
        return record(opened, CASES[family]), pipeline_ours.connect(opened, HIGHEST)

    return make


@pytest.mark.parametrize("family, name", [(f, n) for f in CASES for n in CASES[f]])
def test_every_row_passes(family, name, recorded, tmp_path):
    found, connect = recorded(family)
    r = found[name]
    said = pipeline.check(r, connect(r.case.write(tmp_path)), depth=3)
    assert not rows.failures(said), rows.first_divergence(said)
    own = {row.what.split(": ", 1)[-1]: row for row in said}
    assert own["token ids"].limit == own["sigmas"].limit == own["positions of vision"].limit == 0
    for m, noisy in r.traces[-1].noisy.items():
        if noisy.any():
            assert 1e-9 < own[f"{m}, all on our own"].rel < 1e-5  # it compared something, near the noise floor
        assert ("conditions" in own) == any(not x.all() for t in r.traces for x in t.noisy.values())
    assert ("pixels" in own) == (name != "inverse_dynamics") and ("wave" in own) == name.endswith("_sound")
    assert ("actions" in own) == (name in ("policy", "inverse_dynamics"))
    items = {"transfer": 2, "transfer_weighted": 2, "i2i": 1}  # of a transfer, one per chunk
    assert sum("clean item" in row.what for row in said) == items.get(name, 0)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """(what was recorded of 35 steps with sound, () → ours of the same request)."""
    path = tiny.write(tmp_path_factory.mktemp("long"), "nano")[0]
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_karras_sigmas": False, "flow_shift": 10.0}))
    opened = folder.open_folder(path)
    r = record(opened, ("t2v_sound",), short=False)["t2v_sound"]
    connect = pipeline_ours.connect(opened, HIGHEST)
    return r, functools.partial(connect, r.case.write(tmp_path_factory.mktemp("request")))


def text(monkeypatch, change):
    build = prompts.build
    monkeypatch.setattr(prompts, "build", lambda convention, task, prompt, negative, **kw: change(
        build(convention, task, prompt, negative, **kw), prompt, negative))  # fmt: skip


def scale(monkeypatch, by):
    monkeypatch.setattr(job, "Guidance", lambda s, *a, **kw: Guidance(by(s), *a, **kw))


def schedule(monkeypatch, table=None, index=None, after=lambda s: s):
    real = scheduler_config.of_checkpoint

    def wrong(found, told, steps):
        made, line = real(found | (table or {}), told | (index or {}), steps)
        return after(made), line

    monkeypatch.setattr(scheduler_config, "of_checkpoint", wrong)


def no_start(monkeypatch):
    ids = ChatTokenizer.generation_ids
    monkeypatch.setattr(ChatTokenizer, "generation_ids", lambda *a: ids(*a)[:-1])


TEXT, SIGMAS = "cond: token ids", "sigmas"
LATENTS = "step 0: vision: next latents"
MISTAKES = {  # mistake: (how to make it, first row that fails, published error at the end)
    "no vision_start": (no_start, TEXT, 0.31),
    "no system prompt": (lambda m: text(m, lambda made, *_: made._replace(system=None)), TEXT, 0.68),
    "no templates": (lambda m: text(m, lambda made, p, n: made._replace(positive=p, negative=n)), TEXT, 0.48),
    "float timestep": (
        lambda m: schedule(m, after=lambda s: s._replace(timesteps=s.sigmas[:-1].astype(np.float64) * 1000)),
        "timesteps", 1.2e-4,
    ),
    "Karras": (lambda m: schedule(m, {"use_karras_sigmas": True}), SIGMAS, 3.1e-2),
    "native grid": (lambda m: schedule(m, index={"use_native_flow_schedule": True}), SIGMAS, 2.2e-3),
    "no corrector": (lambda m: schedule(m, {"disable_corrector": list(range(35))}), "next latents", 6.3e-3),
    "order 1": (lambda m: schedule(m, {"solver_order": 1}), "next latents", 3.9e-2),
    "guidance 5.9": (lambda m: scale(m, lambda s: s - 0.1), LATENTS, 1.1e-2),
    # c + s(c − u) = u + (s + 1)(c − u), which needs no other program
    "cond + s(cond − uncond)": (lambda m: scale(m, lambda s: s + 1), LATENTS, 0.11),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_has_its_published_error(name, long, monkeypatch):
    make, first, published = MISTAKES[name]
    monkeypatch.setattr(job, "ROUND", 160)  # shorter texts share the programs of the whole ones
    make(monkeypatch)
    r, ours = long
    found = pipeline.check(r, ours(), depth=3)
    assert first in rows.first_divergence(found).what
    end = next(row.rel for row in found if row.what == f"step {LAST}: vision, all on our own")
    assert published / 4 < end < published * 4, end


def test_without_a_mistake_the_long_run_passes(long, monkeypatch):
    monkeypatch.setattr(job, "ROUND", 160)
    r, ours = long
    found = pipeline.check(r, ours(), depth=3)
    assert not rows.failures(found)
    end = next(row for row in found if row.what == f"step {LAST}: vision, all on our own")
    assert 1e-8 < end.rel < 3e-6 and end.limit == 5e-5


def test_latents_that_are_rounded_to_bfloat16_are_named(long, monkeypatch):
    monkeypatch.setattr(job, "ROUND", 160)
    real = denoise.step

    def rounded(*args):
        v, state = real(*args)
        return v, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state)

    monkeypatch.setattr(denoise, "step", rounded)
    r, ours = long
    found = pipeline.forced_rows(r, 0, ours(), depth=3)
    assert rows.first_divergence(found).what == LATENTS


def test_a_stretched_picture_is_named(recorded, tmp_path, monkeypatch):
    """The picture's shape is kept: it is scaled to cover the clip, and cut."""
    found, connect = recorded("nano")
    r = found["i2v"]
    monkeypatch.setattr(
        conditioning, "image", lambda x, h, w: conditioning.normalise(conditioning.stretch(x[None], h, w))
    )
    said = pipeline.check(r, connect(r.case.write(tmp_path)), depth=3)
    assert rows.first_divergence(said).what == "vision: conditions" and rows.first_divergence(said).rel > 0.1
