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
        config, "model", name="toy", layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=384,
        rope_sections=(6, 5, 5), rope_theta=100.0, vocab=512, latent_channels=16, action_dim=16, sound_dim=16,
        remat="attn", vision=VISION,
    )  # fmt: skip
    set_group(config, "data", mixture=MIXTURE, episodes=4000, look_ahead=64)
    set_group(config["data"], "bucket", rows=6, und=128, gen=184, vision=184, action=64, sound=96, segments=10, vit=144)
    set_group(
        config, "flow", weight_vision=1.0, weight_action=1.0, weight_sound=1.0, weight_text=1.0,
        shift_image=5.0, shift_video=5.0,
    )  # fmt: skip
    set_group(config, "optim", lr=5e-3, warmup=50, beta2=0.99, weight_decay=0.01, clip=5.0)
    set_group(config, "train", steps=4000, log_every=20, checkpoint_every=1000, sample_every=2000)
    set_group(config, "sample", steps=12, shift=5.0, guidance=2.0, max_new_tokens=64)
    return config
