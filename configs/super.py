"""Cosmos 3 Super: Qwen3-VL-32B shapes in both towers, 64,019,736,832 parameters and the vision encoder."""

from configs import nano
from configs.base import set_group


def get_config():
    config = nano.get_config()
    set_group(config, "model", name="super", layers=64, hidden=5120, heads=64, mlp=25600)
    return config
