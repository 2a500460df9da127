"""What the table sounds like, and when a sound begins.

In: impacts. Out: stereo waveform [2,N]; and from a waveform: onset times.
Pitch by material, loudness by impulse, pan by place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.toy_world.world import Event

RATE = 8000  # samples per second
PITCH = (250.0, 700.0, 1500.0)  # wood, glass, steel; Hz; multiples of the 25 Hz of sound latents
DECAY = (11.0, 8.5, 6.0)  # 1 / s
RING = 0.5  # seconds a hit is heard


def synthesise(events: Sequence[Event], seconds: float) -> np.ndarray:
    """Damped sinusoids that start exactly at the impacts. [2, seconds·8000] float32 in −1 … 1.

    All follow one clock: a ringing material has the same phase in every 40 ms latent, so latents say how loud it is.
    """
    n = int(round(seconds * RATE))
    out = np.zeros((2, n))
    for e in events:
        first = int(round(e.time * RATE))
        if first >= n:
            continue
        t = np.arange(min(int(RING * RATE), n - first)) / RATE
        clock = t + first / RATE
        loud = 0.8 * (0.4 + 0.6 * min(1.0, e.impulse / 0.6)) / len(e.materials)  # even a touch is heard
        ring = sum(np.sin(2 * np.pi * PITCH[m] * clock) * np.exp(-DECAY[m] * t) for m in e.materials)
        pan = np.array([np.sqrt(1 - e.pos[0]), np.sqrt(max(e.pos[0], 0.0))])
        out[:, first : first + len(t)] += pan[:, None] * (loud * ring)
    return np.clip(out, -1, 1).astype(np.float32)


def onsets(wave: np.ndarray, rate: int = RATE, threshold: float = 0.06) -> list[float]:
    """Times (s) at which the loudness jumps: 10 ms windows whose RMS passes `threshold` and its recent past.

    A ringing puck only decays, so that a rise by a fifth is a new impact; the absolute rise keeps beats and noise out.
    """
    hop = rate // 100
    x = wave[:, : wave.shape[1] // hop * hop].astype(np.float64)
    loud = np.sqrt((x.reshape(2, -1, hop) ** 2).mean((0, 2)))
    found: list[float] = []
    for i, level in enumerate(loud):
        past = loud[max(0, i - 3) : i].max(initial=0.0)
        if level > threshold and level > max(1.2 * past, past + 0.03) and (not found or i * 0.01 - found[-1] > 0.06):
            found.append(i * 0.01)
    return found
