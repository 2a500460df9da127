"""The parameters of the Wan 2.2 VAE: one declaration of every shape, for initialisation, loading and conversion.

In: `WanConfig`. Out: a nested dict; kernels are [kt,kh,kw,in,out] or [kh,kw,in,out], biases and gammas [C], all
float32. 196 tensors and 704,688,668 values for the published VAE.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from cosmos_jax.codecs.wan.config import WanConfig


def _conv(n_in: int, n_out: int, *kernel: int) -> dict:
    return {"kernel": (*kernel, n_in, n_out), "bias": (n_out,)}


def _resnet(n_in: int, n_out: int) -> dict:
    shortcut = {"shortcut": _conv(n_in, n_out, 1, 1, 1)} if n_in != n_out else {}
    return {
        "norm1": {"gamma": (n_in,)}, "conv1": _conv(n_in, n_out, 3, 3, 3),
        "norm2": {"gamma": (n_out,)}, "conv2": _conv(n_out, n_out, 3, 3, 3),
    } | shortcut  # fmt: skip


def _stage(n_in: int, n_out: int, resnets: int) -> dict:
    return {"resnets": {str(i): _resnet(n_in if i == 0 else n_out, n_out) for i in range(resnets)}}


def _middle(n: int) -> dict:
    attention = {"norm": {"gamma": (n,)}, "qkv": _conv(n, 3 * n, 1, 1), "proj": _conv(n, n, 1, 1)}
    return {"resnets": {"0": _resnet(n, n), "1": _resnet(n, n)}, "attention": attention}


def _shapes(cfg: WanConfig) -> dict:
    e, d, last = cfg.encoder_dims, cfg.decoder_dims, len(cfg.dim_mult) - 1
    down, up = {}, {}
    for i in range(last + 1):
        down[str(i)] = _stage(e[i], e[i + 1], cfg.num_res_blocks)
        up[str(i)] = _stage(d[i], d[i + 1], cfg.num_res_blocks + 1)
        if i == last:
            break
        n, m = e[i + 1], d[i + 1]
        down[str(i)]["downsample"] = {"space": _conv(n, n, 3, 3)} | (
            {"time": _conv(n, n, 3, 1, 1)} if cfg.temporal_downsample[i] else {}
        )
        up[str(i)]["upsample"] = {"space": _conv(m, m, 3, 3)} | (
            {"time": _conv(m, 2 * m, 3, 1, 1)} if cfg.temporal_upsample[i] else {}
        )
    z = cfg.z_dim
    encoder = {
        "conv_in": _conv(cfg.channels, e[0], 3, 3, 3), "down": down, "mid": _middle(e[-1]),
        "norm_out": {"gamma": (e[-1],)}, "conv_out": _conv(e[-1], 2 * z, 3, 3, 3),
    }  # fmt: skip
    decoder = {
        "conv_in": _conv(z, d[0], 3, 3, 3), "mid": _middle(d[0]), "up": up,
        "norm_out": {"gamma": (d[-1],)}, "conv_out": _conv(d[-1], cfg.channels, 3, 3, 3),
    }  # fmt: skip
    return {
        "encoder": encoder, "quant": _conv(2 * z, 2 * z, 1, 1, 1),
        "post_quant": _conv(z, z, 1, 1, 1), "decoder": decoder,
    }  # fmt: skip


def abstract(cfg: WanConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct` (float32); allocates nothing."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), _shapes(cfg), is_leaf=lambda x: isinstance(x, tuple)
    )


def init(cfg: WanConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters: kernels and biases uniform in ±1/√fan_in (PyTorch's rule for Conv), gammas one."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract(cfg))
    shapes = {path: leaf.shape for path, leaf in leaves}
    out = []
    for (path, leaf), k in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        if path[-1].key == "gamma":
            out.append(jnp.ones(leaf.shape, leaf.dtype))
            continue
        bound = 1 / math.sqrt(math.prod(shapes[*path[:-1], jax.tree_util.DictKey("kernel")][:-1]))
        out.append(jax.random.uniform(k, leaf.shape, leaf.dtype, -bound, bound))
    return jax.tree.unflatten(treedef, out)
