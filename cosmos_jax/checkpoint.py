"""Checkpoints: one atomic directory per step that holds everything a run needs to continue bit for bit.

In: the training state, the loader's state, the config. Out: the same, on any mesh. The only file that imports Orbax.
The second half is weights without a run, written a slice at a time: what converting a PyTorch checkpoint makes.

    <dir>/<step>/state    params, opt, ema, rng, step (OCDBT, sharded; written while training goes on)
    <dir>/<step>/{data,config,assets}/data.json   readable JSON: loader state, Config, fingerprints of the data's assets

A step is written under a temporary name and renamed when complete, so a kill at any moment leaves the previous step
intact; what it leaves behind is ignored by readers and cleared by the next writer.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from cosmos_jax import optim
from cosmos_jax.config import Config, from_dict, to_dict

Key = tuple[str, ...]  # where an array lies in its tree
JSON_ITEMS = ("data", "config", "assets")
EXECUTION = ("name", "scan", "remat", "attention")  # model settings that change how it runs, not what it is
OTHER_MODEL = "set the model of the checkpoint, or use another directory"
OTHER_STATE = "set optim.name, optim.trainable, optim.frozen and optim.ema as in the checkpoint"

logging.getLogger("absl").setLevel(logging.WARNING)
# Orbax warns whenever it is told to do without OCDBT, as `write_arrays` does.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in record.getMessage())


class CheckpointError(RuntimeError):
    """A checkpoint that is absent, incomplete, or of another model; the message is one sentence with a remedy."""


class Checkpoints:
    """The checkpoints of one run: `save` while training, `restore` to continue. Use as a context manager."""

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory, self.keep = Path(directory).absolute(), keep
        self._writer: ocp.training.Checkpointer | None = None
        self._saving: Any = None

    def save(self, step: int, state: dict, data_state: Any, config: Config, assets: dict | None = None) -> None:
        """Start writing a step; returns when `state` may be donated. Waits for the previous save first.

        data_state and assets must be JSON. The last `keep` complete steps are kept.
        """
        self.wait()
        if step in complete(self.directory):
            return
        if self._writer is None:  # created late: a process that only reads must not clear temporary directories
            policies = ocp.training.preservation_policies
            self._writer = ocp.training.Checkpointer(
                self.directory,
                context=_context(),
                preservation_policy=policies.LatestN(self.keep),
                cleanup_tmp_directories=True,
            )
        items = {"state": state, "data": data_state, "config": to_dict(config), "assets": assets or {}}
        torn = (self.directory / str(step)).exists()
        self._saving = self._writer.save_checkpointables_async(step, items, force=True, overwrite=torn)

    def latest(self) -> int | None:
        """Newest complete step, or None."""
        self.wait()
        return max(complete(self.directory), default=None)

    def restore(self, abstract_state: dict, step: int | None = None, config: Config | None = None) -> tuple[dict, Any]:
        """(state, data_state) of a step (default: the newest), placed as `abstract_state` says; any mesh will do.

        Raises CheckpointError before anything is loaded: no complete checkpoint; `config` describes another model;
        a parameter has another shape.
        """
        self.wait()
        path = find(self.directory, step)
        if config is not None:
            _same_model(path, config)
        _same_shapes(path, abstract_state)
        with _context():
            items = ocp.load_checkpointables(path, {"state": abstract_state, "data": None})
        return items["state"], items["data"]

    def wait(self) -> None:
        """Block until the running save is complete; its failure is raised here."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load_params(
    directory: str | Path, which: str, abstract: dict, step: int | None = None, config: Config | None = None
) -> dict:
    """Parameters alone, for inference: which = "ema" | "params"; `abstract` gives dtypes and places.

    Reads nothing else of the checkpoint. A parameter that was frozen in training has no average: it is its own.
    """
    if which not in ("ema", "params"):
        raise CheckpointError(f"A checkpoint holds 'ema' and 'params', not {which!r}.")
    path = find(Path(directory).absolute(), step)
    if config is not None:
        _same_model(path, config)
    _same_shapes(path, {"params": abstract})
    averaged = {k[1:] for k in _stored(path) if k[0] == which}
    if not averaged:
        raise CheckpointError(f"{path} holds no average (optim.ema was 0); ask for 'params'.")
    flat = {tuple(map(str, k)): x for k, x in flatten_dict(abstract).items()}
    wanted = {(which if k in averaged else "params", *k): x for k, x in flat.items()}
    context = _context()
    context.pytree.loading.partial_load = True
    with context:
        state = ocp.load_checkpointables(path, {"state": unflatten_dict(wanted)})["state"]
    return optim.join(state.get("ema", {}), state.get("params", {}))


def load_json(directory: str | Path, item: str, step: int | None = None) -> Any:
    """One of the readable parts of a checkpoint: "data", "config" or "assets"."""
    return _read(find(Path(directory).absolute(), step), item)


def load_config(directory: str | Path, step: int | None = None) -> Config:
    """The Config a checkpoint was trained with; but which kernel attends is for whoever runs it to say: auto."""
    config = from_dict(load_json(directory, "config", step))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))


def complete(directory: Path) -> list[int]:
    """Steps that can be restored, ascending."""
    return sorted(int(p.name) for p in _entries(directory) if p.name.isdigit() and _is_complete(p))


def interrupted(directory: Path) -> list[str]:
    """Names of step directories whose writing never finished."""
    return sorted(p.name for p in _entries(directory) if p.name[0].isdigit() and not _is_complete(p))


def find(directory: Path, step: int | None = None) -> Path:
    """Directory of a complete step (default: the newest), or CheckpointError."""
    steps = complete(directory)
    if step in steps or (step is None and steps):
        return directory / str(steps[-1] if step is None else step)
    what = f"no checkpoint of step {step}" if step is not None else "no checkpoint"
    have = f"; it has steps {', '.join(map(str, steps))}" if steps else ""
    torn = f"; ignored because its writing was interrupted: {', '.join(t)}" if (t := interrupted(directory)) else ""
    raise CheckpointError(f"There is {what} in {directory}{have}{torn}.")


def _entries(directory: Path) -> list[Path]:
    return [p for p in directory.iterdir() if p.is_dir()] if directory.is_dir() else []


def _is_complete(path: Path) -> bool:
    parts = [path / "_CHECKPOINT_METADATA", path / "state" / "_METADATA", *(path / i / "data.json" for i in JSON_ITEMS)]
    return path.name.isdigit() and all(p.exists() for p in parts)


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    for item in JSON_ITEMS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _read(path: Path, item: str) -> Any:
    return json.loads((path / item / "data.json").read_text())


def _stored(path: Path, item: str = "state") -> dict[Key, tuple[int, ...]]:
    """Path → shape of every array of an item, from the metadata alone."""
    with _context():
        tree = ocp.checkpointables_metadata(path).metadata[item]
    return _shapes(tree)


def _shapes(tree: Any) -> dict[Key, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {tuple(jax.tree_util.keystr((k,), simple=True) for k in path): tuple(x.shape) for path, x in leaves}


def _same_model(path: Path, config: Config) -> None:
    """Compare model settings field by field and name the first that differs."""
    stored, asked = (flatten_dict(d["model"]) for d in (_read(path, "config"), json.loads(json.dumps(to_dict(config)))))
    for key in dict.fromkeys([*asked, *stored]):
        if key[0] in EXECUTION or stored.get(key) == asked.get(key):
            continue
        name = "model." + ".".join(key)
        raise CheckpointError(
            f"Checkpoint {path} was trained with {name}={stored.get(key)!r}, "
            f"but {name}={asked.get(key)!r} is asked for; {OTHER_MODEL}."
        )


def _same_shapes(path: Path, abstract: dict) -> None:
    """Compare the shapes of the asked parts of the state (only parameters, when only they are asked for)."""
    stored, asked = {k: shape for k, shape in _stored(path).items() if k[0] in abstract}, _shapes(abstract)
    for key in dict.fromkeys([*asked, *stored]):
        if stored.get(key) == asked.get(key):
            continue
        name, have, want = "/".join(key), stored.get(key, "absent"), asked.get(key, "absent")
        remedy = OTHER_MODEL if key[0] == "params" else OTHER_STATE
        raise CheckpointError(f"{name} is {have} in checkpoint {path}, but {want} is asked for; {remedy}.")


# Weights without a run: several trees of arrays ("items") in one Orbax checkpoint, one zarr3 array per parameter.

CHUNK = 32 << 20  # bytes: what one file holds at most, and so what a reader of a small part reads too much
IN_FLIGHT = 1 << 30  # bytes that may wait to be written


class Planned(NamedTuple):
    """An array that will be written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layered: bool  # written one index of axis 0 at a time


def write_arrays(
    path: Path,
    items: Mapping[str, Mapping[Key, Planned]],
    slices: Iterable[tuple[str, Key, int | None, np.ndarray]],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write an Orbax checkpoint without ever holding one array whole.

    items: item → path → what will come. slices: (item, path, layer or None for all of it, array), which together must
    cover every array; one is written while the next is read. The caller makes the directory appear when complete.

    Orbax writes the checkpoint with arrays of one element; each is then replaced by one of the real shape (its
    documented format without OCDBT: a folder per leaf).
    """
    context = _context()
    context.array.saving.use_ocdbt = False
    with context:
        seeds = {i: unflatten_dict(dict.fromkeys(tree, np.zeros(1, np.uint8))) for i, tree in items.items()}
        ocp.save_checkpointables(path, seeds)
    stores = {(i, k): _create(path / i, k, x) for i, tree in items.items() for k, x in tree.items()}
    missing = {key: x.shape[0] if x.layered else 1 for key, x in _flat(items)}
    waiting: collections.deque = collections.deque()
    size = 0
    for item, key, layer, x in slices:
        store = stores[item, key]
        waiting.append(((store if layer is None else store[layer]).write(x), x.nbytes))
        missing[item, key] -= 1
        size += x.nbytes
        while size > IN_FLIGHT:
            size -= _finish(waiting.popleft(), progress)
    for written in waiting:
        _finish(written, progress)
    if left := [k for k, n in missing.items() if n]:
        raise ValueError(f"{'/'.join(left[0][1])} of {left[0][0]} was not written exactly once.")


def open_arrays(path: Path, item: str) -> dict[Key, Any]:
    """path → tensorstore array, of one item of a checkpoint; nothing is read. For a run the item is "state"."""
    meta = json.loads((path / item / "_METADATA").read_text())
    driver = "zarr3" if meta["use_zarr3"] else "zarr"
    out = {}
    for key in _stored(path, item):
        if meta["use_ocdbt"]:
            base = {"driver": "file", "path": f"{path / item}/"}
            where = {"driver": "ocdbt", "base": base, "path": ".".join(key) + "/"}
        else:
            where = {"driver": "file", "path": f"{path / item / '.'.join(key)}/"}
        out[key] = tensorstore.open({"driver": driver, "kvstore": where}, open=True, read=True).result()
    return out


def load_arrays(path: Path, items: Mapping[str, Mapping]) -> dict[str, dict]:
    """Items of a checkpoint, in the dtypes and places that `items` (trees of ShapeDtypeStruct) state, on any mesh.

    Nothing else is read: a tree may name a part of what is stored. CheckpointError: an absent array, another shape.
    """
    for item, tree in items.items():
        if not (path / item).is_dir():
            raise CheckpointError(f"{path} holds no {item!r}.")
        stored = _stored(path, item)
        for key, shape in _shapes(tree).items():
            if stored.get(key) != shape:
                name, have = "/".join(key), stored.get(key, "absent")
                raise CheckpointError(f"{name} is {have} in {path}, but {shape} is asked for; {OTHER_MODEL}.")
    context = _context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(path, dict(items))


def _create(folder: Path, key: Key, x: Planned) -> Any:
    """An empty array in place of the one that is there."""
    where = folder / ".".join(key)
    if not (where / "zarr.json").is_file():
        raise ValueError(f"{where} is not an array that Orbax wrote.")
    chunk = (1, *_chunk(x.shape[1:], x.dtype.itemsize)) if x.layered else _chunk(x.shape, x.dtype.itemsize)
    grid = {"name": "regular", "configuration": {"chunk_shape": [max(n, 1) for n in chunk]}}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{where}/"},
        "metadata": {"chunk_grid": grid, "codecs": codecs},
        "store_data_equal_to_fill_value": True,  # a bias of zeros is there; what is absent is an error
        "context": {"file_io_sync": False},
    }
    dtype = tensorstore.dtype(x.dtype.name)
    return tensorstore.open(spec, create=True, delete_existing=True, dtype=dtype, shape=x.shape).result()


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The longest run of leading indices that fits CHUNK."""
    if not shape or itemsize * math.prod(shape) <= CHUNK:
        return shape
    row = itemsize * math.prod(shape[1:])
    return (1, *_chunk(shape[1:], itemsize)) if row > CHUNK else (CHUNK // row, *shape[1:])


def _flat(items: Mapping[str, Mapping[Key, Planned]]) -> Iterator[tuple[tuple[str, Key], Planned]]:
    return (((item, key), x) for item, tree in items.items() for key, x in tree.items())


def _finish(written: tuple[Any, int], progress: Callable[[int], None]) -> int:
    """Wait for it; returns its bytes."""
    writing, nbytes = written
    writing.result()
    progress(nbytes)
    return nbytes
