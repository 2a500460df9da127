"""One door for every backend: what auto takes, what is refused in which words, what both streams of a layer get."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.attention as kernels
from cosmos_jax import checkpoint
from cosmos_jax.__main__ import main
from cosmos_jax.config import Config, ConfigError, ModelConfig, to_dict
from pallas_kernels.attention import Plans, Segments
from pallas_kernels.platform import Device

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEW = jax.__version_info__ >= (0, 11)
IDS = Segments(jnp.array([[0, 0, 1, -1]]), jnp.array([[0, 1, 1, 1, 1, -1]]))


@pytest.mark.parametrize(
    ("kind", "dtype", "backend", "why"),
    [
        (Device("cpu", "cpu"), "float32", "xla", "auto on cpu"),
        (Device("tpu", "TPU v5p"), "bfloat16", "mosaic_tpu", "auto on TPU v5p"),
        (Device("tpu", "TPU v5p"), "float32", "mosaic_tpu", "auto on TPU v5p"),
        (
            Device("gpu", "NVIDIA H200"),
            "bfloat16",
            "mosaic_gpu" if NEW else "xla",
            "H200" if NEW else "needs jax ≥ 0.11",
        ),
        (Device("gpu", "NVIDIA H200"), "float32", "xla", "bfloat16" if NEW else "needs jax ≥ 0.11"),
        (Device("gpu", "NVIDIA A100"), "bfloat16", "xla", "Hopper" if NEW else "needs jax ≥ 0.11"),
    ],
)
def test_auto_says_what_it_takes_and_why(kind, dtype, backend, why):
    found, said = kernels.choose("auto", dtype, kind)
    assert found == backend and why in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mosaic_tpu", "needs a TPU"), ("mosaic_gpu", "needs a Hopper GPU" if NEW else "needs jax ≥ 0.11"),
        ("cudnn", "Hopper" if NEW else "needs jax ≥ 0.11"), ("triton", "choose one of xla, mosaic_tpu"),
    ],
)  # fmt: skip
def test_a_backend_that_cannot_run_is_an_error(name, words):
    with pytest.raises(ValueError, match=words):
        kernels.gen_plan(IDS, impl=name)


def test_a_config_knows_the_backends():
    for name in ("auto", *kernels.BACKENDS):
        assert dataclasses.replace(ModelConfig(), attention=name).attention == name
    with pytest.raises(ConfigError, match="model.attention='flash'"):
        ModelConfig(attention="flash")


def test_the_command_refuses_a_kernel_that_cannot_run(tmp_path, capsys):
    """Before anything is written or compiled."""
    settings = [f"--workdir={tmp_path / 'run'}", "--config.model.attention=mosaic_tpu"]
    assert main(["train", f"--config={ROOT / 'configs' / 'toy.py'}", *settings]) == 2
    said = capsys.readouterr().err
    assert "model.attention='mosaic_tpu'" in said and "needs a TPU" in said and "attention=auto" in said
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_does_not_name_the_kernel_of_its_reader(monkeypatch):
    """Trained on TPUs, it can be asked on a laptop."""
    trained = Config(model=ModelConfig(attention="mosaic_tpu"))
    monkeypatch.setattr(checkpoint, "load_json", lambda *_: to_dict(trained))
    assert checkpoint.load_config("anywhere") == Config(model=ModelConfig())


def test_operands_that_do_not_belong_together_are_a_sentence():
    x = jnp.zeros((1, 6, 4, 8))
    plan = kernels.gen_plan(IDS)
    with pytest.raises(ValueError, match="1 keys and 1 values for a plan of 2 key sets"):
        kernels.attention(x, x, x, plan, scale=1.0)
    with pytest.raises(ValueError, match=r"k has rows and tokens \(1, 6\), its segment ids \(1, 4\)"):
        kernels.attention(x, (x, x), (x, x), plan, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.attention(x, (x[:, :4, :3], x), (x[:, :4, :3], x), plan, scale=1.0)


def test_a_layer_is_its_two_calls():
    """Edge's second und key is seen by gen alone."""
    rng = np.random.default_rng(0)
    draw = lambda tokens, heads: jnp.asarray(rng.standard_normal((1, tokens, heads, 8)), jnp.float32)  # noqa: E731
    (q, k, v, second), (gq, gk, gv) = (
        (draw(4, 4), draw(4, 2), draw(4, 2), draw(4, 2)),
        (draw(6, 4), draw(6, 2), draw(6, 2)),
    )
    plans = Plans(kernels.und_plan(IDS), kernels.gen_plan(IDS))
    und, gen = kernels.mot_attention(q, k, v, gq, gk, gv, plans, scale=0.3, k_und_for_gen=second)
    np.testing.assert_array_equal(und, kernels.attention(q, k, v, plans.und, scale=0.3))
    np.testing.assert_array_equal(gen, kernels.attention(gq, (second, gk), (v, gv), plans.gen, scale=0.3))
    plain = kernels.mot_attention(q, k, v, gq, gk, gv, plans, scale=0.3)
    assert (plain[1] != gen)[:, :5].any() and not gen[:, 5].any() and not und[:, 3].any()
