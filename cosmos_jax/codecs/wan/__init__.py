"""The Wan 2.2 video VAE: 4×16×16, 48 channels (diffusers: `AutoencoderKLWan` with is_residual).

config (the numbers) → params (the shapes) → layers → tiling (where to cut a frame) → network (one piece of a clip) →
vae (whole clips, latents normalised) → codec (numpy in, numpy out: the `VideoCodec` protocol). bench tells what memory
that takes. The weights come through conversion/wan.py.
"""

from cosmos_jax.codecs.wan.codec import WanCodec
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.codecs.wan.params import abstract, init
from cosmos_jax.codecs.wan.vae import decode, encode

__all__ = ["WanCodec", "WanConfig", "abstract", "decode", "encode", "init"]
