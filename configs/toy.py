"""A whole Cosmos 3, 2.5 million parameters, on the toy table-top.

Trains all nine tasks at once from streamed episodes, on two CPU cores in about a quarter of an hour; `make demo` does.
The README has the scores.

    python -m cosmos_jax train --config=configs/toy.py --workdir=runs/toy
"""

from configs.base import defaults, set_group

VISION = dict(
    layers=2, hidden=96, heads=3, mlp=192, patch=12, temporal=2, grid=4, deepstack=(0,), norm_eps=1e-6, rope_theta=1e4,
    init_std=0.06,
)  # fmt: skip
MIXTURE = dict(
    reason=5.0, text2image=0.5, text2video=0.5, text2video_sound=1.5, image2video=1.0, video2video=4.0,
    forward_dynamics=3.0, inverse_dynamics=1.0, policy=2.0,
)  # fmt: skip
# Joint runs of 2,000 steps: the reasoner used its pictures with 0.04 and 0.08 of the generator's rate, not with 0.2.
SLOW = (("und", 0.1), ("vit/", 0.125), ("embed_tokens", 0.125), ("lm_head", 0.125))
# Where a picture is given, the first guess at high noise is the best one; from text alone, details need more steps.
GIVEN = ("image2video", "video2video", "forward_dynamics", "inverse_dynamics", "policy")


def get_config():
    config = defaults()
    set_group(
        config, "model", name="toy", layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, mlp=384,
        rope_sections=(6, 5, 5), rope_theta=5.0, vocab=512, latent_channels=16, action_dim=16, sound_dim=16,
        remat="attn", vision=VISION,
    )  # fmt: skip
    set_group(config, "data", mixture=MIXTURE, episodes=12000, eval_episodes=128, look_ahead=48, in_step=False)
    set_group(config["data"], "bucket", rows=4, und=128, gen=184, vision=184, action=64, sound=96, segments=10, vit=96)
    set_group(
        config, "flow", weight_vision=1.0, weight_action=1.0, weight_sound=0.2, weight_text=4.0,
        shift_image=20.0, shift_video=20.0,
    )  # fmt: skip
    set_group(config, "optim", name="muon", lr=8e-3, warmup=100, beta2=0.99, weight_decay=0.01, clip=5.0, lr_scale=SLOW)
    set_group(config, "train", steps=8000, log_every=25, checkpoint_every=1000, sample_every=2000)
    set_group(
        config, "sample", steps=16, shift=5.0, guidance=3.0, steps_of=dict.fromkeys(GIVEN, 4),
        shift_of=dict.fromkeys(GIVEN, 20.0), max_new_tokens=64,
    )  # fmt: skip
    set_group(config, "evaluate", samples=128, questions=256, rollouts=96)
    return config
