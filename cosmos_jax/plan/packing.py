"""How full a pack is: the stated samples that a plan counts its work from.

In: `Config`, names of sizes. Out: `Packing`: the real tokens of one pack, and what the hardware computes for it.
Imports no jax.

The capacity of the bucket decides the memory; the samples decide the work. A pack takes the sizes of the mix in their
order, each as often as it fits: with the default, 65,536 generated tokens hold one 720p video (44,160 tokens) and one
480p video (18,720). Each has a caption of 1,902 tokens, the length that the model cards recommend.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_jax.config import Config, ConfigError
from cosmos_jax.flops import Counts

CAPTION = 1902
NEGATIVE = 3450  # of the other guidance branch, as in bench/work.py
FRAMES = 48  # latent frames of 189 at 24 per second
LATENTS = {"720p": (FRAMES, 45, 80), "480p": (FRAMES, 30, 52), "256p": (FRAMES, 12, 20), "t2i": (1, 45, 80)}
MIX = ("720p", "480p", "256p", "t2i")


@dataclass(frozen=True)
class Packing:
    """One row of the bucket. samples: (text tokens, generated tokens) of each."""

    samples: tuple[tuple[int, int], ...]
    says: str
    und: int  # capacities
    gen: int

    @property
    def real(self) -> Counts:
        """Tokens and pairs that the model needs: what MFU counts."""
        und, gen = (sum(s[i] for s in self.samples) for i in (0, 1))
        return Counts(
            und=und, gen=gen, vision=gen, segments=len(self.samples),
            und_pairs=sum(u * (u + 1) // 2 for u, _ in self.samples),
            gen_pairs=sum(g * (u + g) for u, g in self.samples),
        )  # fmt: skip

    def computed(self, skips: bool) -> Counts:
        """Tokens and pairs that the hardware computes: padding goes through every matmul.

        skips: the attention kernel leaves out what nobody sees; plain XLA does not.
        """
        real = self.real
        pairs = (real.und_pairs, real.gen_pairs) if skips else (self.und**2, self.gen * (self.und + self.gen))
        return Counts(
            und=self.und, gen=self.gen, vision=self.gen, text=self.und, segments=len(self.samples),
            und_pairs=pairs[0], gen_pairs=pairs[1],
        )  # fmt: skip

    @property
    def share(self) -> float:
        """Real tokens of all tokens."""
        return (self.real.und + self.real.gen) / (self.und + self.gen)


def tokens(size: str, patch: int) -> int:
    """Generated tokens of one video or picture. ConfigError for an unknown size."""
    if size not in LATENTS:
        raise ConfigError(f"{size!r} is no size; there are {', '.join(LATENTS)}.")
    frames, height, width = LATENTS[size]
    return frames * -(-height // patch) * -(-width // patch)


def pack(config: Config, mix: tuple[str, ...] = MIX) -> Packing:
    """Fill one row of config.data.bucket. One that is too small for any of them holds one sample, as large as it."""
    b = config.data.bucket
    und, gen = b.und, min(b.gen, b.vision)
    samples: list[tuple[int, int]] = []
    names: list[str] = []
    for size in mix:
        n = tokens(size, config.model.patch)
        fits = min(gen // n, und // CAPTION, b.segments - len(samples))
        samples += [(CAPTION, n)] * fits
        names += [f"{fits} × {size}"] * bool(fits)
        und, gen = und - fits * CAPTION, gen - fits * n
    if not samples:
        return Packing(((b.und, b.gen),), "one sample as large as the bucket", b.und, b.gen)
    return Packing(tuple(samples), " + ".join(names), b.und, b.gen)
