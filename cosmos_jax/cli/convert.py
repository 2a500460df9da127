"""`convert`: PyTorch checkpoints to ours and back.

In: options. Out: the work, with a bar; before it, a line for every choice and whatever does not come along.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from conversion import convert
from cosmos_jax.cli.options import config_of, require


def prepare(options) -> Callable[[], None]:
    """Check source, names, shapes and target; nothing is moved before the work."""
    require(options, "source", "target")
    model = config_of(options).model if options.config else None
    average = None if options.params is None else options.params == "ema"
    lines, size, work = convert.prepare(options.source, options.target, options.layout, model, average)
    for line in lines:
        print(line)

    def run() -> None:
        began = time.monotonic()
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(TextColumn("{task.description}"), *columns) as bar:
            moving = bar.add_task(options.layout, total=size)
            work(lambda nbytes: bar.advance(moving, nbytes))
        print(f"{options.target}: {size / 1e9:.3f} GB in {time.monotonic() - began:.1f} s")

    return run
