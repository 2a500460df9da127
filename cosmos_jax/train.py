"""The training loop: fetch → step → log the previous step → save.

In: a `Config`, a working directory and a loader. Out: the directory, holding checkpoints, metrics.jsonl and, if a batch
ever made the loss non-finite, bad_batch.json. A directory that already holds checkpoints is continued, bit for bit.

    loader: __next__() -> batch (data_pipelines/schema.py), get_state() -> JSON, set_state(JSON); the state is that
    after the last batch it handed out. An optional `assets` attribute (JSON fingerprints) is stored with every step.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pallas_kernels.attention as attention
from cosmos_jax import flops, optim, precision, shard
from cosmos_jax import mesh as meshes
from cosmos_jax import state as states
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.config import Config
from cosmos_jax.metrics import Recorder
from cosmos_jax.model import cosmos
from cosmos_jax.step import make_train_step

CHECKPOINTS = "checkpoints"
BAD_BATCH = "bad_batch.json"


class NonFiniteLoss(RuntimeError):
    """A batch gave a loss or gradient that is not a finite number; the message names the batch."""


def train(
    config: Config,
    workdir: str | Path,
    loader: Any,
    params: dict | None = None,
    on_sample: Callable[[int, dict], None] | None = None,
) -> dict:
    """Train to config.train.steps, or continue to there, and return the final state.

    params: start from these (fine-tuning) unless workdir has a checkpoint. on_sample(step, state) is called every
    config.train.sample_every steps. SIGTERM saves and raises SystemExit(0). Raises NonFiniteLoss, ConfigError,
    CheckpointError.
    """
    workdir = Path(workdir)
    mesh = meshes.build(config.mesh)
    meshes.check(config, mesh)
    with jax.set_mesh(mesh), Checkpoints(workdir / CHECKPOINTS, config.train.keep) as checkpoints:
        start = checkpoints.latest() or 0
        if start:
            state, data_state = checkpoints.restore(states.abstract(config), config=config)
            loader.set_state(data_state)
        else:
            state = states.init(config, params)
        t = config.train
        with Recorder(workdir, t.steps, start, t.log_every, t.tensorboard) as recorder, _terminated() as stop:
            recorder.say(describe(config, mesh, loader, start))
            return _loop(config, workdir, loader, state, start, checkpoints, recorder, stop, on_sample)


def _loop(config, workdir, loader, state, start, checkpoints, recorder, stop, on_sample) -> dict:
    t, step_fn, place = config.train, make_train_step(config), _placer()
    train_und = _trains_und(config)
    previous: _Pending | None = None
    for step in range(start + 1, t.steps + 1):
        begin = time.perf_counter()
        batch = next(loader)
        waited = time.perf_counter() - begin
        state, metrics = step_fn(state, place(batch))
        running = _Pending(step, metrics, _identity(batch), flops.count(batch), waited)
        if previous:
            previous.settle(config, workdir, recorder, train_und)
        previous = running

        save = step % t.checkpoint_every == 0 or step == t.steps or stop.is_set()
        sample = bool(on_sample and t.sample_every and step % t.sample_every == 0)
        if save or sample:  # the state leaves the loop: first make sure it is sound
            previous.settle(config, workdir, recorder, train_und)
            previous = None
        if save:
            checkpoints.save(step, state, loader.get_state(), config, getattr(loader, "assets", {}))
        if sample and on_sample:
            on_sample(step, state)
        if stop.is_set() and step < t.steps:
            checkpoints.wait()
            recorder.say(f"Stopped by SIGTERM after step {step}; saved. Run the same command to continue.")
            raise SystemExit(0)
    return state


@dataclass
class _Pending:
    """A step that was dispatched; its metrics are still on the device."""

    step: int
    metrics: dict
    identity: dict
    counts: flops.Counts
    waited: float

    def settle(self, config: Config, workdir: Path, recorder: Recorder, train_und: bool) -> None:
        """Wait for this step, log it, and stop the run if it was not finite."""
        values = jax.device_get(self.metrics)
        work = flops.train_step(config.model, self.counts, train_und)
        recorder.log(self.step, values, self.counts.und + self.counts.gen, work, self.waited)
        if values["finite"]:
            return
        path = workdir / BAD_BATCH
        report = {"step": self.step, "loss": repr(float(values["loss"])), "grad_norm": repr(float(values["grad_norm"]))}
        path.write_text(json.dumps(report | self.identity, indent=1) + "\n")
        ids = self.identity["sample_ids"]
        raise NonFiniteLoss(
            f"Step {self.step} gave loss {values['loss']} and gradient norm {values['grad_norm']}: look at samples "
            f"{', '.join(map(str, ids[:8]))}{' …' if len(ids) > 8 else ''} (all of them in {path}); "
            f"the parameters were not touched and the last checkpoint in {workdir / CHECKPOINTS} is intact."
        )


def describe(config: Config, mesh: jax.sharding.Mesh, loader: Any, start: int) -> str:
    """Every choice that changes numbers, in a few lines."""
    exact, devices = precision.resolve(config.precision), mesh.devices
    asked = f" ({config.precision.compute})" if config.precision.compute == "auto" else ""
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    trained, frozen = optim.select(config.optim, cosmos.abstract(config.model))
    size = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in (("on", trained), ("off", frozen))}
    bucket = config.data.bucket
    return "\n".join((
        f"precision  compute {exact.compute}{asked}, parameters and optimiser float32, matmul {exact.matmul}",
        f"mesh       {axes} on {devices.size} × {devices.flat[0].device_kind}",
        "attention  {} ({})".format(*attention.choose(config.model.attention, exact.dtype)),
        f"loader     {type(loader).__name__}, seed {config.data.seed}; {bucket.rows} rows of {bucket.und} und + "
        f"{bucket.gen} gen tokens, {config.optim.accumulate} micro-batch(es)",
        f"parameters {size['on']:,} trained, {size['off']:,} frozen",
        f"steps      {start} → {config.train.steps}, noise seed {config.train.seed}",
    ))  # fmt: skip


def _placer() -> Callable[[dict], dict]:
    """Host batch → device batch, rows over the data-parallel axes; each process gives its own rows."""
    sharding = shard.batch_sharding(jax.sharding.get_mesh())
    return lambda batch: {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}


def _identity(batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Which samples a batch holds (this process's rows), and their rows in the task table."""
    real = batch["segment_sample_id"] >= 0
    return {"sample_ids": batch["segment_sample_id"][real].tolist(), "tasks": batch["segment_task"][real].tolist()}


def _trains_und(config: Config) -> bool:
    """Does any gradient flow into the und tower? (FLOPs only.)"""
    trained, _ = optim.select(config.optim, cosmos.abstract(config.model))
    return bool({"embed_tokens", "vit", "norm_und", "lm_head"} & set(trained) or "und" in trained.get("layers", {}))


@contextlib.contextmanager
def _terminated():
    """An event that SIGTERM sets; the previous handler returns afterwards. Outside the main thread: never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
