"""The command line: `python -m cosmos_jax train|generate|reason|evaluate|convert|parity|bench|show …`.

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
    from cosmos_jax.checkpoint import CheckpointError
    from cosmos_jax.train import NonFiniteLoss

    try:
        work: Work = PREPARE[options.command](options)
    except (ValueError, CheckpointError) as e:
        return _complain(e)
    try:
        return work() or 0
    except (ConfigError, CheckpointError, NonFiniteLoss) as e:
        return _complain(e)


def _complain(error: Exception) -> int:
    print(f"cosmos_jax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def prepare_train(options) -> Work:
    words.require(options, "workdir")
    config, workdir = words.config_of(options), Path(options.workdir)
    _check_mixture(config)
    import jax

    from cosmos_jax import mesh, precision, train
    from cosmos_jax.checkpoint import complete, load_json
    from cosmos_jax.codecs import toy
    from cosmos_jax.model import attention
    from data_pipelines import loader as loaders

    mesh.check(config, mesh.build(config.mesh))
    attention.check(config.model, precision.resolve(config.precision))
    saved = workdir / train.CHECKPOINTS
    assets = toy.prepare(workdir)
    toy.check(assets, config.model)
    if complete(saved):
        toy.verify(assets, load_json(saved, "assets"), workdir / toy.DIRECTORY)
    flow, spec, host = config.flow, config.model.sequence, (jax.process_index(), jax.process_count())
    loader: Any = loaders.build(config.data, spec, assets, flow.shift_image, flow.shift_video, *host)
    loader.assets = toy.fingerprints(assets)

    def work() -> None:
        from cosmos_jax.cli.make import sampler

        try:
            train.train(config, workdir, loader, on_sample=sampler(config, assets, workdir))
        finally:
            loader.close()
        print(f"Next: python -m cosmos_jax evaluate --config={options.config} --workdir={workdir}")

    return work


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

    return bench.prepare(options, words.config_of(options).model)


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
