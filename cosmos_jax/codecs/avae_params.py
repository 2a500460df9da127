"""The parameters of the sound tokeniser (AVAE): their tree, their shapes, and fresh ones.

In: an `AVAEConfig`. Out: a nested dict, float32, every kernel [taps, in, out]. A weight-normalised convolution keeps
its direction `v` and its length `g`, so that a checkpoint survives a round trip to the last byte: one length per output
channel, or per *input* channel where it upsamples (PyTorch normalises over dimension 0 of its own layout).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from cosmos_jax.codecs.avae_config import CHANNELS, AVAEConfig

KERNEL = 7  # taps of every convolution that neither up- nor downsamples nor only mixes channels
DILATIONS = (1, 3, 9)  # of the residual units of a decoder block

Params = dict[str, Any]


def abstract(cfg: AVAEConfig) -> Params:
    """Every parameter as a float32 `jax.ShapeDtypeStruct`; allocates nothing."""
    tree = {"decoder": _decoder_shapes(cfg)} | ({"encoder": _encoder_shapes(cfg)} if cfg.encoder_enabled else {})
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def init(cfg: AVAEConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: kernels N(0, 1/fan_in), `g` such that weight norm changes nothing, biases and the
    logarithms of the snakes 0, norms 1."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract(cfg))
    kernels = {}
    for i, (path, leaf) in enumerate(leaves):
        if path[-1].key in ("v", "kernel"):
            scale = math.prod(leaf.shape[:-1]) ** -0.5
            kernels[path] = scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)

    def value(path, leaf):
        if path in kernels:
            return kernels[path]
        if path[-1].key == "g":
            axis = 1 if path[-2].key == "up" else 2
            return length(kernels[(*path[:-1], jax.tree_util.DictKey("v"))], axis).reshape(-1)
        return jnp.full(leaf.shape, 1.0 if path[-1].key == "weight" else 0.0, leaf.dtype)

    return jax.tree.unflatten(structure, [value(*x) for x in leaves])


def length(v: jax.Array, axis: int) -> jax.Array:
    """Euclidean length over all axes but `axis`, in float32, broadcastable against v."""
    return jnp.sqrt(jnp.square(v.astype(jnp.float32)).sum([a for a in range(3) if a != axis], keepdims=True))


def _wn_shapes(taps: int, n_in: int, n_out: int, *, bias: bool = True, up: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"g": (n_in if up else n_out,), "v": (taps, n_in, n_out)}
    return shapes | ({"bias": (n_out,)} if bias else {})


def _snake_shapes(width: int) -> dict[str, tuple[int, ...]]:
    return {"alpha": (width,), "beta": (width,)}


def _encoder_shapes(cfg: AVAEConfig) -> Params:
    widths = cfg.enc_widths
    tree: Params = {
        "conv_in": _wn_shapes(1, CHANNELS * (cfg.enc_n_fft + 2), widths[0], bias=False),
        "conv_out": _wn_shapes(1, widths[-1], cfg.enc_latent_dim, bias=False),
    }
    for i, stride in enumerate(cfg.enc_strides):
        width, wide = widths[i], 4 * widths[i]
        block = {
            "depthwise": {"kernel": (KERNEL, 1, width), "bias": (width,)},
            "norm": {"weight": (width,)},
            "up": {"kernel": (1, width, wide), "bias": (wide,)},
            "snake": _snake_shapes(wide),
            "down": {"kernel": (1, wide, width), "bias": (width,)},
        }
        blocks = {f"block_{j}": block for j in range(cfg.enc_num_blocks)}
        tree[f"stage_{i}"] = blocks | {"down": _wn_shapes(2 * stride, width, widths[i + 1])}
    return tree


def _decoder_shapes(cfg: AVAEConfig) -> Params:
    tree: Params = {
        "conv_in": _wn_shapes(KERNEL, cfg.vocoder_input_dim, cfg.dec_stages[0][0]),
        "snake": _snake_shapes(cfg.dec_dim),
        "conv_out": _wn_shapes(KERNEL, cfg.dec_dim, CHANNELS, bias=False),
    }
    for i, (width, out, stride) in enumerate(cfg.dec_stages):
        unit = {
            "snake_1": _snake_shapes(out), "conv_1": _wn_shapes(KERNEL, out, out),
            "snake_2": _snake_shapes(out), "conv_2": _wn_shapes(1, out, out),
        }  # fmt: skip
        units = {f"residual_{d}": unit for d in DILATIONS}
        tree[f"block_{i}"] = units | {
            "snake": _snake_shapes(width),
            "up": _wn_shapes(2 * stride, width, out, up=True),
        }
    return tree
