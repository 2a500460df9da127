"""The toy learns the same whichever kernel attends: the real command, its kernels simulated."""

import json
import pathlib

import jax
import numpy as np

from cosmos_jax import checkpoint, state
from cosmos_jax.__main__ import main
from cosmos_jax.codecs import toy
from data_pipelines.action import ActionStats
from data_pipelines.tokenizer import ChatTokenizer
from data_pipelines.toy_world import codecs
from data_pipelines.toy_world.episodes import make_episode
from data_pipelines.toy_world.samples import ToyAssets
from pallas_kernels import platform

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "toy.py"
SMALL = {  # one layer of each tower and of the eye, with the toy's heads: what attends is as in the real one
    "model.layers": 1, "model.mlp": 64, "model.vision.layers": 1, "model.vision.mlp": 64, "data.episodes": 8,
    "data.eval_episodes": 2, "data.bucket.rows": 2, "train.steps": 3, "train.log_every": 1, "train.tensorboard": False,
}  # fmt: skip


def test_the_toy_trains_alike_with_the_kernels(tmp_path, capsys):
    """Three steps, und, gen and the eye's frames through Mosaic for TPUs: losses to 1e-5 of the definition's."""
    stats = ActionStats.fit(np.concatenate([make_episode(i).actions for i in range(20)]))
    ToyAssets(*codecs.fit(20), stats, ChatTokenizer()).save(tmp_path / toy.DIRECTORY)

    def trained(attention):
        """Losses and norms of the gradient, step by step; the parameters at the end."""
        where = tmp_path / attention
        where.mkdir()
        (where / toy.DIRECTORY).symlink_to(tmp_path / toy.DIRECTORY)
        settings = [f"--config.{k}={v}" for k, v in (SMALL | {"model.attention": attention}).items()]
        assert main(["train", f"--config={CONFIG}", f"--workdir={where}", *settings]) in (0, None)
        assert f"attention  {attention} (asked for)" in capsys.readouterr().out
        lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        model = checkpoint.load_config(where / "checkpoints").model
        params = checkpoint.load_params(where / "checkpoints", "params", state.abstract_params(model))
        return np.array([[line["loss"], line["grad_norm"]] for line in lines]), jax.tree.leaves(params)

    want, ends = trained("xla")
    with platform.interpreted():
        got, others = trained("mosaic_tpu")
    assert len(want) == 3
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(ends, others, strict=True)), "one program twice"
