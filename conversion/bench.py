"""Speed and memory of converting a checkpoint: `python -m conversion.bench --dir=SCRATCH [--layers=4]`.

In: a scratch directory with room for three times the model. Out: a table. A transformer with the layer shapes of Nano
and random bfloat16 numbers is written in diffusers' layout, then copied file by file, converted, and converted back, in
this one run; each starts after a sync, with the files in the page cache. Memory is what the process adds to its
resident size (mapped files included), sampled every 10 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from conversion import convert, export, export_configs, omni
from conversion.weights import Weights
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos


class Random(Weights):
    """Random bits with a finite exponent, the same block over and over: as incompressible as it must be, and quick."""

    narrowed: dict[str, str] = {}

    def __init__(self, cfg: ModelConfig):
        shapes = flatten_dict(omni.part(cosmos.abstract(cfg)))
        self.arrays = {k: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16) for k, x in shapes.items()}
        self.block = np.random.RandomState(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)

    def read(self, path, layer=None):
        shape = self.arrays[path].shape if layer is None else self.arrays[path].shape[1:]
        return np.resize(self.block, shape)


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """{"seconds", "bytes" that the resident size grew by at most} of the block."""
    os.sync()
    out, stop, before = {"bytes": 0.0}, threading.Event(), _resident()

    def watch():
        while not stop.wait(0.01):
            out["bytes"] = max(out["bytes"], _resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    yield out
    os.sync()
    out["seconds"] = time.monotonic() - began
    stop.set()
    thread.join()


def _resident() -> float:
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(scratch: Path, cfg: ModelConfig) -> dict[str, dict[str, float]]:
    """name → {seconds, bytes}; and "model" → {bytes}. The scratch directory is emptied again."""
    tiny = ModelConfig(name="tiny", layers=1, hidden=64, heads=2, kv_heads=1, mlp=64, vocab=64)
    here = Path(tempfile.mkdtemp(dir=scratch))
    try:
        _write(here / "tiny", tiny)
        convert.prepare(here / "tiny", here / "warm")[2](lambda n: None)  # imports and threads are not the model's
        source = _write(here / "source", cfg)
        size = sum(p.stat().st_size for p in source.iterdir())
        results = {"model": {"bytes": float(size)}}
        with measured() as results["copy the files"]:
            shutil.copytree(source, here / "copy")
        shutil.rmtree(here / "copy")
        for name, src, dst, layout in (
            ("PyTorch to Orbax", "source", "orbax", "orbax"), ("Orbax to PyTorch", "orbax", "back", "diffusers")
        ):  # fmt: skip
            with measured() as results[name]:
                convert.prepare(here / src, here / dst, layout)[2](lambda n: None)
        for p in source.glob("*.safetensors"):
            if p.read_bytes() != (here / "back" / "transformer" / p.name).read_bytes():
                raise RuntimeError(f"{p.name} came back different.")
    finally:
        shutil.rmtree(here)
    return results


def _write(folder: Path, cfg: ModelConfig) -> Path:
    """A diffusers folder with a random transformer; returns transformer/."""
    out = folder / "transformer"
    out.mkdir(parents=True)
    export.write(export.Plan([("safetensors", "diffusion_pytorch_model", omni.entries(cfg), Random(cfg))]), out)
    (out / "config.json").write_text(json.dumps(export_configs.diffusers_transformer(cfg)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", required=True, type=Path, help="where there is room for three times the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of Nano's shape (default 4: 3.6 GB)")
    options = parser.parse_args()
    results = run(options.dir, ModelConfig(name="bench", layers=options.layers, vocab=32768))
    size = results.pop("model")["bytes"]
    copy = results["copy the files"]["seconds"]
    print(f"{size / 1e9:.2f} GB in bfloat16, {options.layers} layers; came back byte for byte")
    for name, r in results.items():
        speed, memory = size / r["seconds"] / 1e9, r["bytes"] / 1e9
        ratio = r["seconds"] / copy
        print(
            f"{name:18} {r['seconds']:7.1f} s  {speed:6.2f} GB/s  {ratio:5.2f} x copy  {memory:6.2f} GB of memory added"
        )


if __name__ == "__main__":
    main()
