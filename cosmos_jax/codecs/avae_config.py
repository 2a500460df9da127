"""Sizes of the sound tokeniser (AVAE), as the `config.json` beside its weights states them.

In: that file as a dict. Out: an `AVAEConfig`, or one sentence that names the field which this implementation does not
honour. Fields carry the names of diffusers' `Cosmos3AVAEAudioTokenizer`; the defaults are the released tokeniser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

CHANNELS = 2  # stereo in, stereo out

# Fields with a single implemented value: the one that every Cosmos 3 checkpoint has.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("autoencoder_v2",), "stereo": (True,), "input_channels": (1,), "dec_out_channels": (CHANNELS,),
    "use_wav_as_input": (True,), "enc_type": ("spec_convnext",), "enc_use_snake": (True,), "dec_type": ("oobleck",),
    "dec_use_snake": (True,), "dec_final_tanh": (False,), "dec_anti_aliasing": (False,),
    "dec_use_nearest_upsample": (False,), "dec_use_tanh_at_final": (False,), "bottleneck_type": ("vae",),
    "bottleneck": (None, {"type": "vae"}), "activation": ("snakebeta",), "snake_logscale": (True,),
    "anti_aliasing": (False,), "use_cuda_kernel": (False,), "causal": (False,), "padding_mode": ("zeros",),
    "latent_mean": (None,), "latent_std": (None,),
}  # fmt: skip

# Fields without any effect on encoding and decoding, in diffusers too.
WITHOUT_EFFECT = ("enc_intermediate_dim", "enc_num_layers", "enc_identity_init")


@dataclass(frozen=True)
class AVAEConfig:
    sampling_rate: int = 48_000  # Hz
    vocoder_input_dim: int = 64  # channels of the latents
    normalize_volume: bool = True  # scale a clip to a peak of 0.95 before encoding it
    hop_size: int | None = None  # samples per latent; None: the product of dec_strides
    enc_dim: int = 192  # width of the first encoder stage
    enc_num_blocks: int = 2  # ConvNeXt blocks per stage
    enc_n_fft: int = 64  # samples per spectrum
    enc_hop_length: int = 16  # samples between spectra
    enc_latent_dim: int = 128  # mean and scale of the posterior
    enc_c_mults: tuple[int, ...] = (1, 2, 4)  # width of each encoder stage, in enc_dim
    enc_strides: tuple[int, ...] = (4, 5, 6)
    dec_dim: int = 320  # width of the last decoder block
    dec_c_mults: tuple[int, ...] = (1, 2, 4, 8, 16)  # widths from the output back to the latents, in dec_dim
    dec_strides: tuple[int, ...] = (2, 4, 5, 6, 8)  # in the same order: from the output back to the latents
    encoder_enabled: bool = True  # False: a checkpoint that can only decode

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"AVAE config: {f.name}={value!r} must be true or false.")
                continue
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if value == () or any(not isinstance(n, int) or n < 1 for n in numbers):
                raise ValueError(f"AVAE config: {f.name}={value!r} must be made of whole numbers, at least 1.")
        for name in ("enc", "dec"):
            widths, strides = getattr(self, f"{name}_c_mults"), getattr(self, f"{name}_strides")
            if len(widths) != len(strides):
                raise ValueError(f"AVAE config: {name}_c_mults={widths} and {name}_strides={strides} differ in length.")
        encoder = self.enc_hop_length * math.prod(self.enc_strides)
        if self.encoder_enabled and encoder != self.hop:
            raise ValueError(
                f"AVAE config: enc_hop_length={self.enc_hop_length} and enc_strides={self.enc_strides} make "
                f"{encoder} samples per latent, but the decoder makes {self.hop} of one."
            )
        if self.hop_size not in (None, self.hop):
            raise ValueError(
                f"AVAE config: hop_size={self.hop_size}, but dec_strides={self.dec_strides} multiply to {self.hop}."
            )
        if self.enc_latent_dim != 2 * self.vocoder_input_dim:
            raise ValueError(
                f"AVAE config: enc_latent_dim={self.enc_latent_dim} must be twice vocoder_input_dim="
                f"{self.vocoder_input_dim}: the mean and the scale of the posterior."
            )
        if self.enc_n_fft % 2 or self.enc_n_fft < self.enc_hop_length:
            raise ValueError(
                f"AVAE config: enc_n_fft={self.enc_n_fft} must be even, and at least enc_hop_length="
                f"{self.enc_hop_length}."
            )

    @property
    def hop(self) -> int:
        """Samples per latent: 1,920 for the released tokeniser, so 25 latents a second."""
        return math.prod(self.dec_strides)

    @property
    def enc_widths(self) -> tuple[int, ...]:
        """Width of each encoder stage, and of what leaves the last one."""
        return tuple(self.enc_dim * m for m in (*self.enc_c_mults, self.enc_c_mults[-1]))

    @property
    def dec_stages(self) -> tuple[tuple[int, int, int], ...]:
        """(width in, width out, stride) of the decoder blocks, from the latents to the sound."""
        widths = tuple(self.dec_dim * m for m in (1, *self.dec_c_mults))[::-1]
        return tuple(zip(widths[:-1], widths[1:], self.dec_strides[::-1], strict=True))


def from_diffusers(config: dict[str, Any]) -> AVAEConfig:
    """`config.json` of diffusers' `Cosmos3AVAEAudioTokenizer` → AVAEConfig; absent fields have diffusers' defaults.

    Raises ValueError with one sentence for a field that is unknown or has a value that is not implemented.
    """
    known = {f.name for f in fields(AVAEConfig)}
    values: dict[str, Any] = {}
    for name, value in config.items():
        if name in known:
            values[name] = tuple(value) if isinstance(value, list) else value
        elif name in FIXED:
            if value not in FIXED[name]:
                wanted = " or ".join(map(repr, FIXED[name]))
                raise ValueError(f"AVAE config: {name}={value!r} is not implemented, only {wanted} is.")
        elif name == "_class_name":
            if value != "Cosmos3AVAEAudioTokenizer":
                raise ValueError(f"AVAE config: _class_name={value!r} is not Cosmos3AVAEAudioTokenizer.")
        elif name not in WITHOUT_EFFECT and not name.startswith("_"):
            raise ValueError(f"AVAE config: {name}={value!r} is a field that this version does not know.")
    return AVAEConfig(**values)


def to_diffusers(cfg: AVAEConfig) -> dict[str, Any]:
    """The inverse: a complete `config.json`."""
    ours = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    stated = {k: list(v) if isinstance(v, tuple) else v for k, v in ours.items()}
    fixed = {name: values[-1] for name, values in FIXED.items()}
    return {"_class_name": "Cosmos3AVAEAudioTokenizer"} | fixed | stated
