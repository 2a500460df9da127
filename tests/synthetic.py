"""A tiny model, random packed batches that keep the contract, and a run that tests start in a subprocess.

    python tests/synthetic.py '<json>'

keys: workdir; loader (arguments of Loader); die_before_commit (a step: SIGKILL itself when its checkpoint is written
but not yet renamed); and config overrides by dotted path, e.g. {"mesh.tp": 2}. Started by tests/processes/cluster.py
it is one process of several.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np

from cosmos_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from data_pipelines.schema import PAD, Bucket, empty_batch

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    name="tiny", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, mlp=64, rope_sections=(2, 1, 1), vocab=64,
    latent_channels=4, action_dim=6, domains=3, sound_dim=5,
)  # fmt: skip
BUCKET = Bucket(rows=8, und=16, gen=24, vision=12, action=8, sound=4, segments=2)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(bucket=BUCKET),
    optim=OptimConfig(lr=3e-3, warmup=2),
    mesh=MeshConfig(),
    precision=PrecisionConfig(compute="float32", matmul="highest"),
    train=TrainConfig(steps=6, log_every=1, checkpoint_every=2, tensorboard=False),
)


def override(config, changes: dict):
    """A config with some fields replaced, named by dotted paths."""
    for path, value in changes.items():
        *parents, name = path.split(".")
        chain = [config]
        for p in parents:
            chain.append(getattr(chain[-1], p))
        value = tuple(value) if isinstance(value, list) else value
        for parent, attribute in zip(reversed(chain), [name, *reversed(parents)], strict=True):
            value = dataclasses.replace(parent, **{attribute: value})
        config = value
    return config


def batch(index: int, config: Config = CONFIG) -> dict[str, np.ndarray]:
    """Batch number `index`: two samples per row, each with text, vision, action and sound; about a quarter padding."""
    bucket, rng = config.data.bucket, np.random.default_rng([7, index])
    b = empty_batch(bucket, config.model.sequence)
    sizes = {"vision": bucket.vision, "action": bucket.action, "sound": bucket.sound}
    starts = {"vision": 0, "action": bucket.vision, "sound": bucket.vision + bucket.action}
    for r in range(bucket.rows):
        used = {"und": 0, "gen": 0, **dict.fromkeys(sizes, 0)}
        for s in range(bucket.segments):
            n = rng.integers(2, bucket.und // bucket.segments + 1)
            u = slice(used["und"], used["und"] + n)
            used["und"] += n
            b["und_ids"][r, u] = rng.integers(0, config.model.vocab, n)
            b["und_targets"][r, u] = np.where(rng.random(n) < 0.5, rng.integers(0, config.model.vocab, n), PAD)
            b["und_positions"][r, :, u] = np.arange(n)
            b["und_segment_ids"][r, u] = s
            b["segment_sample_id"][r, s] = (index * bucket.rows + r) * bucket.segments + s
            b["segment_task"][r, s] = rng.integers(0, 4)
            b["segment_is_image"][r, s] = rng.random() < 0.5
            b["segment_shift"][r, s] = 3.0
            b["segment_items"][r, s] = 1
            for name, capacity in sizes.items():
                n = rng.integers(1, capacity // bucket.segments + 1)
                own = slice(used[name], used[name] + n)
                g = slice(used["gen"], used["gen"] + n)
                b[f"{name}_x0"][r, own] = rng.standard_normal((n, b[f"{name}_x0"].shape[-1]))
                b[f"{name}_index"][r, own] = np.arange(g.start, g.stop)
                b[f"{name}_segment_ids"][r, own] = s
                b[f"{name}_token_ids"][r, own] = np.arange(n)
                b[f"{name}_noisy"][r, own] = rng.random(n) < 0.8
                b[f"{name}_weight"][r, own] = 1.0 / (n * b[f"{name}_x0"].shape[-1])
                b["gen_source"][r, g] = starts[name] + np.arange(own.start, own.stop)
                b["gen_segment_ids"][r, g] = s
                b["gen_positions"][r, :, g] = 100.0 + rng.random((3, n)) * 4
                used[name] += n
                used["gen"] += n
        b["action_width"][r, : used["action"]] = 4
        b["action_domain"][r, : used["action"]] = rng.integers(0, config.model.domains)
        b["action_x0"][r, :, 4:] = 0
    b["vision_extent"][b["vision_index"] >= 0] = config.model.patch
    return b


class Loader:
    """Batches 0, 1, 2, …, or this host's rows of them; and what may happen at one of them:

    poison: [batch, row], a NaN among its clean latents; leave_out: it is passed over; die: an error; hang: it never
    comes; full: [first, last], between which no file can grow; pause: seconds before each.
    """

    def __init__(
        self, config: Config = CONFIG, poison=(-1, 0), leave_out=-1, die=-1, hang=-1, full=(-1, -1), pause=0.0,
        host=0, hosts=1,
    ):  # fmt: skip
        self.config, self.poison, self.leave_out, self.die, self.hang = config, poison, leave_out, die, hang
        self.full, self.pause, self.host, self.hosts, self.next = full, pause, host, hosts, 0
        self.assets = {"tokenizer": "synthetic"}

    def __next__(self):
        time.sleep(self.pause)
        self.next += self.next == self.leave_out
        index, self.next = self.next, self.next + 1  # as a careless loader: it has moved on when it fails
        if index == self.die:
            raise OSError("the loader's worker died")
        if index == self.hang:
            time.sleep(10**6)
        if index in self.full:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if index == self.full[0] else hard, hard))
        out = batch(index, self.config)
        if index == self.poison[0]:
            out["vision_x0"][self.poison[1], 0, 0] = np.nan
        rows = self.config.data.bucket.rows // self.hosts
        return {k: x[self.host * rows :][:rows] for k, x in out.items()}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def environment(devices: int = 1) -> dict[str, str]:
    """For subprocesses: CPU, few optimisation passes, the shared compilation cache of conftest.py."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}


def start(request: dict, devices: int = 1) -> subprocess.Popen:
    """Start the run below in a subprocess."""
    return subprocess.Popen(
        [sys.executable, "-u", __file__, json.dumps(request)],
        env=environment(devices), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def digest(state: dict) -> str:
    """SHA-256 over every byte of a state."""
    import jax

    h = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        h.update(jax.tree_util.keystr(path).encode() + np.asarray(x).tobytes())
    return h.hexdigest()


def die_before_commit(step: int) -> None:
    """SIGKILL this process at the moment the checkpoint of `step` is to get its final name."""
    rename = os.rename

    def fatal(source, target, *args, **kwargs):
        if pathlib.Path(target).name == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)

    os.rename = fatal


def main(request: dict) -> None:
    from cosmos_jax import dist
    from cosmos_jax.train import train

    dist.start("JAX_COORDINATOR_ADDRESS" in os.environ)
    if "die_before_commit" in request:
        die_before_commit(request.pop("die_before_commit"))
    workdir, faults = request.pop("workdir"), request.pop("loader", {})
    config = override(CONFIG, request)
    state = train(config, workdir, Loader(config, **faults, host=dist.index(), hosts=dist.count()))
    if dist.count() == 1:
        print("digest", digest(state))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
