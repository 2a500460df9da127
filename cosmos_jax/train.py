"""The training loop: fetch → step → log the previous step → save.

In: a `Config`, a working directory and a loader. Out: the directory, holding checkpoints, metrics.jsonl and time.jsonl
(goodput.py); and, if it came to that, bad_batch.json (nonfinite.py), hang-<process>.txt (watchdog.py), profile/. A
directory that already holds checkpoints is continued, bit for bit. What can go wrong, and what happens then:
docs/operations.md.

    loader: __next__() -> batch (data_pipelines/schema.py), get_state() -> JSON, set_state(JSON); the state is that
    after the last batch it handed out. Optional: `assets` (JSON fingerprints), stored with every step; `rows`, those of
    the global batch that this process holds; and merge(states of all processes) -> one state, so that another number of
    processes can continue from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pallas_kernels.attention as attention
from cosmos_jax import chips, flops, goodput, optim, precision, saving, shard
from cosmos_jax import mesh as meshes
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.config import Config
from cosmos_jax.metrics import Recorder
from cosmos_jax.model import cosmos
from cosmos_jax.nonfinite import Guard, NonFiniteLoss, identity
from cosmos_jax.preemption import Preemption
from cosmos_jax.profile import Profile
from cosmos_jax.saving import Done
from cosmos_jax.step import make_train_step
from cosmos_jax.watchdog import Watchdog

CHECKPOINTS = "checkpoints"
PROFILE = "profile"
OnSample = Callable[[int, dict], None]


def train(
    config: Config, workdir: str | Path, loader: Any, params: dict | None = None, on_sample: OnSample | None = None
) -> dict:
    """Train to config.train.steps, or continue to there, and return the final state.

    params: start from these (fine-tuning) unless workdir has a checkpoint. on_sample(step, state) is called every
    config.train.sample_every steps. SIGTERM saves and raises SystemExit(0). Raises NonFiniteLoss, ConfigError,
    CheckpointError. After any other error the last whole step is saved, if that can be done, and the error raised.
    """
    workdir, t = Path(workdir), config.train
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = meshes.build(config.mesh)
    meshes.check(config, mesh)
    with (
        jax.set_mesh(mesh),
        Watchdog(workdir, t.hang, t.hang_slow, t.on_hang == "abort") as watchdog,
        Checkpoints(workdir / CHECKPOINTS, t.keep, t.keep_every) as checkpoints,
    ):
        done = saving.start(config, checkpoints, loader, params)
        with (
            Recorder(workdir, t.steps, done.step, t.log_every, t.tensorboard, chips.peak(mesh.devices)) as recorder,
            Preemption(t.grace, checkpoints.standing) as preemption,
            Profile(t.profile, workdir / PROFILE) as profile,
        ):
            recorder.say(describe(config, mesh, loader, done.step))
            saver = saving.Saver(config, checkpoints, recorder, loader)
            run = Run(config, workdir, loader, saver, recorder, watchdog, preemption, profile, on_sample)
            state = run.loop(done)
            recorder.say(goodput.describe(goodput.account(workdir)))
            return state


@dataclass
class Run:
    """All that the loop talks to."""

    config: Config
    workdir: Path
    loader: Any
    saver: saving.Saver
    recorder: Recorder
    watchdog: Watchdog
    preemption: Preemption
    profile: Profile
    on_sample: OnSample | None
    pending: _Pending | None = None

    def loop(self, done: Done) -> dict:
        t, step_fn, place = self.config.train, make_train_step(self.config), _placer()
        self.guard = Guard(t, self.workdir, self.recorder.say)
        self.train_und = optim.reaches_und(self.config.optim, cosmos.abstract(self.config.model))
        first = done.step + 1
        try:
            for step in range(first, t.steps + 1):
                self.phase("data", f"step {step}", slow=step == first)
                begin = time.perf_counter()
                batch = next(self.loader)
                waited = time.perf_counter() - begin
                self.recorder.clock.phase("compile" if step == first else "step")
                self.profile.before(step)
                state, metrics = step_fn(done.state, place(batch))
                done = Done(step, state, self.loader.get_state())
                running = _Pending(step, metrics, identity(batch), flops.count(batch), waited, _filled(batch))
                previous, self.pending = self.pending, running
                if previous:
                    self.settle(previous)
                if self.profile.ends(step):
                    self.sound()
                    self.recorder.say(self.profile.stop())

                stop = self.preemption.reached(step) and step < t.steps
                if stop or step % t.checkpoint_every == 0 or step == t.steps:
                    self.save(done)
                if t.sample_every and step % t.sample_every == 0:
                    self.sample(done)
                if stop:
                    self.finish(done)
                    self.recorder.say(f"Stopped by SIGTERM after step {step}; saved. Run the same command to continue.")
                    raise SystemExit(0)
            self.finish(done)
            return done.state
        except NonFiniteLoss:
            raise  # the same batch would do it again, and the step after it may already have been taken
        except Exception as e:
            self.phase("save", "saving after an error", slow=True)
            self.saver.rescue(done, self.sound, e)
            raise

    def settle(self, step: _Pending) -> None:
        """Wait for a step, log it, and judge its loss."""
        values = jax.device_get(step.metrics) | {"packing": step.filled}
        work = flops.train_step(self.config.model, step.counts, self.train_und)
        spike = self.guard.spike(step.step, float(values["loss"]))
        odd = bool(spike) or not values["finite"]
        self.recorder.log(step.step, values | spike, step.counts.und + step.counts.gen, work, step.waited, always=odd)
        self.guard.finite(step.step, values, step.identity)

    def sound(self) -> None:
        """Before the state leaves the loop: make sure that it is sound and its row written."""
        step, self.pending = self.pending, None
        if step:
            self.settle(step)

    def phase(self, part: str, says: str, slow: bool) -> None:
        """What comes now, for the clock (one of `goodput.PARTS`) and for the watchdog."""
        self.recorder.clock.phase(part)
        self.watchdog.beat(says, slow)

    def save(self, done: Done) -> None:
        self.sound()
        self.phase("save", f"saving step {done.step}", slow=True)
        self.saver.save(done)

    def sample(self, done: Done) -> None:
        self.sound()
        self.phase("sample", f"sampling after step {done.step}", slow=True)
        if self.on_sample:
            self.on_sample(done.step, done.state)

    def finish(self, done: Done) -> None:
        self.phase("save", f"saving step {done.step}", slow=True)
        self.saver.finish(done)
        self.recorder.clock.write(done.step)


@dataclass
class _Pending:
    """A step that was dispatched; its metrics are still on the device."""

    step: int
    metrics: dict
    identity: dict
    counts: flops.Counts
    waited: float
    filled: float  # share of the und and gen slots that hold tokens


def describe(config: Config, mesh: jax.sharding.Mesh, loader: Any, start: int) -> str:
    """Every choice that changes numbers, in a few lines."""
    exact, devices = precision.resolve(config.precision), mesh.devices
    asked = f" ({config.precision.compute})" if config.precision.compute == "auto" else ""
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    trained, frozen = optim.select(config.optim, cosmos.abstract(config.model))
    size = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in (("on", trained), ("off", frozen))}
    bucket = config.data.bucket
    own = len(getattr(loader, "rows", range(bucket.rows)))
    return "\n".join((
        f"precision  compute {exact.compute}{asked}, parameters and optimiser float32, matmul {exact.matmul}",
        f"mesh       {axes} on {devices.size} × {devices.flat[0].device_kind}",
        "attention  {} ({})".format(*attention.choose(config.model.attention, exact.dtype)),
        f"loader     {type(loader).__name__}, seed {config.data.seed}, {config.data.workers} workers; {own} of "
        f"{bucket.rows} rows in this process, of {bucket.und} und + {bucket.gen} gen tokens each, "
        f"{config.optim.accumulate} micro-batch(es)",
        f"parameters {size['on']:,} trained, {size['off']:,} frozen",
        f"steps      {start} → {config.train.steps}, noise seed {config.train.seed}",
    ))  # fmt: skip


def _placer() -> Callable[[dict], dict]:
    """Host batch → device batch, rows over the data-parallel axes; each process gives its own rows."""
    sharding = shard.batch_sharding(jax.sharding.get_mesh())
    return lambda batch: {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}


def _filled(batch: dict[str, np.ndarray]) -> float:
    """Packing efficiency of a batch (this process's rows)."""
    return float(np.mean(np.concatenate([batch[f"{s}_segment_ids"].ravel() >= 0 for s in ("und", "gen")])))
