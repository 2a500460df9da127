"""The sound tokeniser: names and shapes of diffusers' `Cosmos3AVAEAudioTokenizer`, and where each tensor lives here.

In: an `AVAEConfig`. Out: one `Entry` per tensor (all float32 in the released checkpoint), and the shape of each tensor
on the PyTorch side, which converting back needs.
"""

from __future__ import annotations

from conversion.names import Entry
from cosmos_jax.codecs.avae_config import CHANNELS, AVAEConfig
from cosmos_jax.codecs.avae_params import DILATIONS, KERNEL

Row = tuple[Entry, tuple[int, ...]]
Path = tuple[str, ...]


def entries(cfg: AVAEConfig) -> list[Entry]:
    """The map, in the order of the PyTorch state dict; every tensor once, every parameter once."""
    return [entry for entry, _ in _rows(cfg)]


def source_shapes(cfg: AVAEConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the PyTorch checkpoint."""
    return {entry.source: shape for entry, shape in _rows(cfg)}


def _rows(cfg: AVAEConfig) -> list[Row]:
    return (_encoder(cfg) if cfg.encoder_enabled else []) + _decoder(cfg)


def _encoder(cfg: AVAEConfig) -> list[Row]:
    """PyTorch numbers the encoder flat: first convolution, per stage its blocks and its downsampling, last one."""
    widths, layer = cfg.enc_widths, 1
    rows = _weight_norm("encoder.layers.0", ("encoder", "conv_in"), 1, CHANNELS * (cfg.enc_n_fft + 2), widths[0])
    for i, stride in enumerate(cfg.enc_strides):
        stage = ("encoder", f"stage_{i}")
        for j in range(cfg.enc_num_blocks):
            name, path, width = f"encoder.layers.{layer}", (*stage, f"block_{j}"), widths[i]
            rows += _conv(f"{name}.dwconv.1", (*path, "depthwise"), KERNEL, 1, width)
            rows += [(Entry(f"{name}.norm.weight", (*path, "norm", "weight")), (width,))]
            rows += _conv(f"{name}.pwconv1", (*path, "up"), 1, width, 4 * width)
            rows += _snake(f"{name}.act", (*path, "snake"), 4 * width)
            rows += _conv(f"{name}.pwconv2", (*path, "down"), 1, 4 * width, width)
            layer += 1
        rows += _bias(f"encoder.layers.{layer}", (*stage, "down"), widths[i + 1])
        rows += _weight_norm(f"encoder.layers.{layer}", (*stage, "down"), 2 * stride, widths[i], widths[i + 1])
        layer += 1
    return rows + _weight_norm(f"encoder.layers.{layer}", ("encoder", "conv_out"), 1, widths[-1], cfg.enc_latent_dim)


def _decoder(cfg: AVAEConfig) -> list[Row]:
    first = cfg.dec_stages[0][0]
    rows = _bias("decoder.conv1", ("decoder", "conv_in"), first)
    rows += _weight_norm("decoder.conv1", ("decoder", "conv_in"), KERNEL, cfg.vocoder_input_dim, first)
    for i, (width, out, stride) in enumerate(cfg.dec_stages):
        name, path = f"decoder.block.{i}", ("decoder", f"block_{i}")
        rows += _snake(f"{name}.snake1", (*path, "snake"), width)
        rows += _bias(f"{name}.conv_t1", (*path, "up"), out)
        rows += _weight_norm(f"{name}.conv_t1", (*path, "up"), 2 * stride, width, out, up=True)
        for j, dilation in enumerate(DILATIONS, 1):
            unit, here = f"{name}.res_unit{j}", (*path, f"residual_{dilation}")
            for n, taps in ((1, KERNEL), (2, 1)):
                rows += _snake(f"{unit}.snake{n}", (*here, f"snake_{n}"), out)
                rows += _bias(f"{unit}.conv{n}", (*here, f"conv_{n}"), out)
                rows += _weight_norm(f"{unit}.conv{n}", (*here, f"conv_{n}"), taps, out, out)
    rows += _snake("decoder.snake1", ("decoder", "snake"), cfg.dec_dim)
    return rows + _weight_norm("decoder.conv2", ("decoder", "conv_out"), KERNEL, cfg.dec_dim, CHANNELS)


def _weight_norm(name: str, path: Path, taps: int, n_in: int, n_out: int, *, up: bool = False) -> list[Row]:
    """g and v. PyTorch's v is [out, in, taps], or [in, out, taps] where it upsamples; ours always [taps, in, out]."""
    first, second = (n_in, n_out) if up else (n_out, n_in)
    return [
        (Entry(f"{name}.weight_g", (*path, "g"), view=(first,)), (first, 1, 1)),
        (Entry(f"{name}.weight_v", (*path, "v"), axes=(2, 0, 1) if up else (2, 1, 0)), (first, second, taps)),
    ]


def _conv(name: str, path: Path, taps: int, n_in: int, n_out: int) -> list[Row]:
    return [
        (Entry(f"{name}.weight", (*path, "kernel"), axes=(2, 1, 0)), (n_out, n_in, taps)),
        *_bias(name, path, n_out),
    ]


def _bias(name: str, path: Path, width: int) -> list[Row]:
    return [(Entry(f"{name}.bias", (*path, "bias")), (width,))]


def _snake(name: str, path: Path, width: int) -> list[Row]:
    return [(Entry(f"{name}.{n}", (*path, n), view=(width,)), (1, width, 1)) for n in ("alpha", "beta")]
