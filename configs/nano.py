"""Cosmos 3 Nano: Qwen3-VL-8B shapes in both towers, 15,173,669,120 parameters and the vision encoder.

`python -m cosmos_jax show --config=configs/nano.py` counts it without allocating anything.
"""

from configs.base import defaults, set_group

VISION = dict(
    layers=27, hidden=1152, heads=16, mlp=4304, patch=16, temporal=2, grid=48, deepstack=(8, 16, 24), norm_eps=1e-6,
    rope_theta=1e4,
)  # fmt: skip
MIXTURE = dict(text2image=1.0, text2video=1.0, image2video=1.0, video2video=1.0)


def get_config():
    config = defaults()  # ModelConfig's defaults are Nano's
    set_group(config, "model", name="nano", vision=VISION, remat="full")
    set_group(config, "data", mixture=MIXTURE)
    set_group(config["data"], "bucket", rows=1, und=8192, gen=65536, vision=65536, action=1024, sound=1024, segments=32)
    set_group(config, "flow", shift_video=10.0)
    set_group(config, "optim", trainable=("gen", "io/time", "io/vision"), clip=0.1)
    return config
