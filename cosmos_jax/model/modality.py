"""Between latents and tokens: projections in and out of the gen stream, and the timestep embedding.

In: x_t buffers per modality. Out: the gen stream; and back: hidden states → velocities. Spec model.md §2.5–2.7.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cosmos_jax import shard
from cosmos_jax.model.declare import Dense, param, truncated, use, zeros
from cosmos_jax.precision import Precision

SINUSOIDS = 128  # frequencies of the timestep embedding
TIME_PRECISION = Precision("float32", "highest")  # fp32 island (NUM-3)


class TimeEmbedder(nnx.Module):
    """sigma → sinusoid (cos first) → Linear → SiLU → Linear, all in float32 (spec model.md §2.5)."""

    def __init__(self, rngs, hidden: int):
        self.linear_1 = Dense(rngs, 2 * SINUSOIDS, hidden, ("feature", "hidden"), truncated((2 * SINUSOIDS) ** -0.5))
        self.linear_2 = Dense(rngs, hidden, hidden, ("embed", "hidden"), truncated(hidden**-0.5))

    def __call__(self, timesteps: jax.Array, scale: float) -> jax.Array:
        """timesteps [B, N] float32 in 0 … 1000 → [B, N, D] float32."""
        exponent = np.float32(-np.log(10000.0)) * np.arange(SINUSOIDS, dtype=np.float32) / np.float32(SINUSOIDS)
        phase = (timesteps.astype(jnp.float32) * jnp.float32(scale))[..., None] * np.exp(exponent)
        x = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], -1)
        return self.linear_2(jax.nn.silu(self.linear_1(x, TIME_PRECISION)), TIME_PRECISION)


class DomainDense(nnx.Module):
    """One affine map per embodiment domain: y = x W[d] + b[d], W [domains, in, out] (spec model.md §2.6).

    The selection is a one-hot product, not a gather of matrices: a gather would read in·out weights per token.
    """

    def __init__(self, rngs, domains: int, n_in: int, n_out: int, axes: tuple[str, str], std: float):
        self.kernel = param(rngs, (domains, n_in, n_out), ("domains", *axes), truncated(std))
        self.bias = param(rngs, (domains, n_out), ("domains", axes[1]), zeros)

    def __call__(self, x: jax.Array, domain: jax.Array, precision: Precision) -> jax.Array:
        """x [B,N,in], domain [B,N] int32 → [B,N,out]."""
        kernel, bias = use(self.kernel, precision), use(self.bias, precision)
        domains, n_in, n_out = kernel.shape
        one_hot = (domain[..., None] == jnp.arange(domains)).astype(precision.dtype)
        x = x.astype(precision.dtype)
        kw = dict(matmul=precision.matmul)
        if n_in <= n_out:  # expand on the narrow side
            spread = x[:, :, None, :] * one_hot[..., None]
            y = shard.einsum("bndi,dio->bno", spread, kernel, out=("batch", "token", "act"), **kw)
        else:
            every = shard.einsum("bni,dio->bndo", x, kernel, out=("batch", "token", "domains", "feature"), **kw)
            y = (every * one_hot[..., None]).sum(2)
        return y + shard.einsum("bnd,do->bno", one_hot, bias, out=("batch", "token", "act"), **kw)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B,M,D], index [B,K] → [B,K,D]; index -1 gives zeros. Where index is spread over devices, so is the result."""
    axes = ("batch", shard.token_axis(index))
    return shard.rowwise(_take, x, index, takes=(shard.ROWS, axes), gives=axes)


def _take(x, index):
    rows = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where((index >= 0)[..., None], rows, jnp.zeros((), x.dtype))


def collect_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`take_rows` of an x [B,M,D] that is spread over devices: each gives what it has, and the sum is whole."""
    axis = shard.token_axis(x)
    if axis == "token":
        return take_rows(x, index)

    def own(x, index):
        here = index - jax.lax.axis_index(shard.RULES[axis]) * x.shape[1]
        mine = jnp.where((here >= 0) & (here < x.shape[1]), here, -1)
        return jax.lax.psum(_take(x, mine), shard.RULES[axis])

    return shard.rowwise(own, x, index, takes=(("batch", axis),))


def valid_elements(batch: dict, name: str, patch: int) -> jax.Array:
    """[B, tokens, features] bool: elements that exist: no zero-padded patch edge, no channel past the raw width.

    Padding tokens are all False.
    """
    x = batch[f"{name}_x0"]
    real = (batch[f"{name}_index"] >= 0)[..., None]
    if name == "sound":
        return jnp.broadcast_to(real, x.shape)
    feature = jnp.arange(x.shape[-1])
    if name == "action":
        return real & (feature < batch["action_width"][..., None])
    channels = x.shape[-1] // (patch * patch)
    row, col = feature // (patch * channels), feature // channels % patch
    extent = batch["vision_extent"]
    return real & (row < extent[..., :1]) & (col < extent[..., 1:])


def noisy_elements(batch: dict, name: str, patch: int) -> jax.Array:
    """[B, tokens, features] bool: elements that are noised, predicted, supervised: the valid ones of noisy tokens."""
    return valid_elements(batch, name, patch) & batch[f"{name}_noisy"][..., None]


class Modalities(nnx.Module):
    """Every projection into and out of the gen stream. Absent modalities have no parameters."""

    def __init__(self, cfg, rngs):
        d, patch_dim = cfg.hidden, cfg.sequence.patch_dim
        out = truncated(d**-0.5)
        self.time = TimeEmbedder(rngs, d)
        self.vision_in = Dense(rngs, patch_dim, d, ("feature", "embed"), truncated(patch_dim**-0.5))
        self.vision_out = Dense(rngs, d, patch_dim, ("embed", "feature"), out)
        a, s = cfg.action_dim, cfg.sound_dim
        self.action_in = DomainDense(rngs, cfg.domains, a, d, ("feature", "embed"), a**-0.5) if a else None
        self.action_out = DomainDense(rngs, cfg.domains, d, a, ("embed", "feature"), d**-0.5) if a else None
        self.action_embed = param(rngs, (d,), ("hidden",), out) if a else None
        self.sound_in = Dense(rngs, s, d, ("feature", "embed"), truncated(s**-0.5)) if s else None
        self.sound_out = Dense(rngs, d, s, ("embed", "feature"), out) if s else None
        self.sound_embed = param(rngs, (d,), ("hidden",), out) if s else None

    def names(self, batch: dict) -> list[str]:
        """Modalities that the model has and the batch has room for, in buffer order."""
        have = {"vision": True, "action": self.action_in is not None, "sound": self.sound_in is not None}
        return [n for n in ("vision", "action", "sound") if have[n] and batch[f"{n}_x0"].shape[1]]

    def embed(
        self, batch: dict, noised: dict, timesteps: jax.Array, scale: float, precision: Precision, axis: str = "token"
    ) -> jax.Array:
        """x_t buffers → gen stream [B,G,D], its tokens along the logical axis `axis`.

        Noisy tokens get the time row of their segment, clean ones none. Vision, most of the stream, is put in order
        before it is projected, so that each device projects its own tokens.
        """
        source = shard.constrain(batch["gen_source"], ("batch", axis))  # [B,G]: slot in the buffers, side by side
        names, start = self.names(batch), 0
        h, noisy = None, []
        for name in names:
            x, size = noised[name], noised[name].shape[1]
            index = jnp.where((source >= start) & (source < start + size), source - start, -1)
            start += size
            if name == "vision":
                part = jnp.where((index >= 0)[..., None], self.vision_in(take_rows(x, index), precision), 0)
            elif name == "action":
                part = self.action_in(x, batch["action_domain"], precision) + use(self.action_embed, precision)
                part = take_rows(part, index)
            else:
                part = take_rows(self.sound_in(x, precision) + use(self.sound_embed, precision), index)
            h = part if h is None else h + part
            noisy.append(take_rows(batch[f"{name}_noisy"][..., None], index)[..., 0])
        segments = shard.constrain(batch["gen_segment_ids"], ("batch", axis))
        time = self.time(timesteps, scale).astype(precision.dtype)
        return h + take_rows(time, jnp.where(functools.reduce(jnp.logical_or, noisy), segments, -1))

    def velocity(self, batch: dict, hidden: jax.Array, patch: int, precision: Precision) -> dict[str, jax.Array]:
        """Normalised gen hidden states [B,G,D] → float32 velocities; exactly 0 on clean, padded, invalid elements."""
        result = {}
        for name in self.names(batch):
            index = batch[f"{name}_index"]
            if name == "vision":  # narrow before it travels
                v = collect_rows(self.vision_out(hidden, precision, out=("batch", shard.SAME, "feature")), index)
            elif name == "action":
                v = self.action_out(collect_rows(hidden, index), batch["action_domain"], precision)
            else:
                v = self.sound_out(collect_rows(hidden, index), precision, out=("batch", "token", "feature"))
            result[name] = jnp.where(noisy_elements(batch, name, patch), v.astype(jnp.float32), 0.0)
        return result
