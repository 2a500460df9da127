"""Two processes train as one, and one goes on where two stopped: the same losses, the same samples."""

import json

import pytest
from data import toy
from processes import cluster

from cosmos_jax import metrics
from cosmos_jax.checkpoint import load_json

SMALL = {
    "model.layers": 1, "model.hidden": 32, "model.heads": 2, "model.kv_heads": 2, "model.head_dim": 16, "model.mlp": 64,
    "model.rope_sections": "(4,2,2)", "model.vision": None, "model.remat": "none", "optim.name": "adamw",
    "optim.schedule": "constant", "optim.lr_scale": (), "optim.lr": 1e-3, "data.look_ahead": 8, "data.episodes": 200,
    "mesh.fsdp": 2,
    "data.mixture": "(('text2image',1.0),('policy',2.0),('text2video_sound',1.0),('image2video',1.0))",
    "train.log_every": 1, "train.checkpoint_every": 3, "train.sample_every": 0, "train.tensorboard": False,
}  # fmt: skip
BEFORE, AFTER = 3, 6


def words(workdir, steps: int, *more: str) -> list[str]:
    settings = [f"--config.{name}={value}" for name, value in (SMALL | {"train.steps": steps}).items()]
    return ["-m", "cosmos_jax", "train", "--config=configs/toy.py", f"--workdir={workdir}", *settings, *more]


def losses(workdir) -> dict[int, float]:
    rows = [(row["step"], row["loss"]) for row in metrics.read(workdir)]
    assert len(set(rows)) == len(dict(rows)), rows  # where each process writes a row, the rows agree
    return dict(rows)


def test_two_processes_train_as_one_and_one_goes_on(tmp_path):
    """2 processes × 1 device, then 1 process × 2 devices with a worker, against 1 process × 2 devices all the way."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for d in (whole, parts):
        toy.assets().save(d / "assets")
    two = cluster.start(words(parts, BEFORE, "--distributed"), processes=2, devices=1)
    (code, out), (other, quiet) = cluster.finish(two)
    assert (code, other) == (0, 0), out + quiet
    assert "2 of 4 rows" in out and "2 of 4 rows" not in quiet, out + quiet  # one process speaks for both
    assert losses(parts).keys() == set(range(1, BEFORE + 1))
    state = load_json(parts / "checkpoints", "data")
    assert list(state["rows"]) == ["0", "1", "2", "3"] and state["step"] == BEFORE

    runs = [words(d, AFTER, f"--config.data.workers={n}")[2:] for d, n in ((parts, 1), (whole, 0))]
    code = f"import sys; from cosmos_jax.__main__ import main; sys.exit(any([main(w) for w in {runs}]))"
    ((code, out),) = cluster.finish([cluster.alone(["-c", code], devices=2)])
    assert code == 0, out
    got, want = losses(parts), losses(whole)
    assert all(0.5 < row["packing"] <= 1 for row in metrics.read(parts))
    assert got.keys() == want.keys() == set(range(1, AFTER + 1))
    assert list(got.values()) == pytest.approx(list(want.values()), rel=1e-6)
    assert len(set(want.values())) == AFTER
    a, b = (load_json(d / "checkpoints", "data") for d in (parts, whole))
    assert json.dumps(a) == json.dumps(b)
