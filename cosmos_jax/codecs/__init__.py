"""What every tokeniser of pictures and sound offers: pixels or waveform ↔ normalised latents.

In: media on the host. Out: float32 latents of about zero mean and unit variance, and back. The toy implements it with
frozen principal components (toy.py); the real VAEs implement the same two protocols.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class VideoCodec(Protocol):
    @property
    def channels(self) -> int:
        """C of the latents."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """uint8 [1+4k,H,W,3] → float32 [C,1+k,h,w]. Causal: latent i sees frames up to 4i. ValueError otherwise."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """float32 [C,1+k,h,w] → uint8 [1+4k,H,W,3]."""


class SoundCodec(Protocol):
    @property
    def channels(self) -> int:
        """Ds of the latents."""

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """float32 [2,N] → float32 [Ds,⌈25·seconds⌉]: 25 latents a second. ValueError unless stereo."""

    def decode(self, latents: np.ndarray, samples: int | None = None) -> np.ndarray:
        """float32 [Ds,T] → float32 [2,N] in −1 … 1, cut to `samples`."""
