"""What disks and people do to checkpoints is seen, named, and survived."""

import dataclasses
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from cosmos_jax import checkpoint, integrity, steps
from cosmos_jax.checkpoint import CheckpointError, Checkpoints, complete

CONFIG = synthetic.CONFIG


def small(step: int) -> dict:
    return {"params": {"w": jnp.arange(5000.0) + step}, "ema": {}, "opt": {}, "step": jnp.int32(step)}


WANT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0))


def save(directory, *numbers, keep=9, **settings):
    with Checkpoints(directory, keep, **settings) as checkpoints:
        for n in numbers:
            checkpoints.save(n, small(n), {"next": n}, CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save(directory, 2, 4)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def garbled(path):
    path.write_bytes(b"{" * path.stat().st_size)


DAMAGES = {
    truncated: "has .* bytes and not",
    flipped: "has another checksum",
    emptied: "has 0 bytes and not",
    garbled: "has another checksum",
}


@pytest.mark.parametrize(
    "harm", [truncated, flipped, emptied, garbled, None], ids=lambda f: getattr(f, "__name__", "missing")
)
def test_any_damage_to_any_file_is_named_and_the_step_before_is_used(saved, directory, capsys, harm):
    files = sorted(p.relative_to(saved / "4") for p in (saved / "4").rglob("*") if p.is_file())
    assert len(files) >= 12 and any("ocdbt.process_0/d" in str(f) for f in files)
    for name in files:
        path = directory / "4" / name
        if not path.stat().st_size and harm is not None:
            continue  # an empty file can only be lost
        harm(path) if harm else path.unlink()
        assert Checkpoints(directory).latest() == 2, name
        said = capsys.readouterr().err
        assert said.count("is skipped") == 1 and str(directory / "4") in said and name.as_posix() in said, said
        if name.name != integrity.NAME:
            assert steps.find(directory).name == "2"
            with pytest.raises(CheckpointError, match=f"{name.name} .*{DAMAGES[harm] if harm else 'is missing'}"):
                steps.find(directory, 4)
        shutil.copy2(saved / "4" / name, path)
        capsys.readouterr()
    assert Checkpoints(directory).latest() == 4 and not capsys.readouterr().err


def test_a_sound_step_is_restored_and_a_damaged_one_written_again(directory, capsys):
    flipped(next((directory / "4" / "state" / "ocdbt.process_0" / "d").iterdir()))
    with Checkpoints(directory, keep=2) as checkpoints:
        restored, data = checkpoints.restore(WANT)
        assert int(restored["step"]) == 2 and data == {"next": 2}
        np.testing.assert_array_equal(restored["params"]["w"], small(2)["params"]["w"])
        assert checkpoint.load_json(directory, "data") == {"next": 2}
        checkpoints.save(3, small(3), {"next": 3}, CONFIG)
        checkpoints.wait()
        assert complete(directory) == [2, 3, 4], "the damaged step counts for nothing"
        checkpoints.save(4, small(4), {"next": 4}, CONFIG)
    assert complete(directory) == [3, 4] and Checkpoints(directory).latest() == 4


def test_when_all_are_damaged_nothing_starts_afresh(directory, capsys):
    for n in (2, 4):
        emptied(directory / str(n) / "config" / "data.json")
    for ask in (Checkpoints(directory).latest, lambda: steps.find(directory)):
        with pytest.raises(CheckpointError, match="Every checkpoint in .* is damaged") as error:
            ask()
        step_4, step_2 = str(error.value).split("step ")[1:]
        assert step_4.startswith("4: config/data.json has 0 bytes") and "2: config/data.json has 0 bytes" in step_2
    assert not capsys.readouterr().err  # it is all in the one sentence


def test_a_step_from_before_checksums_is_read_and_called_unverified(directory, capsys):
    for n in (2, 4):
        (directory / str(n) / integrity.NAME).unlink()
        path = directory / str(n) / "_CHECKPOINT_METADATA"
        table = json.loads(path.read_text()) | {"custom_metadata": None}
        path.write_text(json.dumps(table))
    with Checkpoints(directory) as checkpoints:
        restored, _ = checkpoints.restore(WANT)
    assert int(restored["step"]) == 4
    assert f"{directory / '4'} is unverified: it was written without checksums" in capsys.readouterr().err
    (directory / "4" / "data" / "data.json").write_text("{")
    assert Checkpoints(directory).latest() == 2 and "data/data.json is unreadable" in capsys.readouterr().err


def test_the_last_few_and_every_nth_are_kept(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    assert complete(tmp_path) == [3, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "6", "7"]


def test_a_full_disk_costs_one_save(tmp_path, capsys):
    """A limit on the size of files stands for the disk: the same write fails, in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, small(2), {}, CONFIG)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            checkpoints.save(4, small(4), {}, CONFIG)
            with pytest.raises(CheckpointError, match="Step 4 could not be saved in .*; the last checkpoint is step 2"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "WARNING: Step 4 could not be saved" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["2"], "what it left is removed"
        checkpoints.save(6, small(6), {}, CONFIG)
    assert complete(tmp_path) == [2, 6] and Checkpoints(tmp_path).latest() == 6


def test_a_loader_state_that_is_not_json_is_raised_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, small(1), {"next": np.arange(2)}, CONFIG)
    assert complete(tmp_path) == []


def test_sums_of_random_files_find_every_flipped_bit_tried(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").write_bytes(rng.bytes(100_000))
    integrity.write(tmp_path)
    assert integrity.damage(tmp_path) is None
    good = (tmp_path / "a").read_bytes()
    for bit in rng.integers(0, 800_000, 50):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(bad)
        assert integrity.damage(tmp_path) == "a has another checksum than when it was written"
    assert integrity.damage(tmp_path, 1, 2) is None, "another process looks at it"


def test_settings_that_make_no_sense_are_refused():
    train = CONFIG.train
    for change, said in (
        ({"keep": 0}, "train.keep=0 must be at least 1"),
        ({"keep_every": 3}, "train.keep_every=3 must be a multiple of train.checkpoint_every=2"),
        ({"keep_every": -2}, "must not be negative"),
        ({"checkpoint_every": 0}, "train.checkpoint_every=0 must be at least 1"),
        ({"grace": 0.0}, "train.grace=0.0 must be positive"),
        ({"on_nonfinite": "zero"}, "train.on_nonfinite='zero' is not one of stop, skip"),
        ({"on_hang": "shrug"}, "train.on_hang='shrug' is not one of report, abort"),
        ({"skip_limit": 0}, "train.skip_limit=0 must be at least 1"),
        ({"spike": 0.5}, "train.spike=0.5 would warn of half of all steps"),
        ({"hang": -1.0}, "train.hang=-1.0 must not be negative"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(train, **change)
