"""The loader's promises: one global batch for any number of hosts and workers, resumed to the bit, nothing skipped."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection

import numpy as np
import pytest
from data import broken, toy

from data_pipelines import loader as loaders
from data_pipelines import workers
from data_pipelines.job import Job
from data_pipelines.order import Kind, Order
from data_pipelines.schema import PAD
from data_pipelines.toy_world.stream import StreamSource

ROWS = toy.config().data.bucket.rows
DATA = dataclasses.replace(toy.config().data, episodes=60, look_ahead=8)


def make(rows=None, data=DATA, **more) -> loaders.Loader:
    what = loaders.toy(StreamSource(data.episodes), data, toy.spec(), toy.assets(), 1.0, 1.0)
    return loaders.Loader(*what, data.look_ahead, rows, **more)


def split(hosts: int) -> list[tuple[int, ...]]:
    return [tuple(r.tolist()) for r in np.split(np.arange(ROWS), hosts)]


def take(loader, batches: int) -> list[dict]:
    return [next(loader) for _ in range(batches)]


def same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def join(parts: list[list[dict]]) -> list[dict]:
    """The batches of several hosts, one after the other: the global batches."""
    return [{k: np.concatenate([p[k] for p in batch]) for k in batch[0]} for batch in zip(*parts, strict=True)]


def ids(batches: list[dict]) -> list[int]:
    return [int(i) for b in batches for i in b["segment_sample_id"].ravel() if i != PAD]


@pytest.fixture(scope="module")
def unbroken() -> list[dict]:
    """Nine global batches of one host."""
    return take(make(), 9)


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_hosts(unbroken, hosts):
    same(join([take(make(rows), 9) for rows in split(hosts)]), unbroken)


def test_rows_need_not_lie_side_by_side(unbroken):
    """What a mesh may ask of a process."""
    part = take(make((1, 3)), 2)
    for name in part[0]:
        np.testing.assert_array_equal(part[1][name], unbroken[1][name][[1, 3]])


def test_no_host_reads_a_sample_of_another(unbroken):
    read: list[list[int]] = []
    for rows in split(4):
        loader = make(rows)
        jobs, prepare = [], loader._workers._work
        loader._workers._work = lambda job, jobs=jobs, prepare=prepare: (jobs.append(job.sample_id), prepare(job))[1]
        packed = ids(take(loader, 9))
        read.append(jobs)
        assert set(packed) <= set(jobs) and len(jobs) == len(set(jobs))  # each once
        kinds = len(DATA.mixture)
        assert {(i // kinds) % ROWS for i in jobs} == set(rows)
    everything = [i for jobs in read for i in jobs]
    assert len(everything) == len(set(everything)) and set(ids(unbroken)) <= set(everything)


def test_a_restart_may_change_hosts_and_workers(unbroken):
    """2 hosts → 4 hosts → 1 host with 2 workers → 1 host, each continuing as if nothing had happened."""

    def run(layout: list[tuple[int, ...]], state: dict | None, batches: int, **more) -> tuple[list[dict], dict]:
        hosts = [loaders.Prefetch(make(rows, **more), 2) for rows in layout]
        if state:
            for h in hosts:
                h.set_state(state)
        parts = [take(h, batches) for h in hosts]
        merged = loaders.Loader.merge([h.get_state() for h in hosts])
        for h in hosts:
            h.close()
        return join(parts), json.loads(json.dumps(merged))

    done, state = run(split(2), None, 3)
    for layout, batches, more in ((split(4), 2, {}), (split(1), 2, dict(workers=2, ahead=2)), (split(1), 2, {})):
        some, state = run(layout, state, batches, **more)
        done += some
    same(done, unbroken)
    whole = make()
    take(whole, 9)
    assert state == whole.get_state()  # a function of the position alone: nothing of the layouts is left in it
    assert len(json.dumps(state)) < 400 * ROWS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(seed=5), "of data.seed 0, this run has 5"),
        (dict(in_step=not DATA.in_step), "of data.in_step"),
        (dict(bucket=dataclasses.replace(DATA.bucket, rows=8)), "of data.bucket.rows 4, this run has 8"),
        (dict(mixture=DATA.mixture[:3]), "of data.mixture, or a source"),
        (dict(episodes=61), "of data.mixture, or a source"),
    ],
)
def test_a_state_of_another_order_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        make(data=dataclasses.replace(DATA, **change)).set_state(make().get_state())


def test_other_unusable_states_and_rows_are_refused():
    with pytest.raises(ValueError, match="earlier version of the loader"):
        make().set_state({"next": 3, "waiting": [], "host": 0, "hosts": 1})
    with pytest.raises(ValueError, match="lacks row 2; it holds 0, 1"):
        make((2, 3)).set_state(make((0, 1)).get_state())
    with pytest.raises(ValueError, match="at least one row of the 4 of data.bucket.rows"):
        make((3, 4))
    ahead = make((2, 3))
    next(ahead)
    with pytest.raises(ValueError, match=r"not in step: \[0, 1\]"):
        loaders.Loader.merge([make((0, 1)).get_state(), ahead.get_state()])


def test_every_record_of_a_kind_comes_once_per_pass():
    order = Order({"a": Kind(1.0, 7), "b": Kind(3.0, 10)}, seed=3)
    for kind, n in ((0, 7), (1, 10)):
        passes = [[order.job(kind, p * n + i).record for i in range(n)] for p in range(3)]
        assert all(sorted(p) == list(range(n)) for p in passes) and len(set(map(tuple, passes))) == 3
    assert len({order.job(k, i).sample_id for k in (0, 1) for i in range(50)}) == 100


def test_the_mixture_has_its_shares_and_a_share_of_nothing_gives_nothing():
    order, count = Order({"a": Kind(1.0, 7), "never": Kind(0.0, 7), "b": Kind(3.0, 7)}, seed=3), Counter()
    for step in range(300):
        draws = order.draws(step, 0)
        count.update(next(draws) for _ in range(10))
    assert count["never"] == count[1] == 0 and abs(count[2] / 3000 - 0.75) < 0.03
    with pytest.raises(ValueError, match="must not be negative"):
        Order({"a": Kind(-1.0, 7)}, 0)
    with pytest.raises(ValueError, match="the source of a is empty"):
        Order({"a": Kind(1.0, 0)}, 0)


def test_rows_in_step_draw_the_same_kinds_and_others_their_own():
    def drawn(in_step: bool) -> list[tuple[int, ...]]:
        order = Order({"a": Kind(1.0, 7), "b": Kind(3.0, 7)}, seed=3, in_step=in_step)
        return [tuple(itertools.islice(order.draws(step, row), 64)) for row in range(4) for step in range(5)]

    together, alone = drawn(True), drawn(False)
    assert together == together[:5] * 4 and len(set(together)) == 5
    assert len(set(alone)) == 20


def test_the_toy_mixture_packs_at_97_percent():
    loader = toy.make_loader()
    take(loader, 40)
    loader.close()
    held = [p for row in loader._loader.streams for p in row.waiting]
    assert all(p.nbytes > 4 * sum(p.size.values()) for p in held)
    print(f"packing efficiency {loader.efficiency:.4f}")
    assert loader.efficiency >= 0.97


def test_look_ahead_is_what_fills_the_rows():
    """Negative control: without it the same stream packs clearly worse."""
    loader = toy.make_loader(look_ahead=0)
    take(loader, 25)
    loader.close()
    assert loader.efficiency < 0.92


def test_nothing_waits_longer_than_is_promised():
    loader = make()
    since: dict[int, int] = {}
    longest = most = 0
    for step in range(60):
        packed = ids([next(loader)])
        waiting = [p.sample.sample_id for row in loader.streams for p in row.waiting]
        longest = max([longest, *(step - since.pop(i, step) for i in packed)])
        for i in waiting:
            since.setdefault(i, step)
        most = max(most, *(len(row.waiting) for row in loader.streams))
    bound = DATA.bucket.segments + DATA.look_ahead
    print(f"longest wait {longest} steps, most waiting {most}, bound {bound}")
    assert 0 < longest <= bound and most <= bound


def test_a_sample_that_cannot_be_packed_is_named():
    data = dataclasses.replace(DATA, bucket=dataclasses.replace(DATA.bucket, gen=32))
    with pytest.raises(ValueError, match=r"needs \d+ gen slots, but data.bucket.gen is 32") as e:
        take(make(data=data), 3)
    assert "while preparing sample" in e.value.__notes__[0]


@pytest.fixture
def faulty():
    """A prefetching loader with one worker of a fault at the first sample of row 1."""
    made = []

    def build(what: str) -> loaders.Prefetch:
        good = make()
        kind = next(good._order.draws(0, 1))
        bad = broken.fault(good._prepare, what, good._order.job(kind, 1).sample_id)
        made.append(loaders.Prefetch(loaders.Loader(bad, good._order, DATA.look_ahead, workers=1, ahead=1), 2))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


@pytest.mark.parametrize(("what", "error"), [("raise", OSError), ("kill", workers.WorkerError)])
def test_a_worker_that_fails_is_one_error_here(faulty, what, error):
    loader = faulty(what)
    words = "the disk is on fire" if what == "raise" else "data worker 0 .* exit code -9 before it had prepared sample"
    for _ in range(2):  # and stays one: nobody waits for a thread that has ended
        with pytest.raises(error, match=words):
            next(loader)
    assert loader.get_state()["step"] == 0  # nothing was handed out, nothing is skipped


def test_a_worker_killed_in_the_middle_of_a_large_sample_is_an_error():
    """Half of the result is in the pipe: the other half will never come."""
    pool = workers.Pool(broken.large, 2)
    try:
        jobs = [Job(0, 0, i) for i in range(4)]
        assert len(pool.get(jobs[0])) == broken.LARGE
        read = Connection.recv

        def killed(pipe):  # when the result begins to arrive
            pipe.poll(None)
            for p in pool.processes:
                p.kill()
            return read(pipe)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "recv", killed)
            for job in jobs[1:]:
                with pytest.raises(workers.WorkerError, match="exit code -9"):
                    pool.get(job)
    finally:
        pool.close()


def test_an_exception_that_cannot_travel_arrives_in_words():
    pool = workers.Pool(broken.untold, 1)
    try:
        with pytest.raises(RuntimeError, match="Stubborn: no") as e:
            pool.get(Job(0, 0, 0))
        assert "broken.py" in e.value.__notes__[-1]
    finally:
        pool.close()


def test_closing_ends_a_worker_that_hangs(faulty):
    loader = faulty("hang")
    loader._start()
    time.sleep(2.0)
    pids = [p.pid for p in loader._loader._workers.processes]
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive(), "it waits for what hangs"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


LONELY = """
if __name__ == "__main__":
    import time
    from data import broken
    from data_pipelines.job import Job
    from data_pipelines.workers import Pool
    pool = Pool(broken.modules, 1)
    loaded = pool.get(Job(0, 0, 0))
    print(pool.processes[0].pid, *loaded, flush=True)
    time.sleep(100)
"""


def test_workers_are_light_leave_signals_to_their_master_and_end_with_it(tmp_path):
    script, tests = tmp_path / "lonely.py", pathlib.Path(__file__).parents[1]
    script.write_text(LONELY)
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tests), str(tests.parent)))}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as master:
        pid, *modules = master.stdout.readline().split()
        os.kill(int(pid), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(int(pid), 0)  # still there
        master.kill()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")
    assert "numpy" in modules and not {"jax", "grain", "tensorflow", "torch"} & set(modules)
