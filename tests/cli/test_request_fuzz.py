"""Whatever is asked, the answer is a request that can run or one sentence; never a traceback."""

import collections
import json
import subprocess
import sys

import pytest

from data_pipelines import request_fuzz
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
