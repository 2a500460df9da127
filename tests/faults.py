"""Kill a training run again and again, and compare what survives with a run that nobody touched.

    python tests/faults.py WORKDIR [kills] [seed]

One run of a tiny model on the toy's real loader is killed with SIGKILL `kills` times, at moments drawn from the seed,
and restarted each time; the last start runs to the end. Prints one line of JSON. The phases:

    start       anywhere between the first import and the second save
    restore     before one of the file operations that come before the first batch, or at that batch
    first step  up to 0.3 s after the first batch of a restart was handed out
    step        the same, some batches later
    save        before one of the file operations of a save (Python's, each in turn: audit hooks see them)
    writing     up to 60 ms after a save began (TensorStore's file operations are not Python's)

`every_operation` kills a save, and nothing else, before each of its file operations. Each run is a fork of a process
that has imported everything and touched no device.
"""

import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import synthetic

from configs import toy as recipe
from cosmos_jax import metrics
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.codecs import toy
from cosmos_jax.config import Bucket, Config, from_dict
from cosmos_jax.steps import complete, find
from cosmos_jax.train import CHECKPOINTS, train
from data_pipelines import loader as loaders
from data_pipelines.action import ActionStats
from data_pipelines.tokenizer import ChatTokenizer
from data_pipelines.toy_world import codecs
from data_pipelines.toy_world.episodes import make_episode
from data_pipelines.toy_world.samples import ToyAssets

STEPS, EVERY = 160, 2
PHASES = ("save",) * 6 + ("start", "restore", "first step", "step", "writing", "writing")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
TOY: Config = from_dict(recipe.get_config())
BUCKET = Bucket(rows=1, und=128, gen=184, vision=184, action=64, sound=0, segments=4)
CONFIG = dataclasses.replace(
    TOY,
    model=dataclasses.replace(
        TOY.model, layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, mlp=32, rope_sections=(4, 2, 2), vision=None,
        sound_dim=0, remat="none",
    ),
    data=dataclasses.replace(
        TOY.data, mixture=(("text2image", 1.0), ("forward_dynamics", 1.0), ("policy", 2.0)), look_ahead=8, prefetch=2,
        bucket=BUCKET, episodes=40,
    ),
    optim=dataclasses.replace(TOY.optim, name="adamw", lr=1e-3, warmup=2, lr_scale=()),
    train=dataclasses.replace(
        TOY.train, steps=STEPS, checkpoint_every=EVERY, log_every=1, keep_every=20, sample_every=0, tensorboard=False
    ),
)  # fmt: skip


class Killer:
    """SIGKILL for this process, at the moment that `plan` names."""

    def __init__(self, plan: dict, directory: pathlib.Path):
        self.plan, self.directory, self.batches, self.operations, self.saving = plan, str(directory), 0, 0, False
        sys.addaudithook(self.hook)

    def now(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def soon(self) -> None:
        threading.Timer(self.plan["delay"], self.now).start()

    def hook(self, event: str, args: tuple) -> None:
        if not (event == "open" or event in CHANGES) or not str(args[0]).startswith(self.directory):
            return
        phase, restoring, ready = self.plan["phase"], not self.batches, self.batches >= self.plan["batch"]
        if phase == "writing" and ready and not self.saving:
            self.saving = True
            self.soon()
        if (phase == "restore" and restoring) or (phase == "save" and ready):
            self.operations += 1
            if self.operations == self.plan["operation"]:
                self.now()

    def batch(self) -> None:
        self.batches += 1
        if self.plan["phase"] == "restore":  # there were fewer operations, or nothing to restore
            self.now()
        if self.plan["phase"] in ("first step", "step") and self.batches == self.plan["batch"]:
            self.soon()


class Loader:
    """The real one, which tells the killer of each batch."""

    def __init__(self, inner, killer: Killer | None):
        self.inner, self.killer, self.assets = inner, killer, inner.assets

    def __next__(self):
        batch = next(self.inner)
        if self.killer:
            self.killer.batch()
        return batch

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


def fork(workdir: pathlib.Path, work, kill_after: float | None = None) -> int:
    """Do something in a fork; returns its wait status. What it prints is appended to workdir/log.txt."""
    workdir.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        log = os.open(workdir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1), os.dup2(log, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def run(workdir: pathlib.Path, assets: ToyAssets, plan: dict | None) -> int:
    """One run, killed as planned; returns its wait status."""

    def work() -> None:
        killer = Killer(plan, workdir / CHECKPOINTS) if plan else None
        inner = loaders.build(CONFIG.data, CONFIG.model.sequence, assets, 3.0, 3.0)
        inner.assets = toy.fingerprints(assets)
        state = train(CONFIG, workdir, Loader(inner, killer))
        (workdir / "digest").write_text(synthetic.digest(state))

    return fork(workdir, work, plan["delay"] if plan and plan["phase"] == "start" else None)


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [(int(row["step"]), row["loss"]) for row in metrics.read(workdir)]


def draw(rng: random.Random, index: int, operations: int, seconds: float) -> dict:
    """The `index`-th kill; the file operations of a save are taken in turn, in an order that the seed shuffles."""
    cycle = random.Random(5).sample(PHASES, len(PHASES))
    phase = cycle[index % len(cycle)]
    turn = sum(cycle[i % len(cycle)] == "save" for i in range(index))
    order = random.Random(7).sample(range(1, operations + 1), operations)
    return {
        "phase": phase,
        "operation": order[turn % operations] if phase == "save" else rng.randint(1, 25),
        "batch": 1 if phase == "first step" else rng.randint(2, 5),
        "delay": rng.uniform(0, {"start": seconds, "writing": 0.06}.get(phase, 0.3)),
    }


def every_operation(root: pathlib.Path) -> dict:
    """Saves of step 6 beside steps 2 and 4, each killed before another file operation; then all are continued."""
    root.mkdir(parents=True, exist_ok=True)

    def state(step: int) -> dict:
        return {"params": {"w": jnp.arange(1000.0) + step}, "ema": {}, "opt": {}, "step": jnp.int32(step)}

    def save(directory: pathlib.Path, *steps: int, plan: dict | None = None) -> None:
        with Checkpoints(directory) as checkpoints:
            for n in steps:
                current = state(n)
                if plan:
                    Killer(plan, directory).batch()
                checkpoints.save(n, current, {"next": n}, CONFIG)

    def go_on() -> None:
        for directory in made:
            with Checkpoints(directory) as checkpoints:
                like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
                found, data = checkpoints.restore(like)
                step = int(found["step"])
                assert step in (4, 6) and data == {"next": step}
                assert (found["params"]["w"] == state(step)["params"]["w"]).all()
            save(directory, 8)
            assert sorted(p.name for p in directory.iterdir()) == [str(step), "8"], sorted(directory.iterdir())

    base, made, stood = root / "base", [], []
    assert fork(root, lambda: save(base, 2, 4)) == 0
    while True:
        directory = shutil.copytree(base, root / str(len(made) + 1))
        plan = {"phase": "save", "batch": 1, "operation": len(made) + 1}
        if fork(root, lambda d=directory, p=plan: save(d, 6, plan=p)) == 0:
            break
        made.append(directory)
        stood.append(int(find(directory.absolute()).name))
    assert fork(root, go_on) == 0, (root / "log.txt").read_text()[-3000:]
    return {"operations": len(made), "stood_at": stood}


def main(root: pathlib.Path, kills: int, seed: int) -> dict:
    began = time.time()
    stats = ActionStats.fit(np.concatenate([make_episode(i).actions for i in range(20)]))
    assets = ToyAssets(*codecs.fit(20), stats, ChatTokenizer())
    whole, chain = root / "whole", root / "chain"
    assert run(whole, assets, None) == 0, (whole / "log.txt").read_text()
    want = losses(whole)
    assert [s for s, _ in want] == list(range(1, STEPS + 1))

    begin = time.time()
    run(root / "first", assets, {"phase": "first step", "batch": 1, "delay": 0})
    seconds = 2 * (time.time() - begin)
    rng, killed, stood, operations = random.Random(seed), collections.Counter(), [], 40
    for index in range(kills):
        plan = draw(rng, index, operations, seconds)
        status = run(chain, assets, plan)
        log = (chain / "log.txt").read_text()
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{plan}: {status}\n{log[-3000:]}"
        killed[plan["phase"]] += 1
        have, steps = losses(chain), complete(chain / CHECKPOINTS)
        assert have == want[: len(have)], f"after kill {index} ({plan}) the losses differ"
        if steps:
            assert find((chain / CHECKPOINTS).absolute()).name == str(steps[-1]), f"{plan}: {steps}"
            assert steps[-1] <= len(have), f"{plan}: step {steps[-1]} is saved, {len(have)} rows are written"
        stood.append(steps[-1] if steps else 0)
    last = time.time()
    assert run(chain, assets, None) == 0, (chain / "log.txt").read_text()[-3000:]
    return {
        "kills": dict(killed), "losses_equal": losses(chain) == want, "steps": STEPS, "stood_at": stood,
        "state_equal": (chain / "digest").read_text() == (whole / "digest").read_text(),
        "left": sorted(p.name for p in (chain / CHECKPOINTS).iterdir()),
        "seconds": round(time.time() - began), "seconds_per_kill": round((last - begin) / max(kills, 1), 1),
    }  # fmt: skip


if __name__ == "__main__":
    numbers = [int(x) for x in sys.argv[2:]]
    print(json.dumps(main(pathlib.Path(sys.argv[1]), *(numbers + [36, 0][len(numbers) :]))))
