"""The eye of the Edge reasoner: a SigLIP2 vision transformer and its projector (spec model.md §3.3).

In: flattened pixel patches in 2×2 merge-block order, features (row, column, channel). Out: one feature per 2×2 block
for the und stream. Against Qwen3-VL's (vision.py): the position table is resampled with antialiasing and is all that
tells where a patch is, a LayerNorm ends the encoder, and nothing but its end reaches the und tower.
"""

from __future__ import annotations

import jax
from flax import nnx

from cosmos_jax.config import VisionConfig
from cosmos_jax.model.attention import full_plan
from cosmos_jax.model.declare import Dense, normal, param
from cosmos_jax.model.norm import LayerNorm
from cosmos_jax.model.vision import Merger, VisionBlock, resampled
from cosmos_jax.precision import Precision


class SiglipTower(nnx.Module):
    def __init__(self, cfg: VisionConfig, patch_dim: int, out: int, rngs):
        init = normal(cfg.init_std)
        self.patch_in = Dense(rngs, patch_dim, cfg.hidden, ("feature", "embed"), init)
        self.positions = param(rngs, (cfg.grid**2, cfg.hidden), ("feature", "embed"), init)
        keys = jax.random.split(rngs.params(), cfg.layers)
        self.layers = jax.vmap(lambda k: VisionBlock(cfg, nnx.Rngs(k)))(keys)
        self.norm = LayerNorm(rngs, cfg.hidden, cfg.norm_eps)
        self.merger = Merger(rngs, cfg, out, shuffle_first=False)

    def embed(self, batch: dict, precision: Precision) -> tuple[jax.Array, None]:
        """vit_* fields → what enters the first block [B,P,D]; nothing is rotated."""
        return self.patch_in(batch["vit_patches"], precision) + resampled(self.positions, batch, precision), None

    def __call__(self, batch: dict, precision: Precision, attention: str) -> tuple[jax.Array, None]:
        """vit_* fields → features [B,P/4,D]; no deep-stack."""
        x, rotary = self.embed(batch, precision)
        plan = full_plan(batch["vit_segment_ids"], attention, precision)
        graphdef, state = nnx.split(self.layers)

        def body(x, state):
            return nnx.merge(graphdef, state)(x, rotary, plan, precision), None

        x, _ = jax.lax.scan(body, x, state)
        return self.merger(self.norm(x, precision), precision), None
