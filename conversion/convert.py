"""One command for every layout, both ways: `python -m cosmos_jax convert --from=SRC --to=DST [--layout=…]`.

In: a PyTorch folder, an imported checkpoint, or a training run. Out: an imported Orbax checkpoint (the default) or a
PyTorch folder. DST appears when it is complete: what is being written is called DST.partial, and a killed conversion
leaves nothing else.

    DST/manifest.json   source, hashes, configs, versions, scheduler, prompts, action statistics
    DST/weights/        Orbax: items "model" (both towers, heads, eye), "vae", "sound_tokenizer"
    DST/files/          configs and tokenizer files, as they were
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from conversion import export, manifest, source
from conversion.check import ConversionError
from cosmos_jax import checkpoint, integrity
from cosmos_jax.config import ModelConfig

LAYOUTS = ("orbax", *export.LAYOUTS)
Progress = Callable[[int], None]


def prepare(
    src: str | Path, dst: str | Path, layout: str = "orbax", model: ModelConfig | None = None,
    average: bool | None = None,
) -> tuple[list[str], int, Callable[[Progress], None]]:  # fmt: skip
    """Check everything; move nothing. Returns (lines to read, bytes to move, the work, which reports progress).

    ConversionError, FileError, CheckpointError or ConfigError: one sentence.
    """
    src, dst = Path(src), Path(dst)
    if layout not in LAYOUTS:
        raise ConversionError(f"--layout={layout} is not one of {', '.join(LAYOUTS)}.")
    if dst.exists():
        raise ConversionError(f"{dst} exists already; choose another --to, or remove it.")
    if layout == "orbax" and source.is_ours(src):
        raise ConversionError(f"{src} is an Orbax checkpoint already; give --layout to convert it to another.")
    origin = source.open_source(src, model, average)
    lines = [*(manifest.describe(origin.folder) if origin.folder else []), *origin.lines]
    if layout == "orbax":
        return lines, _size(origin), lambda progress: _import(origin, dst, progress)
    chosen = export.plan(origin, layout)

    def work(progress: Progress) -> None:
        with appearing(dst) as partial:
            export.write(chosen, partial, progress)

    left = [f"not in {dst}: {line}" for line in chosen.left]
    return [*lines, *left], export.size(chosen), work


def _import(origin: source.Source, dst: Path, progress: Progress) -> None:
    found, parts = origin.folder, {k: (source.item(k), *v) for k, v in origin.components.items()}
    items: dict[str, dict] = {}
    for item, _, w in parts.values():
        items.setdefault(item, {}).update(w.plan())
    slices = ((item, *piece) for item, _, w in parts.values() for piece in w.slices())
    used = {path for c in found.components.values() for path in c.tensors.files}
    root = found.path if found.path.is_dir() else found.path.parent
    with appearing(dst) as partial, concurrent.futures.ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(integrity.sha256, [*used, *found.files.values()], root)
        checkpoint.write_arrays(partial / source.WEIGHTS, items, slices, progress)
        for name, path in found.files.items():
            target = partial / source.FILES / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        table = manifest.build(found, parts, origin.fresh, hashes.result())
        (partial / manifest.NAME).write_text(json.dumps(table, indent=1) + "\n")


def load(path: str | Path, items: dict[str, dict]) -> dict[str, dict]:
    """Parameters of an imported checkpoint, placed as `items` (item → tree of ShapeDtypeStructs) say, on any mesh.

    items may name a part of a tree, for example `cosmos.part(abstract, "reasoner")`: nothing else is read.
    """
    path = Path(path)
    manifest.read(path)
    return checkpoint.load_arrays((path / source.WEIGHTS).absolute(), items)


@contextlib.contextmanager
def appearing(dst: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete and on disk; nothing is left of one that fails."""
    partial = dst.with_name(dst.name + ".partial").absolute()
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.sync()
        partial.rename(dst.absolute())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _size(origin: source.Source) -> int:
    arrays = (x for _, w in origin.components.values() for x in w.arrays.values())
    return sum(x.size * x.dtype.itemsize for x in arrays)
