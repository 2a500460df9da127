"""Rectified flow and its loss: the laws, the masks, and what they may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos_jax import flow
from cosmos_jax.config import FlowConfig, ModelConfig
from data_pipelines.schema import Bucket, empty_batch

CFG = ModelConfig(
    layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, mlp=16, rope_sections=(2, 1, 1), vocab=64,
    latent_channels=3, action_dim=5, sound_dim=4,
)  # fmt: skip
BUCKET = Bucket(rows=2, und=4, gen=16, vision=8, action=4, sound=4, segments=2)


def batch():
    b = empty_batch(BUCKET, CFG.sequence)
    rng = np.random.RandomState(0)
    for name, n in (("vision", 8), ("action", 4), ("sound", 4)):
        b[f"{name}_x0"][:] = rng.standard_normal(b[f"{name}_x0"].shape)
        b[f"{name}_index"][:] = np.arange(n)
        b[f"{name}_segment_ids"][:] = np.arange(n) // (n // 2)
        b[f"{name}_token_ids"][:] = np.arange(n) % (n // 2)
        b[f"{name}_noisy"][:] = np.arange(n) % (n // 2) > 0
    b["vision_extent"][:] = (2, 1)
    b["action_width"][:] = 3
    b["segment_sample_id"][:] = [[11, 12], [13, 14]]
    b["segment_is_image"][0, 0] = True
    b["segment_shift"][:] = [[1, 3], [5, 10]]
    return b


def test_interpolation_and_target():
    b, key = batch(), jax.random.key(0)
    out = flow.noise_batch(key, b, FlowConfig(), CFG.patch)
    for name in ("vision", "action", "sound"):
        noisy = b[f"{name}_noisy"][..., None]
        sigma = np.take_along_axis(np.asarray(out.sigma), b[f"{name}_segment_ids"], 1)[..., None]
        x0 = b[f"{name}_x0"]
        x_t, v = np.asarray(out.x_t[name]), np.asarray(out.velocity[name])
        np.testing.assert_array_equal(np.where(noisy, 0, x_t), np.where(noisy, 0, x0))  # clean tokens keep x0
        np.testing.assert_array_equal(np.where(noisy, 0, v), 0)
        supervised = v != 0
        np.testing.assert_allclose((x_t - sigma * v)[supervised], x0[supervised], atol=2e-6)
        np.testing.assert_allclose((x_t + (1 - sigma) * v)[supervised], (v + x0)[supervised], atol=2e-6)
    # the zero-padded edge column of a 2×2 patch, and channels past the raw width, carry nothing
    column = np.arange(CFG.sequence.patch_dim) // CFG.latent_channels % 2
    assert not np.asarray(out.velocity["vision"])[..., column == 1].any()
    assert not np.asarray(out.velocity["action"])[..., 3:].any()


def test_noise_depends_on_the_sample_not_on_its_place():
    """Swap the two segments and the rows of a batch: every sample keeps its sigma and its noise."""
    b, key = batch(), jax.random.key(1)
    b["segment_is_image"][:], b["segment_shift"][:] = False, 3
    swapped = {k: v.copy() for k, v in b.items()}
    swapped["segment_sample_id"] = b["segment_sample_id"][::-1, ::-1].copy()
    sigma, sigma_s = flow.draw_sigma(key, b, FlowConfig()), flow.draw_sigma(key, swapped, FlowConfig())
    np.testing.assert_array_equal(sigma, sigma_s[::-1, ::-1])
    noise, noise_s = flow.draw_noise(key, b, "vision"), flow.draw_noise(key, swapped, "vision")
    np.testing.assert_array_equal(noise[0, :4], noise_s[1, 4:])
    assert np.abs(np.asarray(noise[0, :4] - noise[0, 4:])).max() > 0.1


def test_sigma_laws():
    """Means and quantiles of a million draws against the closed forms of the reference (spec §6.2)."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    waver = np.asarray(flow.sigma_law("waver", jnp.zeros(()), jnp.asarray(u)))
    np.testing.assert_allclose(waver, 1 - u - 1.29 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u), atol=2e-6)
    assert waver.min() >= -1e-6 and waver.max() <= 1 + 1e-6
    n = np.random.RandomState(0).standard_normal(200_000)
    logit = np.asarray(flow.sigma_law("logitnormal", jnp.asarray(n), jnp.zeros(())))
    assert abs(np.quantile(logit, 0.5) - 0.5) < 5e-3 and abs(np.quantile(logit, 0.8413) - 1 / (1 + np.e**-1)) < 5e-3
    assert flow.shift_sigma(0.5, 10.0) == pytest.approx(10 / 11)
    assert flow.shift_sigma(0.3, 1.0) == pytest.approx(0.3)


def test_image_and_video_use_their_own_law():
    """Rows differ only in `is_image`: with equal draws the sigmas differ, and follow their laws."""
    b, key = batch(), jax.random.key(2)
    b["segment_shift"][:] = 1
    b["segment_sample_id"][:] = 5
    sigma = np.asarray(flow.draw_sigma(key, b, FlowConfig()))
    assert sigma[0, 0] != sigma[0, 1] and sigma[0, 1] == sigma[1, 0] == sigma[1, 1]
