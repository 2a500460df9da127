"""The Wan 2.2 VAE behind the `VideoCodec` protocol: one clip, numpy in, numpy out.

In: uint8 video [1+4k,H,W,3]. Out: float32 latents [48,1+k,H/16,W/16], and back. A piece of the clip at a time is on
the device, so a clip may be as long as the host's memory allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.codecs.wan.vae import check_tile, decode_pieces, encode_pieces
from cosmos_jax.precision import Precision


@dataclass(frozen=True, eq=False)
class WanCodec:
    """`chunk`: latent frames per call of the device; one means two small programs for clips of every length.

    `together`: of these, how many go through the network side by side: larger products, more memory, same result up to
    round-off; not with `tile`.

    `tile`: None, or latents per side at a time, for a device with little memory: same result, slower (`vae.encode`).
    """

    cfg: WanConfig
    params: dict = field(repr=False)  # float32, or already in the compute dtype
    precision: Precision = Precision("bfloat16")  # as the latents of the published models; float32: parity
    chunk: int = 1
    tile: int | None = None
    together: int = 1

    def __post_init__(self):
        check_tile(self.tile)
        # cast once: the float32 master weights of a frozen VAE are of no use on the device
        cast = jax.tree.map(lambda p: jnp.asarray(p, self.precision.dtype), self.params)
        object.__setattr__(self, "params", cast)

    @property
    def channels(self) -> int:
        return self.cfg.z_dim

    def encode(self, video: np.ndarray) -> np.ndarray:
        """uint8, or float32 in −1 … 1, [1+4k,H,W,3] → float32 [C,1+k,H/16,W/16]. ValueError otherwise.

        H and W are multiples of 16.
        """
        if video.ndim != 4:
            raise ValueError(f"video has shape {video.shape}; the codec takes [frames,height,width,3].")
        pieces = encode_pieces(self.params, self.cfg, video[None], self.precision, self.chunk, self.tile, self.together)
        return _gather(pieces).transpose(3, 0, 1, 2).copy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """float32 [C,1+k,h,w] → uint8 [1+4k,16h,16w,3]. ValueError for another shape or values that are not finite."""
        return _gather(map(_pixels, self._decode(latents)))

    def decode_float(self, latents: np.ndarray) -> np.ndarray:
        """`decode` before rounding: float32 in −1 … 1."""
        return _gather(self._decode(latents))

    def _decode(self, latents: np.ndarray) -> Iterator[Any]:
        if latents.ndim != 4 or latents.shape[0] != self.channels:
            raise ValueError(
                f"latents have shape {latents.shape}; the codec takes [{self.channels},frames,height,width]."
            )
        batch = latents.transpose(1, 2, 3, 0)[None]
        return decode_pieces(self.params, self.cfg, batch, self.precision, self.chunk, self.tile, self.together)


def pixels(video: np.ndarray) -> np.ndarray:
    """float32 in −1 … 1 → uint8, as `WanCodec.decode` rounds."""
    return np.asarray(_pixels(video))


@jax.jit
def _pixels(video: jax.Array) -> jax.Array:
    """−1 … 1 → uint8: (x/2 + 0.5)·255 rounded half to even, as the reference's `VideoProcessor`."""
    return jnp.round((video / 2 + 0.5).clip(0, 1) * 255).astype(jnp.uint8)


def _gather(pieces: Iterable[jax.Array]) -> np.ndarray:
    """[1,T,…] pieces → one [ΣT,…] array on the host; each is fetched while the next one is computed."""
    done: list[np.ndarray] = []
    running = None
    for piece in pieces:
        if running is not None:
            done.append(np.asarray(running[0]))
        running = piece
    return np.concatenate([*done, np.asarray(running[0])])
