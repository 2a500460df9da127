"""Encoder and decoder of the Wan 2.2 VAE for one piece of a clip.

In: parameters, activations [B,T,H,W,C], the causal cache left by the piece before (None: the piece starts the clip).
Out: activations, and the cache for the next piece: a pytree of the one or two frames before each convolution over
time, whose size does not depend on the length of the clip.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from cosmos_jax.codecs.wan import layers as L
from cosmos_jax.precision import Precision


def _of(cache: dict | None, name: str):
    return None if cache is None else cache[name]


def _chain(function: Callable, p: dict, x: jax.Array, cache: dict | None, precision: Precision):
    """The blocks "0", "1", … of p one after another."""
    new = {}
    for name in map(str, range(len(p))):
        x, new[name] = function(p[name], x, _of(cache, name), precision)
    return x, new


def down_stage(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Residual blocks, then (in all but the last stage) half the space and perhaps half the time; plus `avg_down`."""
    short, space, time = x, 1, 1
    x, resnets = _chain(L.residual, p["resnets"], x, _of(cache, "resnets"), precision)
    new: dict = {"resnets": resnets}
    if "downsample" in p:
        x, space = L.space_down(p["downsample"]["space"], x, precision), 2
        if "time" in p["downsample"]:
            x, new["time"] = L.time_down(p["downsample"]["time"], x, _of(cache, "time"), precision)
            time = 2
    return x + L.avg_down(short, time, space, x.shape[-1], cache is None), new


def up_stage(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Residual blocks, then (in all but the last stage) perhaps twice the time and twice the space; plus `dup_up`."""
    short, time = x, 1
    x, resnets = _chain(L.residual, p["resnets"], x, _of(cache, "resnets"), precision)
    new: dict = {"resnets": resnets}
    if "upsample" not in p:
        return x, new
    if "time" in p["upsample"]:
        x, new["time"] = L.time_up(p["upsample"]["time"], x, _of(cache, "time"), precision)
        time = 2
    x = L.space_up(p["upsample"]["space"], x, precision)
    return x + L.dup_up(short, time, 2, x.shape[-1], cache is None), new


def middle(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Residual block, attention within each frame, residual block."""
    x, first = L.residual(p["resnets"]["0"], x, _of(cache, "0"), precision)
    x = L.attention(p["attention"], x, precision)
    x, second = L.residual(p["resnets"]["1"], x, _of(cache, "1"), precision)
    return x, {"0": first, "1": second}


def encoder(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Patches [B,T,H/2,W/2,12] → moments [B,t,H/16,W/16,2·z]."""
    x, conv_in = L.causal_conv(p["conv_in"], x, _of(cache, "conv_in"), precision)
    x, down = _chain(down_stage, p["down"], x, _of(cache, "down"), precision)
    x, mid = middle(p["mid"], x, _of(cache, "mid"), precision)
    x = L.silu(L.norm(p["norm_out"], x))
    x, conv_out = L.causal_conv(p["conv_out"], x, _of(cache, "conv_out"), precision)
    return x, {"conv_in": conv_in, "down": down, "mid": mid, "conv_out": conv_out}


def decoder(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Latents [B,t,h,w,z] → patches [B,T,8h,8w,12]."""
    x, conv_in = L.causal_conv(p["conv_in"], x, _of(cache, "conv_in"), precision)
    x, mid = middle(p["mid"], x, _of(cache, "mid"), precision)
    x, up = _chain(up_stage, p["up"], x, _of(cache, "up"), precision)
    x = L.silu(L.norm(p["norm_out"], x))
    x, conv_out = L.causal_conv(p["conv_out"], x, _of(cache, "conv_out"), precision)
    return x, {"conv_in": conv_in, "mid": mid, "up": up, "conv_out": conv_out}
