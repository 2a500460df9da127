"""`.pth` and `.pt` files of torch.save, read lazily and written as a stream, without PyTorch and without running them.

In: a file. Out: name → array, memory-mapped, as from `conversion.safetensors`. Containers in containers are flattened
with dots, as torch.distributed.checkpoint does it: {"model": {"w": …}} holds "model.w", a list's items are numbered.
Plain values (an epoch, a learning rate) become text in `metadata` under their names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conversion.tensors import FileError, Layout, Lazy, Tensors, in_order
from conversion.torch_pickle import Storage
from conversion.torch_zip import open_archive, tensor, write

DEEPEST, LONGEST, MOST = 32, 1000, 100_000  # levels, letters, values: a short pickle can say more than memory holds


def open_file(path: str | Path) -> Tensors:
    """One file of torch.save (1.6 or later). FileError, and nothing executed, if it is damaged or holds anything else
    than tensors and plain values in dicts, lists and tuples."""
    path = Path(path)
    archive = open_archive(path)
    tensors: dict[str, Lazy] = {}
    metadata: dict[str, str] = {}
    for count, (name, x) in enumerate(_values(archive.tree, path)):
        if count == MOST:
            raise FileError(f"{path} holds more than {MOST} values; it is damaged or not a file of weights.")
        if isinstance(x, dict | list | tuple):
            continue
        if name in tensors or name in metadata:
            raise FileError(f"{path} holds two values that are both called {name!r} when flattened; rename one.")
        if (found := archive.tensor(x, name)) is not None:
            tensors[name] = found
        elif x is None or isinstance(x, bool | int | float | str):
            metadata[name] = str(x)
        else:
            what = "storage" if isinstance(x, Storage) else x.name
            raise FileError(f"{path}: {name!r} is a {what}, neither a tensor nor a plain value; save it without.")
    if "" in tensors:
        raise FileError(f"{path} holds one tensor without a name; save a dict of name to tensor.")
    return Tensors(tensors, metadata)


def _values(x: Any, path: Path, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value with its flattened name, the containers among them."""
    if depth > DEEPEST or len(name) > LONGEST:
        raise FileError(f"{path}: {name[:60]!r}… is nested too deeply; the file is damaged or not one of weights.")
    yield name, x
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list | tuple) else ()
    for key, y in items:
        yield from _values(y, path, f"{name}.{key}" if name else str(key), depth + 1)


def write_file(path: str | Path, layout: Layout, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors one at a time, so that only one is in memory; the file appears under its name when complete.

    layout: name → (dtype, shape) in the order in which `arrays` will come. `torch.load(path, weights_only=True)`
    returns a dict of these names. ValueError if layout and arrays disagree, or for a dtype that PyTorch lacks.
    """
    path = Path(path)
    tree = {name: tensor(str(i), dtype, shape) for i, (name, (dtype, shape)) in enumerate(layout.items())}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as f:
        write(f, tree, in_order(path, layout, arrays))
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)
