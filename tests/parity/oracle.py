"""The oracle of the tests: diffusers' `Cosmos3OmniTransformer`, tiny, as `cosmos_jax.parity` builds and feeds it.

Nobody here wrote the reference. `model_config` is written out by hand, so that the reader of config.json has something
to be compared with.
"""

from cosmos_jax.config import ModelConfig
from cosmos_jax.parity.inputs import batch, inputs
from cosmos_jax.parity.reference import rng
from cosmos_jax.parity.rows import relative
from cosmos_jax.parity.tiny import EDGE
from cosmos_jax.parity.tiny import NANO as OMNI
from cosmos_jax.parity.tiny import transformer as reference
from cosmos_jax.parity.transformer import params

__all__ = ["EDGE", "OMNI", "batch", "inputs", "model_config", "params", "reference", "relative", "rng"]


def model_config(ref: dict) -> ModelConfig:
    edge = ref.get("hidden_act") == "relu2"
    return ModelConfig(
        name="tiny", layers=ref["num_hidden_layers"], hidden=ref["hidden_size"], heads=ref["num_attention_heads"],
        kv_heads=ref["num_key_value_heads"], head_dim=ref["head_dim"], mlp=ref["intermediate_size"],
        mlp_act="relu2" if edge else "swiglu", norm_eps=ref["rms_norm_eps"],
        norm_cast="after_weight" if edge else "before_weight", qk_norm_und=not edge, k_norm_und_for_gen=edge,
        rope_theta=ref["rope_theta"], rope_sections=tuple(ref["rope_axes_dim"]), vocab=ref["vocab_size"],
        latent_channels=ref["latent_channel"], patch=ref["latent_patch_size"], action_dim=ref["action_dim"],
        domains=ref["num_embodiment_domains"], sound_dim=ref["sound_dim"] or 0,
    )  # fmt: skip
