"""Whatever is asked, the answer is a request that can run or one sentence; never a traceback."""

import collections
import json
import subprocess
import sys
import tracemalloc

import av
import pytest
from inference import kit

from cosmos_jax.__main__ import main
from cosmos_jax.cli import request as command
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.parity import pipeline_cases
from data_pipelines import canvas, request_fuzz
from data_pipelines.request_resolve import FAMILIES
from data_pipelines.request_values import RequestError


def test_2000_damaged_requests_run_or_are_refused_in_one_sentence(tmp_path):
    counts, _ = request_fuzz.run(2000, seed=0, root=tmp_path)  # raises for anything else, with the request
    assert sum(sum(c.values()) for c in counts.values()) == 2000
    assert set(counts) == set(request_fuzz.Fuzz(tmp_path / "names", 0).kinds)
    total = sum(counts.values(), collections.Counter())
    assert total["run"] > 200 and total["refused"] > 1000
    assert all(c["refused"] for c in counts.values())


@pytest.mark.parametrize("name", request_fuzz.TEMPLATES)
def test_undamaged_requests_run(name, tmp_path):
    request_fuzz.write_media(tmp_path)
    (tmp_path / "ask.json").write_text(json.dumps(request_fuzz.TEMPLATES[name]))
    assert request_fuzz.judge(tmp_path / "ask.json", FAMILIES["nano"], tmp_path / "good") == "run"


@pytest.mark.parametrize("words", ["two\nlines.", "no end", "x.json: one. Two.."])
def test_the_judge_accepts_one_sentence_only(words, tmp_path, monkeypatch):
    def refuse(*_):
        raise RequestError(words)

    monkeypatch.setattr(request_fuzz, "read", refuse)
    with pytest.raises(AssertionError, match="not one sentence"):
        request_fuzz.judge(tmp_path / "x.json", FAMILIES["nano"], None)


def test_the_command_prints_counts_and_the_slowest():
    command = [sys.executable, "-m", "data_pipelines.request_fuzz", "--count=30"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0].split() == ["damage", "run", "refused"] and out[-1].startswith("slowest: ") and len(out) == 18


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return kit.nano(tmp_path_factory.mktemp("nano"))


def generate(checkpoint, path, out, *words):
    return main(["generate", f"--checkpoint={checkpoint}", f"--request={path}", f"--out={out}", *words])


def sentence(capsys):
    """The only line on stderr, which is one sentence."""
    err = capsys.readouterr().err
    assert err.startswith("cosmos_jax: ") and err.endswith(".\n") and not err.endswith("..\n"), err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_300_damaged_requests_are_prepared_or_refused_by_the_command(checkpoint, tmp_path, capsys, monkeypatch):
    """Media are decoded in full here and the model's batches are packed; what could run is not run."""
    opened = Bundle.open(checkpoint)  # once: it would be most of the time
    monkeypatch.setattr(Bundle, "open", lambda _: opened)
    monkeypatch.setattr(command, "_work", lambda *_: None)
    root, out, largest = tmp_path / "root", tmp_path / "out", 0
    fuzz = request_fuzz.Fuzz(root, 2)
    codes = collections.Counter()
    for i in range(300):
        kind, path = fuzz.make(i)
        media = fuzz.random.choice([None, root / "good", root, root / "nowhere"])
        words = [f"--prompt-convention={fuzz.random.choice(canvas.CONVENTIONS)}"]
        tracemalloc.start()
        code = generate(checkpoint, path, out, *words, *([f"--media={media}"] if media else []))
        largest = max(largest, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        if code == 2:
            sentence(capsys)
        else:
            assert (code, capsys.readouterr().err) == (0, ""), (i, kind, path)
        assert not out.exists()
        codes[code] += 1
    assert codes[0] > 30 and codes[2] > 150
    assert largest < 1 << 30, "nothing is decoded or packed that was not asked for; the largest that runs holds 0.6 GiB"


def damaged(kind, where):
    """A film whose first frame alone is whole, though its header is; a sound whose header promises more."""
    if kind == "film":
        films = {"clip.mp4": pipeline_cases.film("clip", 13, 48, 80)}
        path = pipeline_cases.Case("film", {}, media=films).write(where).parent / "clip.mp4"
        with av.open(str(path)) as f:
            second = [p.pos for p in f.demux(f.streams.video[0])][1]
        data = bytearray(path.read_bytes())
        end = data.rindex(b"moov") - 4 if data.rindex(b"moov") > second else len(data)
        data[second:end] = bytes(end - second)
        path.write_bytes(data)
        return path
    request_fuzz.write_media(where)
    path = where / "good" / "sound.wav"
    path.write_bytes(path.read_bytes()[:3000])
    return path


@pytest.mark.parametrize("kind, request_", [
    ("film", {"model_mode": "video2video", "prompt": "go on", "vision_path": "HERE", "height": 48, "width": 80}),
    ("film", {"model_mode": "video2sound", "vision_path": "HERE", "height": 48, "width": 80, "num_frames": 13}),
    ("film", {"prompt": "a street", "depth": {"control_path": "HERE"}, "height": 48, "width": 80}),
    ("film", request_fuzz.ACTION | {"model_mode": "inverse_dynamics", "vision_path": "HERE", "action_chunk_size": 8}),
    ("film", {"model_mode": "reasoner", "prompt": "What is it?", "vision_path": "HERE"}),
    ("sound", {"model_mode": "audio_image2video", "sound_path": "HERE", "height": 48, "width": 80}),
])  # fmt: skip
def test_media_that_break_off_are_found_before_anything_is_made(
    kind, request_, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "_work", lambda *_: pytest.fail("it was not found"))
    path = damaged(kind, tmp_path / "media")
    (tmp_path / "ask.json").write_text(json.dumps(request_).replace("HERE", str(path)))
    assert generate(checkpoint, tmp_path / "ask.json", tmp_path / "out") == 2
    assert path.name in sentence(capsys) and not (tmp_path / "out").exists()
