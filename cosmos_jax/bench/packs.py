"""What `bench attention` times: packed samples by name, and one sample of as many operations.

In: a name. Out: a `Pack`, its operation count, its operands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Segments

HEAD_DIM = 128
BACKWARD = 2.5  # operations of the backward pass over those of the forward pass: five matmuls for two


class Pack(NamedTuple):
    """samples: (text, media) tokens of each. Media queries see text and media of their sample; a pack without media is
    text alone, causal."""

    samples: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int

    @property
    def causal(self) -> bool:
        return not any(media for _, media in self.samples)

    @property
    def text(self) -> int:
        return sum(text for text, _ in self.samples)

    @property
    def media(self) -> int:
        return sum(media for _, media in self.samples)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of a head."""
        return sum(t * (t + 1) // 2 if self.causal else m * (t + m) for t, m in self.samples)

    def operations(self) -> int:
        """Of the forward pass."""
        return 4 * HEAD_DIM * self.heads * self.pairs

    def says(self) -> str:
        groups = ", ".join(f"{len(rows)} × ({t} + {m})" for (t, m), rows in self.groups().items())
        return f"{groups} tokens, {self.heads}/{self.kv_heads} heads" + (", causal" if self.causal else "")

    def groups(self) -> dict[tuple[int, int], list[int]]:
        """(text, media) → the samples of that size."""
        found: dict[tuple[int, int], list[int]] = {}
        for i, sample in enumerate(self.samples):
            found.setdefault(sample, []).append(i)
        return found

    def single(self) -> Pack:
        """One sample of (nearly) as many operations, with the text of the first: what packing is held against."""
        text = self.samples[0][0]
        if self.causal:
            return self._replace(samples=((round((math.sqrt(8 * self.pairs + 1) - 1) / 2), 0),))
        media = (math.sqrt(text**2 + 4 * self.pairs) - text) / 2
        return self._replace(samples=((text, max(128, round(media / 128) * 128)),))


NANO, EDGE, SUPER = (32, 8), (16, 8), (64, 8)
PACKS = {
    "nano-256p": Pack(((300, 2_880),), *NANO),
    "nano-480p": Pack(((300, 18_720),), *NANO),
    "nano-720p": Pack(((300, 44_160),), *NANO),
    "nano-packed": Pack(((200, 2_048),) * 16, *NANO),
    "nano-clips": Pack(((250, 3_510),) * 8, *NANO),
    "nano-mixture": Pack(((300, 18_720), *((200, 1_950),) * 8, *((150, 920),) * 12), *NANO),
    "nano-captions": Pack(((1_902, 0), (3_450, 0)), *NANO),
    "edge-480p": Pack(((300, 18_720),), *EDGE),
    "super-480p": Pack(((300, 18_720),), *SUPER),
    "scaled-256p": Pack(((80, 1_440),), 8, 2),
    "scaled-packed": Pack(((40, 256),) * 8, 8, 2),
    "scaled-captions": Pack(((300, 0), (500, 0)), 8, 2),
}
SCALED = tuple(n for n in PACKS if n.startswith("scaled"))  # what a CPU can take: the default there
FULL = tuple(n for n in PACKS if n not in SCALED)  # the default elsewhere, and `all`


class Operands(NamedTuple):
    """q, do [1,queries,heads,d]; k, v: key sets [1,keys,kv_heads,d], text first."""

    q: jax.Array
    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    do: jax.Array


def operands(pack: Pack, dtype: str) -> Operands:
    """Random, drawn on the device."""

    def draw(key):
        sets = [pack.text] if pack.causal else [pack.text, pack.media]
        keys = iter(jax.random.split(key, 2 + 2 * len(sets)))

        def one(tokens, heads):
            return jax.random.normal(next(keys), (1, tokens, heads, HEAD_DIM), jnp.dtype(dtype))

        q, do = one(sets[-1], pack.heads), one(sets[-1], pack.heads)
        return Operands(q, *(tuple(one(n, pack.kv_heads) for n in sets) for _ in range(2)), do)

    return jax.jit(draw)(jax.random.key(0))


def segments(pack: Pack) -> Segments:
    ids = [np.repeat(np.arange(len(pack.samples), dtype=np.int32), n)[None] for n in np.array(pack.samples).T]
    return Segments(jnp.asarray(ids[0]), None if pack.causal else jnp.asarray(ids[1]))


def rows(pack: Pack) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each group of equal samples: where its queries are in q, where its keys are in all key sets side by side;
    [samples, tokens] each."""
    text, media = np.array(pack.samples).T
    first_text, first_media = np.cumsum(text) - text, np.cumsum(media) - media
    found = []
    for (t, m), members in pack.groups().items():
        of_text = first_text[members][:, None] + np.arange(t)
        of_media = first_media[members][:, None] + np.arange(m)
        found.append(
            (of_text, of_text) if pack.causal else (of_media, np.concatenate([of_text, text.sum() + of_media], 1))
        )
    return found
