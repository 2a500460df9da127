"""The eye of the Nano and Super reasoner: the Qwen3-VL vision transformer (spec model.md §3.1).

In: flattened pixel patches in 2×2 merge-block order. Out: one feature per 2×2 block for the und stream, and the
deep-stack features that are added to it after its first layers. The generator never uses it. Edge's encoder
(vision_siglip.py) is made of the same blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosmos_jax import shard
from cosmos_jax.config import VisionConfig
from cosmos_jax.model.attention import HEADS, attend, full_plan
from cosmos_jax.model.declare import Dense, normal, param, use
from cosmos_jax.model.norm import LayerNorm
from cosmos_jax.model.rope import inverse_frequencies, rotate
from cosmos_jax.precision import Precision

MERGE = 4  # patches per token: a 2×2 block
_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
_gelu_exact = functools.partial(jax.nn.gelu, approximate=False)


class VisionBlock(nnx.Module):
    """Pre-LN attention inside each frame, rotary where tables are given, and a tanh-GELU MLP."""

    def __init__(self, cfg: VisionConfig, rngs):
        d, axes, init = cfg.hidden, ("embed", "hidden"), normal(cfg.init_std)
        self.norm_1, self.norm_2 = LayerNorm(rngs, d, cfg.norm_eps), LayerNorm(rngs, d, cfg.norm_eps)
        self.q, self.k, self.v, self.proj = (Dense(rngs, d, d, axes, init) for _ in range(4))
        self.fc1, self.fc2 = Dense(rngs, d, cfg.mlp, axes, init), Dense(rngs, cfg.mlp, d, ("hidden", "embed"), init)
        self.heads = cfg.heads

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array] | None, plan, precision: Precision):
        """x [B,P,D] → [B,P,D]. rotary: cos and sin [B,P,head_dim]; plan: of `full_plan`."""
        b, p, d = x.shape
        h = self.norm_1(x, precision)

        def split(t):
            return shard.reshape(t, (b, p, self.heads, d // self.heads), ("batch", "token", "act", "head_dim"))

        q, k, v = (split(f(h, precision)) for f in (self.q, self.k, self.v))
        if rotary is not None:
            q, k = (rotate(t.astype(jnp.float32), *rotary).astype(x.dtype) for t in (q, k))
        q, k, v = (shard.constrain(t, HEADS) for t in (q, k, v))
        o = attend(q, k, v, plan, precision)
        o = shard.constrain(o, ("batch", "token", "act", "head_dim"))
        x = x + self.proj(shard.reshape(o, (b, p, d), ("batch", "token", "act")), precision)
        inner = _gelu_tanh(self.fc1(self.norm_2(x, precision), precision))
        return x + self.fc2(inner, precision)


class Merger(nnx.Module):
    """2×2 patches → one und token. `shuffle_first`: LayerNorm over the 4·D block (deep-stack) or over D (main)."""

    def __init__(self, rngs, cfg: VisionConfig, out: int, shuffle_first: bool):
        wide, init = MERGE * cfg.hidden, normal(cfg.init_std)
        self.norm = LayerNorm(rngs, wide if shuffle_first else cfg.hidden, cfg.norm_eps)
        self.fc1 = Dense(rngs, wide, cfg.merger_width, ("embed", "hidden"), init)
        self.fc2 = Dense(rngs, cfg.merger_width, out, ("embed", "hidden"), init)
        self.shuffle_first = shuffle_first

    def __call__(self, x: jax.Array, precision: Precision) -> jax.Array:
        """x [B,P,D] → [B,P/4,out]."""
        b, p, d = x.shape
        if not self.shuffle_first:
            x = self.norm(x, precision)
        x = shard.reshape(x, (b, p // MERGE, MERGE * d), ("batch", "token", "act"))
        if self.shuffle_first:
            x = self.norm(x, precision)
        return self.fc2(_gelu_exact(self.fc1(x, precision)), precision)


class VisionTower(nnx.Module):
    def __init__(self, cfg: VisionConfig, patch_dim: int, out: int, rngs):
        self.cfg, init = cfg, normal(cfg.init_std)
        self.patch_in = Dense(rngs, patch_dim, cfg.hidden, ("feature", "embed"), init)
        self.positions = param(rngs, (cfg.grid**2, cfg.hidden), ("feature", "embed"), init)
        keys = jax.random.split(rngs.params(), cfg.layers)
        self.layers = jax.vmap(lambda k: VisionBlock(cfg, nnx.Rngs(k)))(keys)
        self.merger = Merger(rngs, cfg, out, shuffle_first=False)
        keys = jax.random.split(rngs.params(), max(len(cfg.deepstack), 1))
        tap = jax.vmap(lambda k: Merger(nnx.Rngs(k), cfg, out, shuffle_first=True))
        self.deepstack = tap(keys) if cfg.deepstack else None

    def embed(self, batch: dict, precision: Precision) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """vit_* fields → what enters the first block [B,P,D], and the rotary tables of them all."""
        x = self.patch_in(batch["vit_patches"], precision) + resampled(self.positions, batch, precision)
        return x, _tables(batch["vit_rowcol"], self.cfg)

    def __call__(self, batch: dict, precision: Precision, attention: str) -> tuple[jax.Array, jax.Array | None]:
        """vit_* fields → features [B,P/4,D] and deep-stack features [n,B,P/4,D] (None without taps)."""
        cfg = self.cfg
        x, rotary = self.embed(batch, precision)
        plan = full_plan(batch["vit_segment_ids"], attention, precision)
        graphdef, state = nnx.split(self.layers)

        def body(x, state):
            x = nnx.merge(graphdef, state)(x, rotary, plan, precision)
            return x, x if cfg.deepstack else None

        x, all_x = jax.lax.scan(body, x, state)
        features = self.merger(x, precision)
        if self.deepstack is None:
            return features, None
        mergers, weights = nnx.split(self.deepstack)
        taps = [
            nnx.merge(mergers, jax.tree.map(lambda p, n=n: p[n], weights))(all_x[layer], precision)
            for n, layer in enumerate(cfg.deepstack)
        ]
        return features, jnp.stack(taps)


def resampled(positions: nnx.Param, batch: dict, precision: Precision) -> jax.Array:
    """The learned table [grid², D] mixed for every patch: [B,P,D]. Weights and sum in float32 (transformers; DISC-15).

    `vit_interp_index` [B,P,K] names the rows; with K = 0 the weights [B,P,grid²] are over the whole table.
    """

    def mix(index, weight, table):
        table = table.astype(jnp.float32)
        if index.shape[-1]:
            mixed = (table[index] * weight[..., None]).sum(2)
        else:
            mixed = jnp.einsum("bpn,nd->bpd", weight, table, precision="highest")
        return mixed.astype(precision.dtype)

    fields = (batch["vit_interp_index"], batch["vit_interp_weight"])
    return shard.rowwise_shared(mix, fields, (use(positions, precision),))


def _tables(rowcol: jax.Array, cfg: VisionConfig) -> tuple[jax.Array, jax.Array]:
    """rowcol [B,P,2] → cos, sin [B,P,head_dim]: half of the frequencies turn with the row, half with the column."""
    inverse = np.asarray(inverse_frequencies(cfg.rope_theta, cfg.hidden // cfg.heads // 2))
    row, col = (rowcol[..., i, None].astype(jnp.float32) * inverse for i in range(2))
    phase = jnp.concatenate([row, col, row, col], -1)
    return jnp.cos(phase), jnp.sin(phase)
