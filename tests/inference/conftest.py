"""One tiny folder and its compiled programs serve all tests of this directory; a batch of every mode runs once."""

import dataclasses
import json
import shutil
import types

import engines
import pytest
from inference import kit

from conversion import folder
from cosmos_jax.__main__ import main
from cosmos_jax.parity import pipeline_cases


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return kit.nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def cases(checkpoint):
    """name → a request of every mode, of two steps."""
    facts = pipeline_cases.Facts.of(folder.open_folder(checkpoint))
    found = {c.name: c for c in pipeline_cases.cases(facts)}
    out = {n: dataclasses.replace(c, request=c.request | {"num_steps": kit.STEPS}) for n, c in found.items()}
    for n, frames in (("forward_dynamics", 1), ("inverse_dynamics", 5)):
        out[n].media["clip.mp4"] = pipeline_cases.film(n, frames, *kit.PICTURE)
    question = {"model_mode": "reasoner", "prompt": "What is it?", "vision_path": "first.png", "max_new_tokens": 3}
    out["ask"] = pipeline_cases.Case("ask", question, media=out["policy"].media)
    return out


@pytest.fixture(scope="session", autouse=True)
def programs():
    with engines.shared():
        yield


@pytest.fixture
def generate(checkpoint, tmp_path):
    """(case, *words, request keys …) → exit code; files are in tmp_path/out, latents in tmp_path/out.npz."""

    def ask(case, *words, out="out", dump=True, where=checkpoint, **changed):
        path = dataclasses.replace(case, request=case.request | changed).write(tmp_path / "request")
        dumped = [f"--dump-latents={tmp_path / out}.npz"] if dump else []
        return main([
            "generate", f"--checkpoint={where}", f"--request={path}", f"--out={tmp_path / out}", *dumped, *words
        ])  # fmt: skip

    return ask


@pytest.fixture(scope="session")
def baseline(checkpoint, cases, tmp_path_factory):
    """A clip with sound from a picture, alone: files, latents after every step, run.json."""
    where = tmp_path_factory.mktemp("baseline")
    path = cases["i2v_sound_fps10"].write(where / "request")
    words = [f"--request={path}", f"--out={where / 'out'}", f"--dump-latents={where / 'out.npz'}"]
    assert main(["generate", f"--checkpoint={checkpoint}", *words]) == 0
    return types.SimpleNamespace(out=where / "out", arrays=kit.arrays(where / "out.npz"), said=kit.said(where / "out"))


@pytest.fixture(scope="session")
def batch(checkpoint, cases, tmp_path_factory):
    """Every mode in one JSONL; `out`, and what the codecs and the loader of weights were asked."""
    where = tmp_path_factory.mktemp("batch")
    lines = [json.dumps(json.loads(cases[n].write(where / n).read_text())) for n in kit.MODES]
    (where / "all.jsonl").write_text("\n".join(lines))
    words = [f"--request={where / 'all.jsonl'}", f"--out={where / 'out'}"]
    with kit.watched() as seen:
        assert main(["generate", f"--checkpoint={checkpoint}", *words]) == 0
    yield types.SimpleNamespace(out=where / "out", seen=seen, where=where)
    shutil.rmtree(where)
