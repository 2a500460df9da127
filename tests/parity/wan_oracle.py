"""The oracle of the video VAE: diffusers' `AutoencoderKLWan` on the CPU, tiny, every weight random.

Stock initialisation leaves gammas at one and hides bugs. Latents are normalised as in `Cosmos3OmniPipeline`. Thresholds
are those of the parity protocol: encode relL2 ≤ 2.5e-6, decode ≤ 3e-6, max/rms ≤ 3e-5.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from parity.oracle import rng

from conversion.check import check
from conversion.tree import from_torch
from conversion.wan import entries
from cosmos_jax.codecs.wan import abstract
from cosmos_jax.codecs.wan.config import MEAN, STD, WanConfig

TINY = dict(
    base_dim=8, decoder_base_dim=12, z_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0,
    temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
    scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=list(MEAN[:8]), latents_std=list(STD[:8]),
)  # fmt: skip
ENCODE, DECODE, PEAK = 2.5e-6, 3e-6, 3e-5


def reference(seed: int = 4) -> AutoencoderKLWan:
    """The PyTorch VAE with every parameter drawn from a generator named after it."""
    vae = AutoencoderKLWan(**TINY).eval()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            x = rng(name, seed).standard_normal(tuple(p.shape))
            leaf = name.rsplit(".", 1)[-1]
            x = {"gamma": 1 + 0.25 * x, "bias": 0.1 * x}.get(leaf, 0.9 * x / math.sqrt(math.prod(p.shape[1:])))
            p.copy_(torch.from_numpy(x))
    return vae


def params(vae: AutoencoderKLWan, cfg: WanConfig) -> dict:
    state = {k: v.detach().float().numpy() for k, v in vae.state_dict().items()}
    check(entries(cfg), {k: v.shape for k, v in state.items()}, abstract(cfg))
    return from_torch(entries(cfg), state)


def _statistics(vae):
    mean = torch.tensor(vae.config.latents_mean, dtype=vae.dtype).view(1, -1, 1, 1, 1)
    return mean, (1.0 / torch.tensor(vae.config.latents_std, dtype=vae.dtype)).view(1, -1, 1, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: np.ndarray) -> np.ndarray:
    """[B,T,H,W,3] in −1 … 1 → normalised latents [B,t,h,w,z], float32."""
    x = torch.from_numpy(np.ascontiguousarray(video.transpose(0, 4, 1, 2, 3))).to(vae.dtype)
    mean, inverse = _statistics(vae)
    z = (vae.encode(x).latent_dist.mode() - mean) * inverse
    return z.float().permute(0, 2, 3, 4, 1).numpy()


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: np.ndarray) -> np.ndarray:
    """Normalised latents [B,t,h,w,z] → [B,T,H,W,3] in −1 … 1, float32."""
    z = torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 4, 1, 2, 3))).to(vae.dtype)
    mean, inverse = _statistics(vae)
    return vae.decode(z / inverse + mean).sample.float().permute(0, 2, 3, 4, 1).numpy()
