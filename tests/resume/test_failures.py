"""What clusters do to a run, and what is left of it. Each run is a subprocess; nothing happened to that of `whole`."""

import json
import re
import signal
import time

import numpy as np
import pytest
import synthetic

from cosmos_jax import metrics
from cosmos_jax.checkpoint import complete, interrupted
from cosmos_jax.preemption import LATE
from cosmos_jax.watchdog import HUNG

STEPS = 8


def run(workdir, devices=1, **request):
    process = synthetic.start({"workdir": str(workdir), "train.steps": STEPS, **request}, devices)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def digest(out: str) -> str:
    return re.search(r"digest (\w+)", out).group(1)


def losses(workdir) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in metrics.read(workdir) if "loss" in row}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    code, out = run(workdir)
    assert code == 0, out
    return losses(workdir), digest(out)


def test_a_hang_a_dead_loader_and_a_full_disk_leave_no_trace(whole, tmp_path):
    """One run after the other in the same directory: it ends bit for bit where the untouched run ends."""
    directory = tmp_path / "checkpoints"
    hang = {"train.hang": 3.0, "train.hang_slow": 120.0, "train.on_hang": "abort"}
    code, out = run(tmp_path, loader={"hang": 3}, **hang)
    assert code == HUNG and complete(directory) == [2], out
    assert "WARNING: nothing has moved for" in out and "s in step 4; this process ends now" in out
    stacks = (tmp_path / "hang-0.txt").read_text()
    for text in (out, stacks):  # the line that hangs, in the thread that hangs
        assert "most recent call first" in text and re.search(r'synthetic.py", line \d+ in __next__', text)

    code, out = run(tmp_path, loader={"die": 5})
    assert code == 1 and "OSError: the loader's worker died" in out, out
    assert "OSError after step 5: saved" in out and complete(directory)[-1] == 5
    assert json.loads((directory / "5" / "data" / "data.json").read_text()) == {"next": 5}, "not a batch ahead"

    code, out = run(tmp_path, loader={"full": [5, 7]})  # step 6 cannot be saved, step 8 can
    assert "WARNING: step 6 is not saved" in out and "metrics.jsonl could not be written (File too large)" in out, out
    assert code == 0 and digest(out) == whole[1] and losses(tmp_path) == whole[0], out
    assert complete(directory)[-1] == 8 and 6 not in complete(directory) and not interrupted(directory)


def test_a_run_that_cannot_save_in_time_says_so_and_leaves(tmp_path):
    process = synthetic.start({"workdir": str(tmp_path), "train.grace": 1.5, "loader": {"hang": 3}})
    while not (tmp_path / "checkpoints" / "2").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(2.0)  # it hangs in the fourth batch now
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)  # it hangs for far longer
    assert process.returncode == LATE, out
    assert "SIGTERM, and 1.5 s (train.grace) were not enough: the last checkpoint is step 2" in out, out
    assert complete(tmp_path / "checkpoints") == [2]


def test_a_nan_on_one_of_eight_devices_is_skipped_by_all_and_half_of_them_go_on(tmp_path):
    """The parameters end bit for bit where those of a run end that never saw the batch; four devices continue."""
    skip = {"train.on_nonfinite": "skip", "optim.schedule": "constant"}
    code, out = run(tmp_path / "a", 8, loader={"poison": [3, 5]}, **skip | {"train.steps": 6})
    assert code == 0 and "WARNING: Step 4 gave loss nan" in out and "skipped (1 in a row)" in out, out
    code, never = run(tmp_path / "b", 8, loader={"leave_out": 3}, **skip | {"train.steps": 5})
    assert code == 0 and digest(never) == digest(out), never
    (event,) = json.loads((tmp_path / "a" / "bad_batch.json").read_text())["batches"]
    real = synthetic.batch(3)["segment_sample_id"].ravel().tolist()
    assert (event["step"], event["action"], event["processes"][0]["sample_ids"]) == (4, "skip", real)
    assert list(losses(tmp_path / "a")) == [1, 2, 3, 5, 6], "the row of step 4 has no loss"

    code, out = run(tmp_path / "a", 4, **skip)
    assert code == 0 and f"steps      6 → {STEPS}" in out and "fsdp 4" in out, out
    code, want = run(tmp_path / "c", 1, loader={"leave_out": 3}, **skip | {"train.steps": STEPS - 1})
    assert code == 0, want
    want = losses(tmp_path / "c")
    np.testing.assert_allclose(list(losses(tmp_path / "a").values()), list(want.values()), rtol=1e-5)
