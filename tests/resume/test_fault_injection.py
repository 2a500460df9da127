"""Killed again and again (tests/faults.py): eight minutes on two cores that had four times as much to do."""

import json
import subprocess
import sys

import pytest
import synthetic

KILLS = 36
RUN = "import json, pathlib, sys, faults; print(json.dumps(faults.{}))"


def forks(call: str, **environment: str) -> dict:
    """What a function of tests/faults.py returns, in a process that has no threads and no device yet."""
    env = synthetic.environment() | environment
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(call)], env=env, cwd=synthetic.ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path):
    """Losses after each kill, and at the end every bit of the state, are those of the run that was left alone."""
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}  # each start compiles nothing
    found = forks(f"main(pathlib.Path({str(tmp_path)!r}), {KILLS}, 0)", **cache)
    assert found["losses_equal"] and found["state_equal"], found
    assert sum(found["kills"].values()) == KILLS and set(found["kills"]) == {
        "start", "restore", "first step", "step", "save", "writing"
    }  # fmt: skip
    assert sorted(found["stood_at"]) == found["stood_at"] and len(set(found["stood_at"])) >= 5, found["stood_at"]
    steps = found["steps"]
    assert found["left"] == sorted(map(str, {*range(20, steps + 1, 20), steps - 2, steps})), "nothing else is left"


@pytest.mark.slow
def test_a_save_killed_before_any_of_its_file_operations_loses_at_most_itself(tmp_path):
    found = forks(f"every_operation(pathlib.Path({str(tmp_path)!r}))")
    assert found["operations"] >= 30 and set(found["stood_at"]) == {4, 6}, found
    assert found["stood_at"] == sorted(found["stood_at"]), "there is one moment at which the step exists"
