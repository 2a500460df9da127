"""The sound tokeniser (AVAE): stereo waveform ↔ 25 latents a second (spec model.md §9.1).

In: waves [B,N,2] float32. Out: latents [B,⌈N/hop⌉,64] float32, and back; inside everything is channels-last [B,T,C].
The encoder is a ConvNeXt on short spectra, the decoder an Oobleck vocoder with SnakeBeta (diffusers:
`Cosmos3AVAEAudioTokenizer`). Pure functions on a nested dict; `AVAECodec` wraps them for the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.codecs.avae_config import CHANNELS, AVAEConfig, from_diffusers
from cosmos_jax.codecs.avae_params import DILATIONS, KERNEL, Params, abstract, init, length
from cosmos_jax.precision import HIGHEST, Precision

NORM_EPS = 1e-5  # in LayerNorm
PEAK_EPS = 1e-5  # silence is not divided by zero
SNAKE_EPS = 1e-9
PEAK = 0.95

Stage = Callable[[jax.Array], jax.Array]

__all__ = ["AVAECodec", "AVAEConfig", "abstract", "decode", "decode_raw", "encode", "from_diffusers", "init"]


def encode(params: Params, cfg: AVAEConfig, wave: jax.Array, *, precision: Precision = HIGHEST) -> jax.Array:
    """wave [B,N,2] float32 → latents [B,⌈N/hop⌉,C] float32: the mean of the posterior, so deterministic. Traceable.

    Each clip is scaled to a peak of 0.95 (if `normalize_volume`), so the loudness of the wave is lost and its range is
    free; then it is zero-padded on the right to whole latents. (diffusers takes the peak over the whole batch, which
    makes a clip depend on its neighbours; with one clip the two agree. The framework samples the posterior instead.)
    Raises ValueError for another shape or dtype, for an empty wave, and without encoder parameters.
    """
    if "encoder" not in params:
        raise ValueError("these AVAE parameters have no encoder: the checkpoint can only decode.")
    if wave.ndim != 3 or wave.shape[2] != CHANNELS:
        raise ValueError(f"the wave must be stereo [B, N, 2], got {wave.shape}; duplicate a mono channel.")
    if wave.dtype != jnp.float32:
        raise ValueError(f"the wave must be float32, got {wave.dtype}; divide int16 samples by 32768.")
    if not wave.shape[1]:
        raise ValueError("the wave is empty; it needs at least one sample.")
    x = spectra(wave, cfg, precision)
    for stage in encoder_stages(params, cfg, precision).values():
        x = stage(x)
    return x[..., : cfg.vocoder_input_dim].astype(jnp.float32)


def spectra(wave: jax.Array, cfg: AVAEConfig, precision: Precision) -> jax.Array:
    """wave [B,N,2] float32 → [B,T,2·(n_fft+2)], what enters the encoder: scaled, padded to whole latents, spectra."""
    if cfg.normalize_volume:
        wave = wave / (jnp.abs(wave).max((1, 2), keepdims=True) + PEAK_EPS) * PEAK
    wave = jnp.pad(wave, ((0, 0), (0, -wave.shape[1] % cfg.hop), (0, 0)))
    return _spectra(wave.astype(precision.dtype).astype(jnp.float32), cfg).astype(precision.dtype)


def encoder_stages(params: Params, cfg: AVAEConfig, precision: Precision) -> dict[str, Stage]:
    """What `encode` does to the spectra, in its order: name → function of [B,T,C]."""
    enc = params["encoder"]
    stages: dict[str, Stage] = {"conv_in": functools.partial(_wn_conv, enc["conv_in"], precision=precision)}
    for i, stride in enumerate(cfg.enc_strides):
        stage, pad = enc[f"stage_{i}"], math.ceil(stride / 2)
        for j in range(cfg.enc_num_blocks):
            stages[f"stage_{i}.block_{j}"] = functools.partial(_convnext, stage[f"block_{j}"], precision=precision)
        stages[f"stage_{i}.down"] = functools.partial(
            _wn_conv, stage["down"], precision=precision, stride=stride, pad=pad
        )
    return stages | {"conv_out": functools.partial(_wn_conv, enc["conv_out"], precision=precision)}


def decode(params: Params, cfg: AVAEConfig, latents: jax.Array, *, precision: Precision = HIGHEST) -> jax.Array:
    """latents [B,T,C] float32 → wave [B,hop·T,2] float32, clipped to −1 … 1. Traceable; ValueErrors as `decode_raw`."""
    return jnp.clip(decode_raw(params, cfg, latents, precision=precision), -1.0, 1.0)


def decode_raw(params: Params, cfg: AVAEConfig, latents: jax.Array, *, precision: Precision = HIGHEST) -> jax.Array:
    """`decode` before the clip, which would hide errors from a comparison.

    Raises ValueError for another shape or dtype, and for no latents.
    """
    if latents.ndim != 3 or latents.shape[2] != cfg.vocoder_input_dim:
        raise ValueError(f"sound latents must be [B, T, {cfg.vocoder_input_dim}], got {latents.shape}.")
    if latents.dtype != jnp.float32:
        raise ValueError(f"sound latents must be float32, got {latents.dtype}.")
    if not latents.shape[1]:
        raise ValueError("there are no sound latents; decoding needs at least one.")
    x = latents.astype(precision.dtype)
    for stage in decoder_stages(params, cfg, precision).values():
        x = stage(x)
    return x.astype(jnp.float32)


def decoder_stages(params: Params, cfg: AVAEConfig, precision: Precision) -> dict[str, Stage]:
    """What `decode_raw` does to the latents, in its order: name → function of [B,T,C]."""
    dec, pad = params["decoder"], KERNEL // 2
    stages: dict[str, Stage] = {"conv_in": functools.partial(_wn_conv, dec["conv_in"], precision=precision, pad=pad)}
    for i, (_, _, stride) in enumerate(cfg.dec_stages):
        stages[f"block_{i}"] = functools.partial(_block, dec[f"block_{i}"], precision=precision, stride=stride)
    return stages | {"conv_out": lambda x: _wn_conv(dec["conv_out"], _snake(dec["snake"], x), precision, pad=pad)}


class AVAECodec:
    """`SoundCodec` on the host: checks what arrives, runs the jitted functions, one compilation per latent count."""

    def __init__(self, params: Params, cfg: AVAEConfig, precision: Precision = HIGHEST):
        self.params, self.cfg = params, cfg
        self._encode = jax.jit(functools.partial(encode, cfg=cfg, precision=precision))
        self._decode = jax.jit(functools.partial(decode, cfg=cfg, precision=precision))

    @property
    def channels(self) -> int:
        return self.cfg.vocoder_input_dim

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """float32 [2,N] at `sampling_rate` → float32 [C,⌈N/hop⌉]. ValueError unless stereo, float32 and finite."""
        wave = np.asarray(wave)
        if wave.ndim != 2 or len(wave) != CHANNELS:
            raise ValueError(f"sound is stereo [2, N], got {wave.shape}; duplicate a mono channel.")
        if wave.dtype != np.float32:
            raise ValueError(f"the wave must be float32, got {wave.dtype}; divide int16 samples by 32768.")
        if not np.isfinite(wave).all():
            raise ValueError("the wave holds NaN or infinity; it must be finite.")
        padded = np.pad(wave, ((0, 0), (0, -wave.shape[1] % self.cfg.hop)))  # zeros change no peak
        return np.asarray(self._encode(self.params, wave=padded.T[None]))[0].T

    def decode(self, latents: np.ndarray, samples: int | None = None) -> np.ndarray:
        """float32 [C,T] → float32 [2,hop·T] in −1 … 1, cut to `samples`. ValueError unless finite and so long."""
        latents = np.asarray(latents)
        if latents.ndim != 2 or len(latents) != self.channels:
            raise ValueError(f"sound latents must be [{self.channels}, T], got {latents.shape}.")
        if latents.dtype != np.float32:
            raise ValueError(f"sound latents must be float32, got {latents.dtype}.")
        if not np.isfinite(latents).all():
            raise ValueError("the sound latents hold NaN or infinity; they must be finite.")
        length = latents.shape[1] * self.cfg.hop
        if samples is not None and not 0 < samples <= length:
            raise ValueError(f"samples={samples}, but {latents.shape[1]} latents decode to {length} samples.")
        return np.asarray(self._decode(self.params, latents=latents.T[None]))[0, :samples].T


def _spectra(wave: jax.Array, cfg: AVAEConfig) -> jax.Array:
    """wave [B,N,2] float32 → [B, N/enc_hop_length, 2·(n_fft+2)] float32: per channel real parts, then imaginary ones.

    Hann window (periodic), zero padding that makes whole frames, no centring, no scaling. It is one strided convolution
    with the Fourier basis, always at the highest precision: bfloat16 products would drown the quiet bins.
    """
    n, channels = cfg.enc_n_fft, wave.shape[-1]
    left = (n - cfg.enc_hop_length) // 2
    basis = jnp.asarray(np.tile(_fourier(n), channels)[:, None], jnp.float32)  # [n_fft, 1, 2·(n_fft+2)]
    pad = (left, n - cfg.enc_hop_length - left)
    return _conv(wave, basis, HIGHEST, stride=cfg.enc_hop_length, pad=pad, groups=channels)


def _fourier(n: int) -> np.ndarray:
    """[n, n+2] float64: the windowed cosines and negative sines of the n/2+1 frequencies of a real spectrum."""
    t = np.arange(n)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * t / n)
    phase = 2 * np.pi * (np.outer(t, np.arange(n // 2 + 1)) % n) / n
    return window[:, None] * np.concatenate([np.cos(phase), -np.sin(phase)], 1)


def _convnext(p: Params, x: jax.Array, precision: Precision) -> jax.Array:
    """Depthwise convolution, LayerNorm, and an MLP of four times the width around SnakeBeta; residual."""
    h = _dense_conv(p["depthwise"], x, precision, pad=KERNEL // 2, groups=x.shape[-1])
    h = _layer_norm(p["norm"], h)
    h = _snake(p["snake"], _dense_conv(p["up"], h, precision))
    return x + _dense_conv(p["down"], h, precision)


def _block(p: Params, x: jax.Array, precision: Precision, stride: int) -> jax.Array:
    """One block of the decoder: T → stride·T, then three residual units."""
    x = _wn_conv_up(p["up"], _snake(p["snake"], x), precision, stride)
    for dilation in DILATIONS:
        x = _residual(p[f"residual_{dilation}"], x, precision, dilation)
    return x


def _residual(p: Params, x: jax.Array, precision: Precision, dilation: int) -> jax.Array:
    h = _wn_conv(p["conv_1"], _snake(p["snake_1"], x), precision, pad=dilation * (KERNEL // 2), dilation=dilation)
    return x + _wn_conv(p["conv_2"], _snake(p["snake_2"], h), precision)


def _snake(p: Params, x: jax.Array) -> jax.Array:
    """SnakeBeta: x + sin²(α·x)/β with per-channel α = e^alpha and β = e^beta, in float32."""
    alpha, beta = (jnp.exp(p[n].astype(jnp.float32)) for n in ("alpha", "beta"))
    x32 = x.astype(jnp.float32)
    return (x32 + jnp.square(jnp.sin(alpha * x32)) / (beta + SNAKE_EPS)).astype(x.dtype)


def _layer_norm(p: Params, x: jax.Array) -> jax.Array:
    """Over the channels, in float32, without a bias."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)
    return (y * p["weight"].astype(jnp.float32)).astype(x.dtype)


def _weight(p: Params, axis: int) -> jax.Array:
    """The kernel g·v/‖v‖ [taps, in, out] float32; one g for each index of `axis`."""
    g = p["g"].astype(jnp.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    return p["v"].astype(jnp.float32) * (g / length(p["v"], axis))


def _wn_conv(p: Params, x: jax.Array, precision: Precision, *, stride=1, pad=0, dilation=1) -> jax.Array:
    """Weight-normalised convolution with `pad` zeros on both sides."""
    y = _conv(x, _weight(p, 2), precision, stride=stride, pad=(pad, pad), dilation=dilation)
    return _biased(p, y)


def _wn_conv_up(p: Params, x: jax.Array, precision: Precision, stride: int) -> jax.Array:
    """Weight-normalised transposed convolution of 2·stride taps: T → stride·T, for odd strides too.

    PyTorch's padding ⌈stride/2⌉ crops that much from both ends; its output_padding gives an odd stride one sample back.
    """
    taps, crop = 2 * stride, math.ceil(stride / 2)
    pad = (taps - 1 - crop, taps - 1 - crop + stride % 2)
    return _biased(p, _conv(x, _weight(p, 1)[::-1], precision, pad=pad, spread=stride))


def _dense_conv(p: Params, x: jax.Array, precision: Precision, *, pad: int = 0, groups: int = 1) -> jax.Array:
    """Plain convolution with a bias and `pad` zeros on both sides."""
    return _biased(p, _conv(x, p["kernel"], precision, pad=(pad, pad), groups=groups))


def _biased(p: Params, y: jax.Array) -> jax.Array:
    return y + p["bias"].astype(y.dtype) if "bias" in p else y


def _conv(x, kernel, precision: Precision, *, stride=1, pad=(0, 0), dilation=1, spread=1, groups=1) -> jax.Array:
    """x [B,T,in], kernel [taps,in/groups,out]; `spread` puts zeros between the inputs (transposed convolution)."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride,), [pad], lhs_dilation=(spread,), rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups, precision=precision.matmul,
    )  # fmt: skip
