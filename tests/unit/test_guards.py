"""What judges a finished step, and what speaks up when none finishes."""

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time

import pytest
import synthetic

from cosmos_jax import dist, metrics, saving
from cosmos_jax.checkpoint import CheckpointError
from cosmos_jax.codecs import toy
from cosmos_jax.config import TrainConfig
from cosmos_jax.nonfinite import BAD_BATCH, Guard, NonFiniteLoss
from cosmos_jax.watchdog import HUNG, Watchdog

GOOD = {"finite": True, "loss": 1.0, "grad_norm": 1.0}
BAD = {"finite": False, "loss": float("nan"), "grad_norm": float("inf")}
ROWS = {"sample_ids": [7, 8], "tasks": [0, 1]}


def test_skipping_ends_after_so_many_in_a_row(tmp_path):
    said: list[str] = []
    guard = Guard(TrainConfig(on_nonfinite="skip", skip_limit=2), tmp_path, said.append)
    for step, values in enumerate([BAD, BAD, GOOD, BAD, BAD], 1):
        guard.finite(step, values, ROWS)
    assert len(said) == 4 and "Step 5 gave loss nan and gradient norm inf: skipped (2 in a row)" in said[-1]
    with pytest.raises(
        NonFiniteLoss, match=r"Step 6 gave loss nan .* after 2 skipped ones: look at samples 7, 8 \(all"
    ):
        guard.finite(6, BAD, ROWS)
    batches = json.loads((tmp_path / BAD_BATCH).read_text())["batches"]
    assert [(b["step"], b["action"]) for b in batches] == [(s, "skip") for s in (1, 2, 4, 5)] + [(6, "stop")]
    assert batches[0]["processes"] == [{"process": 0, **ROWS}]


def test_a_loss_far_above_the_median_is_a_warning(tmp_path):
    said: list[str] = []
    guard = Guard(TrainConfig(spike=3.0, spike_window=16), tmp_path, said.append)
    assert not any(guard.spike(i, 1.0 + i % 3) for i in range(16)) and not said
    assert guard.spike(17, 8.0) == {"spike": 4.0} and "loss 8.0000 of step 17 is 4.0 times the median" in said[0]
    assert guard.spike(18, float("nan")) == {} and guard.spike(19, 5.9) == {}
    off = Guard(TrainConfig(spike=0.0), tmp_path, said.append)
    assert not any(off.spike(i, float(10**i)) for i in range(16)) and len(said) == 1


def test_a_spike_is_recorded_between_the_logged_steps(tmp_path):
    with metrics.Recorder(tmp_path, 100, 0, every=10) as recorder:
        recorder.log(3, {"loss": 9.0, "finite": True, "spike": 4.0}, 1, 1, 0.0, always=True)
        recorder.log(4, {"loss": 1.0, "finite": True}, 1, 1, 0.0)
    assert [(r["step"], r["spike"]) for r in metrics.read(tmp_path)] == [(3, 4.0)]


def test_only_the_first_process_writes_and_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dist, "first", lambda: False)
    with metrics.Recorder(tmp_path, 2, 0, 1, tensorboard=True) as recorder:
        recorder.say("hello")
        recorder.log(1, {"loss": 1.0}, 1, 1, 0.0)
        assert recorder.sync()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_rows_that_a_full_disk_refuses_come_later_and_none_is_torn(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = metrics.Rows(tmp_path / metrics.FILE, 0)
    rows.add({"step": 1, "loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))  # the second row fits in part
    try:
        rows.add({"step": 2, "loss": 2.0})
        assert not rows.sync() and "its rows wait in memory" in capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r["step"] for r in metrics.read(tmp_path)] == [1]
    rows.add({"step": 3, "loss": 3.0})
    assert rows.sync() and [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3]
    rows.close()


def test_the_watchdog_reports_again_and_falls_silent_when_things_move(tmp_path, capfd):
    with Watchdog(tmp_path, limit=1.0, slow=30.0) as watchdog:
        time.sleep(1.5)
        assert not capfd.readouterr().err, "the start may take longer"
        watchdog.beat("step 7")
        parked = threading.Event()
        threading.Thread(target=parked.wait, name="parked", daemon=True).start()
        said, deadline = "", time.monotonic() + 60
        while said.count("nothing has moved for") < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            said += capfd.readouterr().err
        parked.set()
        assert said.count("in step 7; still waiting") >= 2, said
        for _ in range(15):
            watchdog.beat("step 8")
            time.sleep(0.1)
        assert not capfd.readouterr().err
    stacks = (tmp_path / "hang-0.txt").read_text()
    assert "test_guards.py" in stacks and stacks.count("most recent call first") >= 3, "all threads"


def test_an_interpreter_that_hangs_is_ended_if_so_set(tmp_path):
    code = (
        "import pathlib, sys, time\nfrom cosmos_jax.watchdog import Watchdog\n"
        "with Watchdog(pathlib.Path(sys.argv[1]), 0.5, 0.5, abort=True) as w:\n    w.beat('step 3')\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=synthetic.environment(), capture_output=True, text=True, timeout=50)
    assert done.returncode == HUNG
    assert re.search("in step 3; this process ends now.*File", done.stderr, re.S)


def test_toy_assets_appear_whole(tmp_path, monkeypatch):
    """A fit that is killed while it saves leaves nothing that the next start would take for assets."""

    class Fitted:
        def save(self, directory):
            os.makedirs(directory)
            raise KeyboardInterrupt

    monkeypatch.setattr(toy.ToyAssets, "fit", lambda: Fitted())
    with pytest.raises(KeyboardInterrupt):
        toy.prepare(tmp_path)
    assert not (tmp_path / toy.DIRECTORY).exists()


def test_an_error_of_the_leading_process_is_that_of_all(monkeypatch):
    def fail():
        raise ValueError("the tokenizer is another one")

    with pytest.raises(ValueError, match="^the tokenizer is another one$"):
        dist.lead(fail)
    assert dist.lead(lambda: {"a": 1}) == {"a": 1}
    monkeypatch.setattr(dist, "first", lambda: False)
    monkeypatch.setattr(dist, "gather", lambda value: [{"error": "process 0: the tokenizer is another one"}, value])
    with pytest.raises(ValueError, match="process 0: the tokenizer"):
        dist.lead(fail)


def test_loader_states_of_several_processes_are_one_or_go_back_to_their_owners(monkeypatch):
    class Merging:
        merge = staticmethod(sum)

    assert saving._together(None, [3, 3]) == 3 == saving._own(3)
    assert saving._together(Merging(), [3, 4]) == 7
    kept = saving._together(None, [3, 4])
    monkeypatch.setattr(dist, "count", lambda: 2)
    monkeypatch.setattr(dist, "index", lambda: 1)
    assert saving._own(kept) == 4
    monkeypatch.setattr(dist, "count", lambda: 3)
    with pytest.raises(CheckpointError, match="the loader states of 2 processes, each with its own data, but 3 are"):
        saving._own(kept)
