"""The oracle of the video VAE: diffusers' `AutoencoderKLWan`, tiny, as `cosmos_jax.parity` builds and feeds it."""

from cosmos_jax.parity.rows import DECODE_VIDEO as DECODE
from cosmos_jax.parity.rows import ENCODE_VIDEO as ENCODE
from cosmos_jax.parity.tiny import VAE as TINY
from cosmos_jax.parity.tiny import vae as reference
from cosmos_jax.parity.video import decode, encode, params

__all__ = ["DECODE", "ENCODE", "PEAK", "TINY", "decode", "encode", "params", "reference"]

PEAK = 3e-5  # max/rms
