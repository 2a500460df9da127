"""The command line: `python -m cosmos_jax train|generate|reason|evaluate|convert|parity|bench|plan|show …`.

In: words. Out: a trained directory, files, or one sentence that says what is wrong (exit code 2). Every command first
*prepares*: it reads and checks all that the user gave and returns the work as a function; nothing is compiled before.
A ValueError while preparing is the user's and becomes that sentence; one during the work is ours and is shown whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmos_jax.cli import options as words
from cosmos_jax.config import Config, ConfigError

Work = Callable[[], int | None]  # an exit code other than 0 is a result, not a mistake


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (`parity`: a row fails), or 2 after a mistake of the user."""
    try:
        options = words.parse(list(sys.argv[1:] if argv is None else argv))
    except ValueError as e:
        return _complain(e)
    if options.command == "plan":  # its estimate takes less time than the imports below
        return _plan(options)
    from cosmos_jax.checkpoint import CheckpointError
    from cosmos_jax.train import NonFiniteLoss
    from data_pipelines.loader import StateError
    from data_pipelines.workers import WorkerError

    try:
        work: Work = PREPARE[options.command](options)
    except (ValueError, CheckpointError) as e:
        return _complain(e)
    try:
        return work() or 0
    except (ConfigError, CheckpointError, NonFiniteLoss, StateError, WorkerError) as e:
        return _complain(e)


def _plan(options) -> int:
    from cosmos_jax import plan

    try:
        return plan.prepare(options, words.config_of(options))()
    except ValueError as e:
        return _complain(e)


def _complain(error: Exception) -> int:
    print(f"cosmos_jax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def prepare_train(options) -> Work:
    words.require(options, "workdir")
    config, workdir = words.config_of(options), Path(options.workdir)
    rehearsal = config.data.source == "rehearsal"
    if not rehearsal:
        _check_mixture(config)
    from cosmos_jax import dist, mesh, precision, shard, train
    from cosmos_jax.model import attention
    from data_pipelines import loader as loaders

    dist.start(options.distributed)
    devices = mesh.build(config.mesh)
    mesh.check(config, devices)
    attention.check(config.model, precision.resolve(config.precision))
    assets = None if rehearsal else _toy_assets(config, workdir)
    flow, rows = config.flow, shard.own_rows(devices, config.data.bucket.rows)
    loader: Any = loaders.build(config.data, config.model.sequence, assets, flow.shift_image, flow.shift_video, rows)

    def work() -> None:
        from cosmos_jax.cli.make import sampler
        from cosmos_jax.codecs import toy

        loader.assets = {} if assets is None else toy.fingerprints(assets)
        try:
            train.train(config, workdir, loader, on_sample=None if assets is None else sampler(config, assets, workdir))
        finally:
            loader.close()
        if dist.first() and rehearsal:
            print("A rehearsal: its data is noise, and nothing was learnt.")
        elif dist.first():
            print(f"Next: python -m cosmos_jax evaluate --config={options.config} --workdir={workdir}")

    return work


def _toy_assets(config: Config, workdir: Path) -> Any:
    """The toy's codecs, statistics and tokenizer, those that the run began with."""
    from cosmos_jax import dist, train
    from cosmos_jax.checkpoint import complete, load_json
    from cosmos_jax.codecs import toy

    saved = workdir / train.CHECKPOINTS

    def first() -> None:
        """What one process does while the others wait: fit the assets, and look at what the run continues."""
        assets = toy.prepare(workdir)
        toy.check(assets, config.model)
        if complete(saved):
            toy.verify(assets, load_json(saved, "assets"), workdir / toy.DIRECTORY)

    dist.lead(first)
    return toy.prepare(workdir)


def _check_mixture(config: Config) -> None:
    from data_pipelines.tasks import task

    if not config.data.mixture:
        raise ConfigError("config.data.mixture is empty; give tasks and their shares, as configs/toy.py does.")
    for name, share in config.data.mixture:
        task(name)
        if share < 0:
            raise ConfigError(f"config.data.mixture.{name}={share} must not be negative.")


def prepare_generate(options) -> Work:
    from cosmos_jax.cli import make

    return make.prepare_generate(options)


def prepare_reason(options) -> Work:
    from cosmos_jax.cli import make

    return make.prepare_reason(options)


def prepare_evaluate(options) -> Work:
    from cosmos_jax.cli import make

    pipeline, workdir = make.open_pipeline(options)

    def work() -> None:
        from cosmos_jax import evaluate, report

        scores = evaluate.evaluate(pipeline, workdir)
        print(f"Open {report.write(workdir, scores)} in a browser.")

    return work


def prepare_convert(options) -> Work:
    from cosmos_jax.cli import convert

    return convert.prepare(options)


def prepare_parity(options) -> Work:
    words.require(options, "reference", "out")
    from cosmos_jax import parity

    return parity.prepare(options.reference, options.out, options.what)


def prepare_bench(options) -> Work:
    from cosmos_jax import bench

    config = words.read_config(options.config or "configs/nano.py", options.overrides)
    return bench.prepare(options, config, options.config is not None)


def prepare_show(options) -> Work:
    config = words.config_of(options)

    def work() -> None:
        from cosmos_jax.cli.show import show

        show(config)

    return work


PREPARE = {
    "train": prepare_train,
    "generate": prepare_generate,
    "reason": prepare_reason,
    "evaluate": prepare_evaluate,
    "convert": prepare_convert,
    "parity": prepare_parity,
    "bench": prepare_bench,
    "show": prepare_show,
}

if __name__ == "__main__":
    sys.exit(main())
