"""The shape of a Wan 2.2 video VAE, and how to read it from a diffusers `config.json`.

In: numbers. Out: a frozen, hashable `WanConfig` (a static jit argument); its defaults are the published Wan 2.2 VAE
(4×16×16, 48 channels) that every Cosmos 3 model uses. Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos_jax.config import ConfigError, nearest

# Statistics of the latents, one value per channel (`AutoencoderKLWan` config; the same in cosmos-framework).
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

# diffusers field → ours (the misspelling is theirs)
FIELDS = {
    "base_dim": "base_dim", "decoder_base_dim": "decoder_base_dim", "z_dim": "z_dim", "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks", "temperal_downsample": "temporal_downsample", "patch_size": "patch_size",
    "latents_mean": "latents_mean", "latents_std": "latents_std",
}  # fmt: skip
FIXED: dict[str, Any] = {"is_residual": True, "attn_scales": [], "dropout": 0.0}
IGNORED = ("clip_output",)  # published with Wan 2.2, but no parameter of `AutoencoderKLWan`: it always clips


@dataclass(frozen=True)
class WanConfig:
    base_dim: int = 160  # width of the encoder's first stage
    decoder_base_dim: int = 256  # width of the decoder's last stage
    z_dim: int = 48  # channels of the latents
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each stage, in multiples of the base
    num_res_blocks: int = 2  # per encoder stage; a decoder stage has one more
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # after which stages time is halved too
    patch_size: int = 2  # pixels per side folded into channels before the first convolution
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD

    def __post_init__(self):
        stages = len(self.dim_mult)
        if len(self.temporal_downsample) != stages - 1:
            raise ConfigError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, but {stages} stages have "
                f"{stages - 1} transitions; give one flag for each."
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ConfigError(
                    f"{name} has {len(getattr(self, name))} values, but z_dim={self.z_dim} needs as many."
                )
        if min(self.latents_std) <= 0:
            raise ConfigError("latents_std has a value that is not positive; latents are divided by it.")
        for a, b in self.shortcuts:
            if a % b:
                raise ConfigError(f"a residual shortcut cannot regroup {a} channels into {b}; change dim_mult.")

    @property
    def channels(self) -> int:
        """What enters the first convolution: RGB of one patch."""
        return 3 * self.patch_size**2

    @property
    def temporal(self) -> int:
        """Frames per latent frame (after the first, which is alone)."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial(self) -> int:
        """Pixels per latent, per side."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def encoder_dims(self) -> tuple[int, ...]:
        """Widths before and after each encoder stage."""
        return tuple(self.base_dim * m for m in (1, *self.dim_mult))

    @property
    def decoder_dims(self) -> tuple[int, ...]:
        """Widths before and after each decoder stage."""
        return tuple(self.decoder_base_dim * m for m in (self.dim_mult[-1], *self.dim_mult[::-1]))

    @property
    def temporal_upsample(self) -> tuple[bool, ...]:
        return self.temporal_downsample[::-1]

    @property
    def shortcuts(self) -> list[tuple[int, int]]:
        """(channels with the folded pixels, channels they are grouped into) of every residual shortcut."""
        down = [4 * (1 + t) for t in self.temporal_downsample] + [1]
        up = [4 * (1 + t) for t in self.temporal_upsample]
        e, d = self.encoder_dims, self.decoder_dims
        encoder = [(n * f, m) for n, m, f in zip(e[:-1], e[1:], down, strict=True)]
        return encoder + [(m * f, n) for n, m, f in zip(d[:-2], d[1:-1], up, strict=True)]

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any]) -> WanConfig:
        """The dict in a diffusers `vae/config.json` → config.

        Raises ConfigError for a field that is unknown, missing, or has a value this VAE does not implement (Wan 2.1 is
        another architecture). Nothing is filled in: the reference's defaults describe Wan 2.1.
        """
        derived = ("in_channels", "out_channels", "scale_factor_temporal", "scale_factor_spatial")
        known = {*FIELDS, *FIXED, *IGNORED, *derived}
        raw = {k: v for k, v in raw.items() if not k.startswith("_")}  # _class_name, _diffusers_version
        if unknown := sorted(set(raw) - known):
            raise ConfigError(f"VAE config: {unknown[0]} is not a field of a Wan VAE{nearest(unknown[0], known)}.")
        if missing := sorted(known - set(raw) - set(IGNORED)):
            raise ConfigError(f"VAE config: {missing[0]} is missing; use the config.json beside the weights, unedited.")
        for name, value in FIXED.items():
            if raw[name] != value:
                raise ConfigError(f"VAE config: {name}={raw[name]!r} is not supported; Wan 2.2 has {value!r}.")
        if raw["patch_size"] is None:
            raise ConfigError("VAE config: patch_size=None is Wan 2.1, which is not supported; use a Wan 2.2 VAE.")
        ours: dict[str, Any] = {
            n: tuple(raw[f]) if isinstance(raw[f], (list, tuple)) else raw[f] for f, n in FIELDS.items()
        }
        if ours["decoder_base_dim"] is None:
            ours["decoder_base_dim"] = ours["base_dim"]
        cfg = cls(**ours)
        for name, value in zip(derived, (cfg.channels, cfg.channels, cfg.temporal, cfg.spatial), strict=True):
            if raw[name] != value:
                raise ConfigError(
                    f"VAE config: {name}={raw[name]!r}, but the other fields make it {value}; correct it."
                )
        return cfg

    def to_diffusers(self) -> dict[str, Any]:
        """The inverse: a complete `vae/config.json`."""
        ours = {f: getattr(self, n) for f, n in FIELDS.items()}
        stated = {f: list(v) if isinstance(v, tuple) else v for f, v in ours.items()}
        sizes = {"in_channels": self.channels, "out_channels": self.channels}
        scales = {"scale_factor_temporal": self.temporal, "scale_factor_spatial": self.spatial}
        return {"_class_name": "AutoencoderKLWan"} | stated | FIXED | sizes | scales
