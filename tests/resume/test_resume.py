"""A run that is killed, stopped or poisoned continues, or fails, exactly as promised. Each run is a subprocess."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest
import synthetic

from cosmos_jax import checkpoint, metrics, state
from cosmos_jax.checkpoint import CheckpointError, Checkpoints, complete, interrupted, load_params

STEPS = 8
TINY = synthetic.override(synthetic.CONFIG, {"train.steps": STEPS})


def run(workdir, **request):
    """Run to the end. Returns (return code, output)."""
    process = synthetic.start({"workdir": str(workdir), "train.steps": STEPS, **request})
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def stop_when(condition, workdir, sig):
    """Start a run and send it a signal as soon as `condition()` holds."""
    process = synthetic.start({"workdir": str(workdir), "train.steps": STEPS, "loader": {"pause": 0.15}})
    deadline = time.time() + 300
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.0005)
    process.send_signal(sig)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def digest(out: str) -> str:
    return re.search(r"digest (\w+)", out).group(1)


def losses(workdir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics.read(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    code, out = run(workdir)
    assert code == 0, out
    assert [s for s, _ in losses(workdir)] == list(range(1, STEPS + 1))
    return workdir, digest(out)


@pytest.mark.parametrize("moment", ["after_commit", "while_writing", "before_rename"])
def test_a_killed_run_resumes_bit_exactly(whole, tmp_path, moment):
    directory = tmp_path / "checkpoints"
    if moment == "before_rename":
        code, out = run(tmp_path, die_before_commit=4)
        assert interrupted(directory) and complete(directory) == [2]
    else:
        names = ["4"] if moment == "after_commit" else ["4.writing.orbax-checkpoint-tmp", "4"]
        code, out = stop_when(lambda: any((directory / n).exists() for n in names), tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL, out
    last = complete(directory)[-1]
    code, out = run(tmp_path)
    assert f"steps      {last} → {STEPS}" in out and last < STEPS, out
    assert code == 0 and digest(out) == whole[1], out
    assert losses(tmp_path) == losses(whole[0])
    assert not interrupted(directory)


def test_sigterm_saves_and_the_run_continues(whole, tmp_path):
    code, out = stop_when((tmp_path / "checkpoints" / "2").exists, tmp_path, signal.SIGTERM)
    assert code == 0 and "saved" in out and "digest" not in out, out
    code, out = run(tmp_path)
    assert code == 0 and digest(out) == whole[1], out
    assert losses(tmp_path) == losses(whole[0])


def test_a_poisoned_batch_stops_the_run_and_is_named(tmp_path):
    code, out = run(tmp_path, loader={"poison": [4, 0]})
    assert code == 1 and "NonFiniteLoss: Step 5 " in out, out
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    real = synthetic.batch(4)["segment_sample_id"].ravel().tolist()
    (event,) = bad["batches"]
    (rows,) = event["processes"]
    assert event["step"] == 5 and event["action"] == "stop" and rows["process"] == 0
    assert rows["sample_ids"] == real and len(rows["tasks"]) == len(real)
    assert str(real[0]) in out
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 4
        restored, data = checkpoints.restore(state.abstract(TINY), config=TINY)
    assert data == {"next": 4} and int(restored["step"]) == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored))
    code, out = run(tmp_path)  # the batch is sound now: the run goes on
    assert code == 0, out


def test_a_checkpoint_holds_everything(whole):
    directory = whole[0] / "checkpoints"
    assert complete(directory) == [6, 8]  # keep = 2
    with Checkpoints(directory) as checkpoints:
        restored, data = checkpoints.restore(state.abstract(TINY), config=TINY)
    assert synthetic.digest(restored) == whole[1] and data == {"next": STEPS}
    assert checkpoint.load_json(directory, "assets") == {"tokenizer": "synthetic"}
    assert checkpoint.load_config(directory) == TINY
    for which in ("ema", "params"):
        abstract = state.abstract_params(TINY.model, "bfloat16")
        loaded = load_params(directory, which, abstract, config=TINY)
        assert jax.tree.structure(loaded) == jax.tree.structure(restored["params"])
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(restored[which]), strict=True):
            np.testing.assert_array_equal(a, b.astype("bfloat16"))


def test_another_architecture_is_refused_by_name(whole):
    directory = whole[0] / "checkpoints"
    other = synthetic.override(TINY, {"model.layers": 3, "model.mlp": 96})
    with pytest.raises(CheckpointError, match=r"model\.layers=2, but model\.layers=3 is asked for; set the model"):
        Checkpoints(directory).restore(state.abstract(other), config=other)
    with pytest.raises(CheckpointError, match=r"params/layers/gen/attn/k is \(2, 32, 2, 8\).* but \(3, 32, 2, 8\)"):
        load_params(directory, "ema", state.abstract_params(other.model))
    code, out = run(whole[0], **{"model.layers": 3})
    assert code == 1 and "CheckpointError" in out and "model.layers=2" in out


def test_other_training_settings_are_refused_where_the_state_differs(whole):
    for change in ({"optim.frozen": ["layers/und"]}, {"optim.name": "muon"}):
        other = synthetic.override(TINY, change)
        with pytest.raises(CheckpointError, match="set optim.name, optim.trainable, .* as in the checkpoint"):
            Checkpoints(whole[0] / "checkpoints").restore(state.abstract(other), config=other)


def test_absent_and_interrupted_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        load_params(tmp_path, "ema", {})
    (tmp_path / "9.writing.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).latest() is None
    with pytest.raises(CheckpointError, match=r"interrupted: 9\.writing\.orbax-checkpoint-tmp"):
        Checkpoints(tmp_path).restore({}, config=None)
    (tmp_path / "12").mkdir()  # copied by hand, cut short: not a reason to start afresh
    for ask in (Checkpoints(tmp_path).latest, lambda: Checkpoints(tmp_path).restore({}, config=None)):
        with pytest.raises(CheckpointError, match=r"Every checkpoint in .* is damaged \(step 12: .* is missing\)"):
            ask()


def test_averages_of_a_run_with_frozen_parameters(tmp_path):
    """Frozen parameters have neither moments nor an average; loading the average fills them in."""
    config = synthetic.override(TINY, {"optim.frozen": ["layers/und", "embed_tokens"]})
    current = state.init(config)
    assert "und" not in current["ema"]["layers"] and "und" not in current["opt"][1].mu["layers"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, current, {}, config)
    loaded = load_params(tmp_path, "ema", state.abstract_params(config.model))
    assert synthetic.digest(loaded) == synthetic.digest(current["params"])
