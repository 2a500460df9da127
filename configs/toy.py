"""A whole Cosmos 3, 2.5 million parameters, on the toy table-top.

Trains all nine tasks at once from streamed episodes on two CPU cores in about ten minutes; `make demo` runs it.
Expect every row of the score table to beat its baselines (README has the numbers).

    python -m cosmos_jax train --config=configs/toy.py --workdir=runs/toy
"""

from configs.base import defaults, set_group

VISION = dict(
    layers=2, hidden=96, heads=3, mlp=192, patch=8, temporal=2, grid=6, deepstack=(0,), norm_eps=1e-6, rope_theta=1e4,
    init_std=0.06,
)  # fmt: skip
MIXTURE = dict(
    reason=3.0, text2image=0.6, text2video=0.6, text2video_sound=1.6, image2video=0.6, video2video=0.8,
    forward_dynamics=2.5, inverse_dynamics=1.5, policy=3.0,
)  # fmt: skip


def get_config():
    config = defaults()
    set_group(
        config, "model", name="toy", layers=4, hidden=192, heads=4, kv_heads=2, head_dim=48, mlp=576,
        rope_sections=(8, 8, 8), rope_theta=1e4, vocab=512, latent_channels=32, action_dim=16, sound_dim=16,
        init_std=0.06, vision=VISION,
    )  # fmt: skip
    set_group(config, "data", mixture=MIXTURE, episodes=4000, look_ahead=64)
    set_group(
        config["data"], "bucket", rows=8, und=176, gen=256, vision=256, action=96, sound=144, segments=12, vit=216
    )
    set_group(
        config,
        "flow",
        weight_vision=1.0,
        weight_action=1.0,
        weight_sound=1.0,
        weight_text=1.0,
        shift_image=1.0,
        shift_video=1.0,
    )
    set_group(config, "optim", lr=3e-3, warmup=50, beta2=0.99, weight_decay=0.01, clip=5.0)
    set_group(config, "train", steps=1200, log_every=20, checkpoint_every=300, sample_every=600)
    set_group(config, "sample", steps=12, shift=1.0, guidance=2.0, max_new_tokens=64)
    return config
