"""The toy on one GPU: a wider, deeper model, bfloat16 compute, 60 times the tokens. It has not been run on one yet.

python -m cosmos_jax train --config=configs/toy_gpu.py --workdir=runs/toy_gpu
"""

from configs import toy
from configs.base import set_group


def get_config():
    config = toy.get_config()
    set_group(config, "model", name="toy_gpu", layers=8, hidden=384, heads=12, kv_heads=4, mlp=1152)
    set_group(config, "data", episodes=40000, look_ahead=16)
    set_group(
        config["data"], "bucket", rows=32, und=256, gen=512, vision=512, action=128, sound=192, segments=16, vit=512
    )
    set_group(config, "optim", lr=1e-3, warmup=500, lr_scale=())
    set_group(config, "train", steps=20000, log_every=50, checkpoint_every=2000, sample_every=2000)
    set_group(config, "sample", steps=35, shift=5.0, steps_of=(), shift_of=())
    return config
