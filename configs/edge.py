"""Cosmos 3 Edge: Nemotron-2B shapes in both towers, 3,369,657,024 parameters and the vision encoder (SigLIP2).

ReLU², no sound, its own norm order.
"""

from configs import nano
from configs.base import set_group

VISION = dict(
    kind="siglip2", layers=27, hidden=1152, heads=16, mlp=4304, patch=16, temporal=1, grid=16, deepstack=(),
    merger=11520, norm_eps=1e-6,
)  # fmt: skip


def get_config():
    config = nano.get_config()
    set_group(
        config, "model", name="edge", layers=28, hidden=2048, heads=16, mlp=9216, mlp_act="relu2", norm_eps=1e-5,
        norm_cast="after_weight", qk_norm_und=False, k_norm_und_for_gen=True, rope_theta=1e8, vocab=131072,
        sound_dim=0, vision=VISION,
    )  # fmt: skip
    return config
