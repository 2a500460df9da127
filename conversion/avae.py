"""The sound tokeniser: names and shapes of diffusers' `Cosmos3AVAEAudioTokenizer`, and where each tensor lives here.

In: an `AVAEConfig`. Out: one `Entry` per tensor (all float32 in the released checkpoint), for the two layouts that
exist: `entries` (diffusers) and `entries_original` (cosmos-framework's own file; spec training.md §3.4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from conversion.names import Entry, rename
from cosmos_jax.codecs.avae_config import CHANNELS, AVAEConfig
from cosmos_jax.codecs.avae_params import DILATIONS

Path = tuple[str, ...]


def entries(cfg: AVAEConfig) -> list[Entry]:
    """The map, in the order of the PyTorch state dict; every tensor once, every parameter once."""
    return (_encoder(cfg) if cfg.encoder_enabled else []) + _decoder(cfg)


FIRST = "decoder.layers.0.weight_v"  # a name that the original file has, after whatever wraps it


def original_prefix(names: Iterable[str]) -> str | None:
    """What stands before every name in a file of the framework (`state_dict.`, `generator.`); None: not such a file."""
    return next((name.removesuffix(FIRST) for name in names if name.endswith(FIRST)), None)


def entries_original(cfg: AVAEConfig, prefix: str = "") -> list[Entry]:
    """The layout that cosmos-framework trains: a flat list of decoder layers, and alpha and beta [C]."""
    last = len(cfg.dec_strides) + 1
    rules: list[tuple[str, Any]] = [
        (r"^decoder\.conv1\b", "decoder.layers.0"),
        (r"^decoder\.snake1\b", f"decoder.layers.{last}"),
        (r"^decoder\.conv2\b", f"decoder.layers.{last + 1}"),
        (r"^decoder\.block\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) + 1}"),
        (r"(decoder\.layers\.\d+)\.snake1\b", r"\1.layers.0"),
        (r"(decoder\.layers\.\d+)\.conv_t1\b", r"\1.layers.1"),
        (r"\.res_unit(\d)\.(\w+)", lambda m: f".layers.{int(m[1]) + 1}.layers.{UNIT.index(m[2])}"),
    ]
    out = []
    for e in entries(cfg):
        flat = dataclasses.replace(e, view=None, shape=None) if e.path[-1] in ("alpha", "beta") else e
        out.append(dataclasses.replace(flat, source=prefix + rename(e.source, rules)))
    return out


UNIT = ("snake1", "conv1", "snake2", "conv2")  # a residual unit, in order


def _encoder(cfg: AVAEConfig) -> list[Entry]:
    """PyTorch numbers the encoder flat: first convolution, per stage its blocks and its downsampling, last one."""
    widths, layer = cfg.enc_widths, 1
    rows = _weight_norm("encoder.layers.0", ("encoder", "conv_in"), widths[0])
    for i in range(len(cfg.enc_strides)):
        stage = ("encoder", f"stage_{i}")
        for j in range(cfg.enc_num_blocks):
            name, path, width = f"encoder.layers.{layer}", (*stage, f"block_{j}"), widths[i]
            rows += _conv(f"{name}.dwconv.1", (*path, "depthwise"))
            rows += [Entry(f"{name}.norm.weight", (*path, "norm", "weight"))]
            rows += _conv(f"{name}.pwconv1", (*path, "up"))
            rows += _snake(f"{name}.act", (*path, "snake"), 4 * width)
            rows += _conv(f"{name}.pwconv2", (*path, "down"))
            layer += 1
        rows += _bias(f"encoder.layers.{layer}", (*stage, "down"))
        rows += _weight_norm(f"encoder.layers.{layer}", (*stage, "down"), widths[i + 1])
        layer += 1
    return rows + _weight_norm(f"encoder.layers.{layer}", ("encoder", "conv_out"), cfg.enc_latent_dim)


def _decoder(cfg: AVAEConfig) -> list[Entry]:
    first = cfg.dec_stages[0][0]
    rows = _bias("decoder.conv1", ("decoder", "conv_in"))
    rows += _weight_norm("decoder.conv1", ("decoder", "conv_in"), first)
    for i, (width, out, _) in enumerate(cfg.dec_stages):
        name, path = f"decoder.block.{i}", ("decoder", f"block_{i}")
        rows += _snake(f"{name}.snake1", (*path, "snake"), width)
        rows += _bias(f"{name}.conv_t1", (*path, "up"))
        rows += _weight_norm(f"{name}.conv_t1", (*path, "up"), width, up=True)
        for j, dilation in enumerate(DILATIONS, 1):
            unit, here = f"{name}.res_unit{j}", (*path, f"residual_{dilation}")
            for n in (1, 2):
                rows += _snake(f"{unit}.snake{n}", (*here, f"snake_{n}"), out)
                rows += _bias(f"{unit}.conv{n}", (*here, f"conv_{n}"))
                rows += _weight_norm(f"{unit}.conv{n}", (*here, f"conv_{n}"), out)
    rows += _snake("decoder.snake1", ("decoder", "snake"), cfg.dec_dim)
    return rows + _weight_norm("decoder.conv2", ("decoder", "conv_out"), CHANNELS)


def _weight_norm(name: str, path: Path, first: int, *, up: bool = False) -> list[Entry]:
    """g and v. PyTorch's v is [out, in, taps], or [in, out, taps] where it upsamples; ours always [taps, in, out].

    first: size of the first axis of PyTorch's v.
    """
    return [
        Entry(f"{name}.weight_g", (*path, "g"), view=(first,), shape=(first, 1, 1)),
        Entry(f"{name}.weight_v", (*path, "v"), axes=(2, 0, 1) if up else (2, 1, 0)),
    ]


def _conv(name: str, path: Path) -> list[Entry]:
    return [Entry(f"{name}.weight", (*path, "kernel"), axes=(2, 1, 0)), *_bias(name, path)]


def _bias(name: str, path: Path) -> list[Entry]:
    return [Entry(f"{name}.bias", (*path, "bias"))]


def _snake(name: str, path: Path, width: int) -> list[Entry]:
    return [Entry(f"{name}.{n}", (*path, n), view=(width,), shape=(1, width, 1)) for n in ("alpha", "beta")]
