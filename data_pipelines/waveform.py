"""Sound that conditions a generation: at the tokenizer's rate, in its channels, as long as the clip.

In: a waveform float32 [C,N] and its rate. Out: float32 [2,M]. Resampling is the polyphase filter of
`scipy.signal.resample_poly`, which the framework uses (cosmos-framework, inference/sound.py): a windowed sinc of ten
zero crossings to each side, Kaiser window β = 5. Loudness is normalised later, inside the tokenizer's encoder.
"""

from __future__ import annotations

import math

import numpy as np

CROSSINGS, BETA = 10, 5.0
RATES = 100, 400_000  # samples per second that a file may have


def condition(
    wave: np.ndarray, rate: int, *, frames: int, fps: float, target_rate: int = 48_000, channels: int = 2
) -> np.ndarray:
    """float32 [C,N] at `rate` → float32 [channels, int(frames / fps · target_rate)]: cut, or silence appended.

    Mono is doubled, stereo averaged where the tokenizer is mono. ValueError for other channel counts, another dtype, no
    samples, NaN, or a rate outside RATES.
    """
    if wave.ndim != 2 or wave.dtype != np.float32 or not wave.shape[1]:
        raise ValueError(f"sound must be float32 [channels, samples], got {wave.dtype} {list(wave.shape)}.")
    if not np.isfinite(wave).all():
        raise ValueError("the sound holds NaN or infinity; repair its source.")
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"sound at {rate} samples per second is not possible; {RATES[0]} to {RATES[1]} are.")
    need = samples(frames, fps, target_rate)
    heard = need * rate // target_rate + CROSSINGS * (rate // target_rate + 1) + 2  # of a long file, with the filter
    wave = resample(wave[:, :heard], rate, target_rate)
    if wave.shape[0] != channels:
        if {wave.shape[0], channels} != {1, 2}:
            raise ValueError(f"sound of {wave.shape[0]} channels cannot become {channels}; mix it to stereo first.")
        wave = np.repeat(wave, 2, 0) if channels == 2 else wave.mean(0, keepdims=True)
    return np.pad(wave[:, :need], ((0, 0), (0, max(need - wave.shape[1], 0))))


def samples(frames: int, fps: float, rate: int = 48_000) -> int:
    """Samples of the waveform of a clip: truncated."""
    return int(frames / fps * rate)


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """float32 [C,N] → float32 [C, ⌈N · target / rate⌉]."""
    common = math.gcd(rate, target)
    up, down = target // common, rate // common
    if up == down:
        return wave
    half = CROSSINGS * max(up, down)
    at = np.arange(-half, half + 1)
    h = np.sinc(at / max(up, down)) * np.kaiser(2 * half + 1, BETA)
    h = np.pad((h / h.sum()).astype(np.float32) * up, (0, -(2 * half + 1) % up)).reshape(-1, up)
    count = -(-wave.shape[1] * up // down)
    newest, phase = np.divmod(np.arange(count, dtype=np.int64) * down + half, up)  # sample under the filter's head
    after = max(int(newest[-1]) + 1 - wave.shape[1], 0)
    padded = np.pad(wave, ((0, 0), (len(h), after))).astype(np.float64)
    total = np.zeros((len(wave), count))
    for i, taps in enumerate(h):
        total += taps[phase] * padded[:, newest - i + len(h)]
    return total.astype(np.float32)
