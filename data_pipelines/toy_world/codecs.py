"""Small frozen tokenisers for video and sound, fitted in closed form (principal components), no training.

In: pixels or waveform. Out: normalised latents with the interface of the real VAEs: causal 1+4k frames → 1+k latent
frames, 25 sound latents a second, zero mean and unit variance overall on the data they were fitted to.

Components are scaled by the *square root* of their deviation: leading ones keep a larger variance than trailing ones,
so a small model's loss is about what is visible first. (The real VAEs scale each channel to unit variance.)
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.toy_world.stream import StreamSource

SPATIAL, TEMPORAL = 8, 4  # pixels per latent side; frames per latent after the first
HOP = 320  # samples per sound latent: 8000 / 25
CHANNELS, SOUND_CHANNELS = 16, 16
LOUDEST = 4.0  # companded sound components beyond this are not of this world
FIT_EPISODES, FIT_SEED = 200, 20_000_000


@dataclass(frozen=True)
class Basis:
    """x ≈ mean + (latent · scale) @ components; the components are orthonormal rows."""

    mean: np.ndarray  # [D]
    components: np.ndarray  # [C, D]
    scale: np.ndarray  # [C]

    @classmethod
    def fit(cls, x: np.ndarray, channels: int) -> Basis:
        """x [N, D] → the leading components. Each one's sign is fixed by its largest entry."""
        mean = x.mean(0)
        d = x - mean
        _, vectors = np.linalg.eigh(d.T @ d / len(d))
        v = vectors[:, ::-1][:, :channels].T
        v = v * np.sign(v[np.arange(channels), np.abs(v).argmax(1)])[:, None]
        std = (d @ v.T).std(0)
        scale = np.sqrt(std * std.mean())  # variance of latent c is std_c / mean(std): 1 on average
        return cls(mean.astype(np.float32), v.astype(np.float32), scale.astype(np.float32))

    def encode(self, x: np.ndarray) -> np.ndarray:
        return ((x - self.mean) @ self.components.T / self.scale).astype(np.float32)

    def decode(self, z: np.ndarray) -> np.ndarray:
        return (z * self.scale) @ self.components + self.mean


def _blocks(video: np.ndarray) -> np.ndarray:
    """uint8 [1+4k,H,W,3] → pixels in −1 … 1, in blocks of four frames [1+k,h,w,768]; the first frame four times."""
    _, h, w, _ = video.shape
    x = np.concatenate([np.repeat(video[:1], TEMPORAL, 0), video[1:]]).astype(np.float32) / 127.5 - 1
    x = x.reshape(-1, TEMPORAL, h // SPATIAL, SPATIAL, w // SPATIAL, SPATIAL, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(*x.shape[:3], TEMPORAL * SPATIAL**2 * 3)


@dataclass(frozen=True)
class VideoCodec:
    """One basis for all latents, the first frame's included, so that what stands still has the same latent in each."""

    basis: Basis  # four frames: 4·8·8·3 pixels

    @classmethod
    def fit(cls, episodes, channels: int = CHANNELS) -> VideoCodec:
        blocks = [_blocks(e.video).reshape(-1, TEMPORAL * SPATIAL**2 * 3) for e in episodes]
        return cls(Basis.fit(np.concatenate(blocks), channels))

    @property
    def channels(self) -> int:
        return len(self.basis.scale)

    def encode(self, video: np.ndarray) -> np.ndarray:
        """uint8 [T,H,W,3] → float32 [C, 1+(T−1)/4, H/8, W/8]. Latent k sees frames up to 4k only.

        ValueError unless T = 1 + 4k and H, W are multiples of 8.
        """
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
            raise ValueError(f"a video is uint8 [T, H, W, 3], got {video.dtype} {video.shape}.")
        t, h, w, _ = video.shape
        if (t - 1) % TEMPORAL:
            raise ValueError(
                f"a video of {t} frames: the codec needs 1 + {TEMPORAL}k frames (1, 5, 9, 13, 17 …); cut it."
            )
        if h % SPATIAL or w % SPATIAL:
            raise ValueError(f"frames of {h}×{w} pixels: the codec needs multiples of {SPATIAL}; resize them.")
        return np.ascontiguousarray(self.basis.encode(_blocks(video)).transpose(3, 0, 1, 2))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """float32 [C,T',h,w] → uint8 [1+4(T'−1), 8h, 8w, 3]."""
        z = np.asarray(latents, np.float32).transpose(1, 2, 3, 0)
        _, h, w, _ = z.shape
        x = self.basis.decode(z).reshape(-1, h, w, TEMPORAL, SPATIAL, SPATIAL, 3).transpose(0, 3, 1, 4, 2, 5, 6)
        x = x.reshape(-1, h * SPATIAL, w * SPATIAL, 3)
        x = np.concatenate([x[:TEMPORAL].mean(0, keepdims=True), x[TEMPORAL:]])
        return (np.clip(x * 0.5 + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class SoundCodec:
    """Principal components, then sign(z)·log(1 + |z|): between silence and a hit lie two orders of magnitude."""

    basis: Basis  # HOP stereo samples
    spread: np.ndarray  # scalar: the companded components' deviation

    @classmethod
    def fit(cls, episodes, channels: int = SOUND_CHANNELS) -> SoundCodec:
        x = np.concatenate([_windows(e.sound) for e in episodes])
        basis = Basis.fit(x, channels)
        return cls(basis, np.sqrt((np.log1p(np.abs(basis.encode(x))) ** 2).mean(), dtype=np.float32))

    @property
    def channels(self) -> int:
        return len(self.basis.scale)

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """float32 [2,N] at 8 kHz → float32 [Ds, ⌈N/320⌉]. ValueError unless stereo."""
        if wave.ndim != 2 or len(wave) != 2:
            raise ValueError(f"sound is stereo [2, N], got {wave.shape}; duplicate a mono channel.")
        z = self.basis.encode(_windows(wave))
        return np.ascontiguousarray((np.sign(z) * np.log1p(np.abs(z)) / self.spread).T)

    def decode(self, latents: np.ndarray, samples: int | None = None) -> np.ndarray:
        """float32 [Ds,T] → float32 [2, samples or 320·T] in −1 … 1."""
        y = np.asarray(latents, np.float32).T * self.spread
        x = self.basis.decode(np.sign(y) * np.expm1(np.minimum(np.abs(y), LOUDEST)))
        wave = x.reshape(-1, 2, HOP).transpose(1, 0, 2).reshape(2, -1)
        return np.clip(wave[:, :samples], -1, 1).astype(np.float32)


def _windows(wave: np.ndarray) -> np.ndarray:
    """[2,N] → [⌈N/320⌉, 640], zero-padded."""
    x = np.pad(wave, ((0, 0), (0, -wave.shape[1] % HOP)))
    return x.reshape(2, -1, HOP).transpose(1, 0, 2).reshape(-1, 2 * HOP)


def fit(episodes: int = FIT_EPISODES) -> tuple[VideoCodec, SoundCodec]:
    """Both codecs from episodes that are in neither the training nor the evaluation set. Deterministic."""
    data = list(StreamSource(episodes, FIT_SEED))
    return VideoCodec.fit(data), SoundCodec.fit(data)


def _bases(video: VideoCodec, sound: SoundCodec) -> dict[str, Any]:
    named = {"video": video.basis, "sound": sound.basis}
    bases = {f"{n}/{k}": getattr(b, k) for n, b in named.items() for k in ("mean", "components", "scale")}
    return bases | {"sound/spread": sound.spread}


def fingerprint(video: VideoCodec, sound: SoundCodec) -> str:
    """Hash of every number in both codecs: latents of another fingerprint mean something else."""
    digest = hashlib.sha256()
    for name, x in sorted(_bases(video, sound).items()):
        digest.update(name.encode() + x.tobytes())
    return digest.hexdigest()[:16]


def save(path: str | pathlib.Path, video: VideoCodec, sound: SoundCodec) -> None:
    np.savez(path, **_bases(video, sound))


def load(path: str | pathlib.Path) -> tuple[VideoCodec, SoundCodec]:
    """ValueError if the file is missing."""
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"codec file {path} does not exist; train in this workdir first, or copy its assets.")
    with np.load(path) as f:
        basis = {n: Basis(*(f[f"{n}/{k}"] for k in ("mean", "components", "scale"))) for n in ("video", "sound")}
        spread = f["sound/spread"]
    return VideoCodec(basis["video"]), SoundCodec(basis["sound"], spread)


@functools.cache
def load_or_fit(path: str | pathlib.Path | None = None) -> tuple[VideoCodec, SoundCodec]:
    """The codecs of a file, or with None freshly fitted ones (a few seconds); once per process."""
    return fit() if path is None else load(path)
