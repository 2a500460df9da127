"""Nano, Super and Edge are configs of the one implementation: abstract evaluation gives their real parameter counts."""

import jax
import pytest

from cosmos_jax import shard
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos

SUPER = dict(layers=64, hidden=5120, heads=64, mlp=25600)
EDGE = dict(
    layers=28, hidden=2048, heads=16, mlp=9216, mlp_act="relu2", norm_eps=1e-5, norm_cast="after_weight",
    qk_norm_und=False, k_norm_und_for_gen=True, rope_theta=1e8, vocab=131072, sound_dim=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "count"),
    [({}, 15_173_669_120), (SUPER, 64_019_736_832), (EDGE, 3_369_657_024)],
    ids=["nano", "super", "edge"],
)
def test_parameter_count_of_the_released_models(sizes, count):
    tree = cosmos.abstract(ModelConfig(**sizes))
    assert sum(x.size for x in jax.tree.leaves(tree)) == count


def test_every_parameter_names_its_axes():
    cfg = ModelConfig(**SUPER)
    shapes, axes = cosmos.abstract(cfg), cosmos.logical_axes(cfg)
    for (path, x), names in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple)), strict=True
    ):
        assert len(x.shape) == len(names), path
        used = [a for n in names if (a := shard.RULES[n])]
        assert len(used) == len(set(used)), f"{path}: two dimensions on one mesh axis"
        if x.size > 5e7:
            assert used, f"{path} of {x.size:,} elements is on every device"
