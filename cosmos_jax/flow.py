"""Rectified flow: draw sigma and noise, interpolate, name the target.

In: packed batch of clean latents. Out: x_t, the velocity to predict, sigma per segment. Spec model.md §6.1–6.2
(formulas: `pallas_kernels.flow.noising`):

    x_t = sigma · noise + (1 − sigma) · x0        velocity = noise − x0        x0 = x_t − sigma · velocity

Everything is float32. The randomness of a sample depends on (key, its sample id, its token number) alone, so the same
samples get the same noise however they are packed, sharded or split into micro-batches.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cosmos_jax import shard
from cosmos_jax.config import FlowConfig
from cosmos_jax.model.modality import noisy_elements, take_rows
from data_pipelines.schema import MODALITIES
from pallas_kernels import flow as kernels


class Noised(NamedTuple):
    x_t: dict[str, jax.Array]  # shaped like `*_x0`
    x0: dict[str, jax.Array]  # the batch's own
    noise: dict[str, jax.Array]  # shaped like x0
    noisy: dict[str, jax.Array]  # bool like x0: where x_t has noise and a velocity is supervised
    sigma: jax.Array  # [B,N] in (0, 1)

    @property
    def velocity(self) -> dict[str, jax.Array]:
        """The target; 0 where nothing is supervised. (The loss needs it nowhere whole.)"""
        return {n: kernels.velocity(self.x0[n], self.noise[n], self.noisy[n]) for n in self.x0}

    @property
    def timesteps(self) -> jax.Array:
        """[B,N]: 1000·sigma, not rounded (training never rounds; spec model.md §4.6)."""
        return 1000.0 * self.sigma


def shift_sigma(t, shift):
    """σ = s·t / (1 + (s − 1)·t): more noise for larger pictures."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def sigma_law(name: str, normal: jax.Array, uniform: jax.Array) -> jax.Array:
    """Raw t from a standard normal and a uniform draw (RF:13-92)."""
    if name == "logitnormal":
        return jax.nn.sigmoid(normal)
    if name == "waver":
        return 1.0 - uniform - 1.29 * (jnp.cos(jnp.pi / 2.0 * uniform) ** 2 - 1.0 + uniform)
    return uniform


def draw_sigma(key: jax.Array, batch: dict, cfg: FlowConfig) -> jax.Array:
    """One sigma per segment, shared by all its frames and modalities. [B,N] float32."""

    def draw(sample_ids, is_image, shift, key):
        def one(sample_id):
            a, b = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 0), sample_id))
            return jax.random.normal(a), jax.random.uniform(b)

        normal, uniform = jax.vmap(jax.vmap(one))(sample_ids)
        image, video = (sigma_law(law, normal, uniform) for law in (cfg.sigma_image, cfg.sigma_video))
        return shift_sigma(jnp.where(is_image, image, video), shift)

    rows = (batch["segment_sample_id"], batch["segment_is_image"], batch["segment_shift"])
    return shard.rowwise_shared(draw, rows, (key,))


def draw_noise(key: jax.Array, batch: dict, name: str) -> jax.Array:
    """Unit Gaussian noise shaped like `{name}_x0`, reproducible per sample and token."""
    features = batch[f"{name}_x0"].shape[-1]

    def draw(sample_ids, segment_ids, token_ids, key):
        key = jax.random.fold_in(key, 1 + MODALITIES.index(name))
        samples = jnp.take_along_axis(sample_ids, jnp.maximum(segment_ids, 0), axis=1)

        def one(sample, token):
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), token), (features,))

        return jax.vmap(jax.vmap(one))(samples, token_ids)

    rows = (batch["segment_sample_id"], batch[f"{name}_segment_ids"], batch[f"{name}_token_ids"])
    return shard.rowwise_shared(draw, rows, (key,))


def noise_batch(key: jax.Array, batch: dict, cfg: FlowConfig, patch: int) -> Noised:
    """Noise every noisy token of the batch. Clean tokens keep x0 exactly; invalid elements are 0."""
    sigma = draw_sigma(key, batch, cfg)
    x0 = {n: batch[f"{n}_x0"] for n in MODALITIES if batch[f"{n}_x0"].size}
    noise = {n: draw_noise(key, batch, n) for n in x0}
    noisy = {n: noisy_elements(batch, n, patch) for n in x0}
    x_t = {}
    for n in x0:
        per_token = take_rows(sigma[..., None], batch[f"{n}_segment_ids"])[..., 0]
        x_t[n] = kernels.noise(x0[n], noise[n], per_token, noisy[n])
    return Noised(x_t, x0, noise, noisy, sigma)
