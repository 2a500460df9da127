"""Names of the Wan 2.2 VAE: our path of every tensor → its name in the two layouts that exist.

In: `WanConfig`. Out: a list of `Entry`, every tensor exactly once. `entries` is the diffusers layout (the `vae/` folder
of Cosmos 3 and of Wan2.2-TI2V-5B-Diffusers), `entries_original` that of `Wan2.2_VAE.pth`. Kernels only change the order
of their axes: [out,in,(t,)h,w] there, [(t,)h,w,in,out] here.
"""

from __future__ import annotations

import jax

from conversion.names import Entry, rename
from cosmos_jax.codecs.wan import WanConfig, abstract

Rules = tuple[tuple[str, str], ...]

DIFFUSERS: Rules = (
    (r"\bdown\.(\d+)\.downsample\b", r"down.\1.downsampler"),
    (r"\bup\.(\d+)\.upsample\b", r"up.\1.upsampler"),
    (r"\bdown\b", "down_blocks"),
    (r"\bup\b", "up_blocks"),
    (r"\bmid\b", "mid_block"),
    (r"\battention\b", "attentions.0"),
    (r"\bqkv\b", "to_qkv"),
    (r"\bshortcut\b", "conv_shortcut"),
    (r"\bspace\b", "resample.1"),
    (r"\btime\b", "time_conv"),
    (r"^(quant|post_quant)\b", r"\1_conv"),
)


def _original(cfg: WanConfig) -> Rules:
    n = cfg.num_res_blocks
    return (
        (r"\bmid\.resnets\.0\b", "middle.0"),
        (r"\bmid\.attention\b", "middle.1"),
        (r"\bmid\.resnets\.1\b", "middle.2"),
        (r"\bdown\.(\d+)\.resnets\b", r"downsamples.\1.downsamples"),
        (r"\bup\.(\d+)\.resnets\b", r"upsamples.\1.upsamples"),
        (r"\bdown\.(\d+)\.downsample\b", rf"downsamples.\1.downsamples.{n}"),
        (r"\bup\.(\d+)\.upsample\b", rf"upsamples.\1.upsamples.{n + 1}"),
        (r"\bnorm1\b", "residual.0"),
        (r"\bconv1\b", "residual.2"),
        (r"\bnorm2\b", "residual.3"),
        (r"\bconv2\b", "residual.6"),
        (r"\bconv_in\b", "conv1"),
        (r"\bnorm_out\b", "head.0"),
        (r"\bconv_out\b", "head.2"),
        (r"\bqkv\b", "to_qkv"),
        (r"\bspace\b", "resample.1"),
        (r"\btime\b", "time_conv"),
        (r"^quant\b", "conv1"),
        (r"^post_quant\b", "conv2"),
    )


def _entries(cfg: WanConfig, rules: Rules) -> list[Entry]:
    out = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract(cfg)):
        path = tuple(k.key for k in keys)
        name = rename(".".join(path[:-1]), rules)
        if path[-1] == "kernel":
            n = len(leaf.shape)
            out.append(Entry(f"{name}.weight", path, axes=(*range(2, n), 1, 0)))
        elif path[-1] == "gamma":  # [C,1,1,1] there, [C,1,1] in the attention
            flat = leaf.shape[0]
            out.append(Entry(f"{name}.gamma", path, (flat,), (flat, 1, 1) if "attention" in path else (flat, 1, 1, 1)))
        else:
            out.append(Entry(f"{name}.bias", path))
    return out


def entries(cfg: WanConfig) -> list[Entry]:
    """The layout of diffusers' `AutoencoderKLWan`."""
    return _entries(cfg, DIFFUSERS)


def entries_original(cfg: WanConfig) -> list[Entry]:
    """The layout of `Wan2.2_VAE.pth` (`wan/modules/vae2_2.py` of Wan 2.2): same tensors, same shapes, other names."""
    return _entries(cfg, _original(cfg))
