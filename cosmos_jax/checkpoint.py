"""Checkpoints: one atomic directory per step that holds everything a run needs to continue bit for bit.

In: the training state, the loader's state, the config. Out: the same, on any mesh. The only file that imports Orbax.
The second half is weights without a run, written a slice at a time: what converting a PyTorch checkpoint makes.

    <dir>/<step>/state    params, opt, ema, rng, step (OCDBT, sharded; written while training goes on)
    <dir>/<step>/{data,config,assets}/data.json   readable JSON: loader state, Config, fingerprints of the data's assets
    <dir>/<step>/integrity.json   size and checksum of every file (integrity.py)

A step is written under a temporary name (`<step>.writing`), its list of files last, and renamed when complete, so a
kill at any moment leaves the previous step intact; what it leaves behind is ignored by readers and cleared by the next
writer. Readers take the newest step whose files are what they were, and name what they skip.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
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

from cosmos_jax import dist, integrity, optim, steps
from cosmos_jax.config import Config, from_dict, to_dict
from cosmos_jax.steps import CheckpointError, complete, find, interrupted

__all__ = ["CheckpointError", "Checkpoints", "complete", "find", "interrupted"]

Key = tuple[str, ...]  # where an array lies in its tree
# model settings that change how it runs, not what it is
EXECUTION = ("name", "scan", "remat", "attention", "context", "und_tokens")
OTHER_MODEL = "set the model of the checkpoint, or use another directory"
OTHER_STATE = "set optim.name, optim.trainable, optim.frozen and optim.ema as in the checkpoint"

logging.getLogger("absl").setLevel(logging.WARNING)
# Orbax warns whenever it is told to do without OCDBT, as `write_arrays` does.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one run: `save` while training, `restore` to continue. Use as a context manager.

    Kept: the last `keep` complete steps, and every step that is a multiple of `keep_every` (0: none besides).
    With several processes all of them must make the same calls; process 0 alone renames, lists and deletes.
    """

    def __init__(self, directory: str | Path, keep: int = 2, keep_every: int = 0):
        self.directory, self.keep, self.keep_every = Path(directory).absolute(), keep, keep_every
        self.last: int | None = None  # newest step known to be complete and undamaged
        self._bad: set[int] = set()
        self._saving: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, state: dict, data_state: Any, config: Config, assets: dict | None = None) -> None:
        """Start writing a step; returns when `state` may be donated. Waits for the previous save first.

        data_state and assets must be JSON. A write that fails (a full disk) is told on stderr when it does, what it
        left is removed, and the run may go on: the next save is the next try, and `wait` raises for the last one.
        """
        with contextlib.suppress(CheckpointError):  # it was told when it happened
            self.wait()
        if step == self.last:
            return
        items = {"data": data_state, "config": to_dict(config), "assets": assets or {}}
        json.dumps(items)  # what is not JSON is the caller's mistake, and is raised here
        self._saving = concurrent.futures.Future()
        try:
            if dist.first():
                steps.clear(self.directory)
            with _context():
                writing = ocp.save_checkpointables_async(
                    self.directory / f"{step}{steps.WRITING}",
                    {"state": state, **items},
                    overwrite=True,
                    custom_metadata={"integrity": integrity.NAME},
                )
        except OSError as e:
            self._saving.set_exception(self._failed(step, e))
            return
        self._saving = self._thread.submit(self._commit, step, writing)

    def latest(self) -> int | None:
        """Newest complete and undamaged step, or None; the same in every process, each of which reads its share.

        What is skipped is told in one sentence each. CheckpointError: there are steps, and all are damaged.
        """
        self.wait()
        there, bad = dist.gather(steps.numbered(self.directory))[0], dict[int, str]()
        for step in reversed(there):
            path = self.directory / str(step)
            what = next(filter(None, dist.gather(steps.fault(path, dist.index(), dist.count()))), None)
            if what is None:
                if dist.first():
                    steps.note_skipped(self.directory, bad)
                    steps.note_unverified(path)
                self.last = step
                return step
            bad[step] = what
            self._bad.add(step)
        if bad:
            raise CheckpointError(steps.none_left(self.directory, bad))
        return None

    def restore(self, abstract_state: dict, step: int | None = None, config: Config | None = None) -> tuple[dict, Any]:
        """(state, data_state) of a step (default: the newest), placed as `abstract_state` says; any mesh will do.

        Raises CheckpointError before anything is loaded: no complete checkpoint; `config` describes another model;
        a parameter has another shape.
        """
        self.wait()
        if step is None:
            step = self.latest()
        known = step is not None and step == self.last
        path = self.directory / str(step) if known else find(self.directory, step)
        if config is not None:
            _same_model(path, config)
        _same_shapes(path, abstract_state)
        with _context():
            items = ocp.load_checkpointables(path, {"state": abstract_state, "data": None})
        return items["state"], items["data"]

    def wait(self) -> None:
        """Block until the running save is complete; its failure is raised here, once, as a CheckpointError."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def standing(self) -> str:
        """What a run that ends now would continue from."""
        return f"the last checkpoint is step {self.last}" if self.last else "there is no checkpoint yet"

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except CheckpointError:  # told when it happened; it must not hide what ended the block
            if kind is None:
                raise

    def _commit(self, step: int, writing: Any) -> None:
        """In the thread: when all processes have written, list the files and give the step its name."""
        path = self.directory / str(step)
        try:
            writing.result()
            if dist.first():
                made = path.with_name(f"{step}{steps.WRITING}")
                integrity.write(made)
                steps.delete(path)  # a damaged one, or of a run that was cut back to an earlier step
                made.rename(path)
                integrity.settle(self.directory)
        except Exception as e:
            raise self._failed(step, e) from e
        self.last = step
        self._bad.discard(step)
        if dist.first():
            try:
                self._prune()
            except OSError as e:
                dist.warn(f"Old checkpoints in {self.directory} could not be deleted ({e}).")

    def _failed(self, step: int, why: Exception) -> CheckpointError:
        reason = " ".join(str(why).split())[:300]
        error = CheckpointError(f"Step {step} could not be saved in {self.directory}; {self.standing()}. ({reason})")
        dist.warn(f"WARNING: {error}")
        if dist.first():
            try:
                steps.clear(self.directory)
            except OSError as e:
                dist.warn(f"What it left in {self.directory} could not be removed ({e}).")
        return error

    def _prune(self) -> None:
        """Delete what `keep` and `keep_every` do not keep, and the damaged steps that are older than a good one."""
        good = [s for s in complete(self.directory) if s not in self._bad]
        kept = {*good[-self.keep :], *(s for s in good if self.keep_every and s % self.keep_every == 0)}
        for step in (s for s in complete(self.directory) if s not in kept and s < self.last):
            steps.delete(self.directory / str(step))


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


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    for item in steps.JSON_ITEMS:
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
