"""Every second of a run belongs to one part, and steps that were taken again are not counted as good."""

import json
import time

import pytest

from cosmos_jax import goodput


def rows(path, *lines):
    (path / goodput.FILE).write_text("".join(json.dumps(x) + "\n" for x in lines))


def line(at, first, last, **seconds):
    return {"time": at, "from": first, "to": last, "seconds": seconds}


def test_steps_after_the_restored_one_are_lost(tmp_path):
    rows(
        tmp_path,
        {"start": 1010.0, "step": 0, "before": 10.0},
        line(1040.0, 0, 10, compile=10.0, data=2.0, step=18.0),
        line(1060.0, 10, 20, data=0.0, step=20.0),  # saved at 15: half of it is taken again
        {"start": 1100.0, "step": 15, "before": 5.0},
        line(1120.0, 15, 20, compile=5.0, step=13.0, save=2.0),
    )
    spent = goodput.account(tmp_path)
    assert spent.pop("wall") == 120.0 == sum(spent.values())
    want = dict(step=18 + 10 + 13, data=2, save=2, sample=0, compile=15, start=15, lost=10, down=35)
    assert spent == pytest.approx(want)


def test_a_second_crash_before_the_first_restore_counts_once(tmp_path):
    rows(
        tmp_path,
        {"start": 0.0, "step": 0, "before": 0.0},
        line(10.0, 0, 10, step=10.0),
        {"start": 10.0, "step": 8, "before": 0.0},
        {"start": 11.0, "step": 4, "before": 0.0},  # step 8 was damaged
        line(17.0, 4, 10, step=6.0),
    )
    spent = goodput.account(tmp_path)
    assert spent["lost"] == pytest.approx(6) and spent["step"] == pytest.approx(10) and spent["wall"] == 17


def test_the_clock_accounts_for_every_second(tmp_path):
    began = time.perf_counter()
    clock = goodput.Clock(tmp_path, 3, born=time.time())
    for name in ("data", "step", "save", "step"):
        clock.phase(name)
        time.sleep(0.01)
    assert set(clock.write(5)) == {"start", "data", "step", "save"}
    clock.close()
    took = time.perf_counter() - began
    with (tmp_path / goodput.FILE).open("a") as f:
        f.write('{"time": 12')  # killed while writing
    spent = goodput.account(tmp_path)
    assert 0.04 <= spent["wall"] <= took and spent["step"] >= 0.02
    assert sum(spent[p] for p in goodput.PARTS) == pytest.approx(spent["wall"])
    assert "goodput" in goodput.describe(spent)
    with pytest.raises(ValueError, match="'sleep' is not one of step, data"):
        clock.phase("sleep")


def test_no_lines_no_account(tmp_path):
    assert goodput.account(tmp_path) == {}
