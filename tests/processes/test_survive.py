"""Two processes act as one: what one of them meets, both decide about in the same way."""

import json
import re
import signal
import time

import numpy as np
import pytest
import synthetic
from processes import cluster

from cosmos_jax import metrics
from cosmos_jax.checkpoint import complete

SETTINGS = {"train.on_nonfinite": "skip", "optim.schedule": "constant"}


def start(workdir, steps: int, processes: int, **loader):
    request = json.dumps({"workdir": str(workdir), "train.steps": steps, "loader": loader, **SETTINGS})
    return cluster.start(["tests/synthetic.py", request], processes, 1)


def losses(workdir) -> list[tuple[int, float]]:
    return [(int(row["step"]), row["loss"]) for row in metrics.read(workdir) if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the same batches."""
    workdir = tmp_path_factory.mktemp("alone")
    request = {"workdir": str(workdir), "train.steps": 10, "loader": {"poison": [2, 6]}, **SETTINGS}
    out, _ = synthetic.start(request).communicate(timeout=300)
    assert "digest" in out, out
    return losses(workdir)


def test_a_nan_and_a_sigterm_of_one_process_are_those_of_both_and_their_number_may_change(alone, tmp_path):
    directory = tmp_path / "checkpoints"
    running = start(tmp_path, 1000, 2, poison=[2, 6], pause=0.2)  # row 6 is the second process's
    deadline = time.time() + 240
    while not (directory / "4").exists() and time.time() < deadline and all(p.poll() is None for p in running):
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)  # the one that does not lead
    ended = cluster.finish(running)
    assert [code for code, _ in ended] == [0, 0], ended
    (_, first), (_, second) = ended

    stopped = int(re.search(r"Stopped by SIGTERM after step (\d+); saved", first).group(1))
    assert complete(directory)[-1] == stopped == metrics.read(tmp_path)[-1]["step"] and stopped >= 4
    assert "step " in first and "steps  " in first, "the first process speaks"
    assert not re.search(r"^(step|precision|steps) ", second, re.M), second
    (event,) = json.loads((tmp_path / "bad_batch.json").read_text())["batches"]
    ids = synthetic.batch(2)["segment_sample_id"]
    want = [{"process": i, "sample_ids": ids[4 * i : 4 * i + 4].ravel().tolist()} for i in (0, 1)]
    assert [{k: p[k] for k in ("process", "sample_ids")} for p in event["processes"]] == want and event["step"] == 3

    more = stopped + 2 - stopped % 2
    ((code, out),) = cluster.finish(start(tmp_path, more, 1))
    assert code == 0 and f"steps      {stopped} → {more}" in out, out
    ended = cluster.finish(start(tmp_path, more + 2, 2))
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"steps      {more} → {more + 2}" in ended[0][1]
    have, steps = losses(tmp_path), min(more + 2, 10)
    assert [s for s, _ in have][: steps - 1] == [s for s, _ in alone][: steps - 1]
    np.testing.assert_allclose([x for _, x in have][: steps - 1], [x for _, x in alone][: steps - 1], rtol=1e-5)
