"""One tiny folder and its compiled programs serve all tests of this directory; a batch of every mode runs once."""

import contextlib
import dataclasses
import gc
import json
import shutil
import types
import weakref
from unittest import mock

import engines
import jax
import numpy as np
import pytest

from conversion import folder
from cosmos_jax.__main__ import main
from cosmos_jax.codecs.avae import AVAECodec
from cosmos_jax.codecs.wan import WanCodec
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.parity import pipeline_cases, run, tiny

STEPS = 2
PICTURE = (100, 150)  # of all observations of actions, so that they share a canvas


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A PyTorch folder, Nano-like, with the files of the reasoner's processor at its top."""
    run.quiet()
    path = tiny.write(tmp_path_factory.mktemp("nano"), "nano")[0]
    shutil.copytree(path / "text_tokenizer", path, dirs_exist_ok=True)
    sees = {"patch_size": 4, "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 2048}}
    for kind, cls in (("image", "Qwen2VLImageProcessor"), ("video", "Qwen3VLVideoProcessor")):
        name = f"{'video_' * (kind == 'video')}preprocessor_config.json"
        (path / name).write_text(json.dumps({f"{kind}_processor_type": cls} | sees))
    return path


@pytest.fixture(scope="session")
def cases(checkpoint):
    """name → a request of every mode, of two steps."""
    facts = pipeline_cases.Facts.of(folder.open_folder(checkpoint))
    found = {c.name: c for c in pipeline_cases.cases(facts)}
    out = {n: dataclasses.replace(c, request=c.request | {"num_steps": STEPS}) for n, c in found.items()}
    for n, frames in (("forward_dynamics", 1), ("inverse_dynamics", 5)):
        out[n].media["clip.mp4"] = pipeline_cases.film(n, frames, *PICTURE)
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


def arrays(path):
    with np.load(path) as f:
        return dict(f)


def said(out):
    """run.json."""
    return json.loads((out / "run.json").read_text())


@pytest.fixture(scope="session")
def baseline(checkpoint, cases, tmp_path_factory):
    """A clip with sound from a picture, alone: files, latents after every step, run.json."""
    where = tmp_path_factory.mktemp("baseline")
    path = cases["i2v_sound_fps10"].write(where / "request")
    words = [f"--request={path}", f"--out={where / 'out'}", f"--dump-latents={where / 'out.npz'}"]
    assert main(["generate", f"--checkpoint={checkpoint}", *words]) == 0
    return types.SimpleNamespace(out=where / "out", arrays=arrays(where / "out.npz"), said=said(where / "out"))


MODES = (
    "t2i", "t2v", "i2v", "v2v", "t2v_sound", "s2v", "v2s", "policy", "forward_dynamics", "inverse_dynamics", "transfer",
    "i2i", "ask",
)  # fmt: skip


@pytest.fixture(scope="session")
def batch(checkpoint, cases, tmp_path_factory):
    """Every mode in one JSONL; `out`, and what the codecs and the loader of weights were asked."""
    where = tmp_path_factory.mktemp("batch")
    lines = [json.dumps(json.loads(cases[n].write(where / n).read_text())) for n in MODES]
    (where / "all.jsonl").write_text("\n".join(lines))
    words = [f"--request={where / 'all.jsonl'}", f"--out={where / 'out'}"]
    with watched() as seen:
        assert main(["generate", f"--checkpoint={checkpoint}", *words]) == 0
    yield types.SimpleNamespace(out=where / "out", seen=seen, where=where)
    shutil.rmtree(where)


@contextlib.contextmanager
def watched():
    """Shapes that the codecs get, and (weights that are loaded, those of other jobs that are alive then)."""
    seen = types.SimpleNamespace(encoded=[], decoded=[], heard=[], loaded=[])
    alive: dict[str, list] = {}
    load = Bundle.load

    def loading(self, job, *args, **kw):
        gc.collect()
        seen.loaded.append((job, [name for name, refs in alive.items() if any(r() is not None for r in refs)]))
        params = load(self, job, *args, **kw)
        alive[job] = [weakref.ref(x) for x in jax.tree.leaves(params)]
        return params

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Bundle, "load", loading))
        for cls, name, into in (
            (WanCodec, "encode", seen.encoded), (WanCodec, "decode", seen.decoded),
            (WanCodec, "decode_float", seen.decoded), (AVAECodec, "encode", seen.heard),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(cls, name, _recorded(getattr(cls, name), into)))
        yield seen


def _recorded(method, into):
    def called(self, x):
        into.append(x.shape)
        return method(self, x)

    return called
