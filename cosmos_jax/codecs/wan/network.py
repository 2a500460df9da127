"""Encoder and decoder of the Wan 2.2 VAE for one piece of a clip.

In: parameters, activations [B,T,H,W,C], the causal cache left by the piece before (None: the piece starts the clip).
Out: activations, and the cache for the next piece: a pytree of the one or two frames before each convolution over
time, whose size does not depend on the length of the clip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from cosmos_jax.codecs.wan import layers as L
from cosmos_jax.precision import Precision

Stage = Callable[..., tuple[jax.Array, dict | jax.Array]]  # (x, its part of the cache, precision) → the same, moved on


def _of(cache: dict | None, name: str):
    return None if cache is None else cache[name]


def _chain(stages: dict[str, Stage], x: jax.Array, cache: dict | None, precision: Precision):
    """One stage after another, each with its own part of the cache."""
    new = {}
    for name, stage in stages.items():
        x, new[name] = stage(x, _of(cache, name), precision)
    return x, new


def _resnets(p: dict) -> dict[str, Stage]:
    """The residual blocks "0", "1", … of p."""
    return {name: functools.partial(L.residual, p[name]) for name in map(str, range(len(p)))}


def down_stage(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Residual blocks, then (in all but the last stage) half the space and perhaps half the time; plus `avg_down`."""
    short, space, time = x, 1, 1
    x, resnets = _chain(_resnets(p["resnets"]), x, _of(cache, "resnets"), precision)
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
    x, resnets = _chain(_resnets(p["resnets"]), x, _of(cache, "resnets"), precision)
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


def head(p: dict, x: jax.Array, cache: jax.Array | None, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Norm, SiLU, convolution: what leaves the encoder or the decoder."""
    return L.causal_conv(p["conv_out"], L.silu(L.norm(p["norm_out"], x)), cache, precision)


def encoder_stages(p: dict) -> dict[str, Stage]:
    """The encoder in the order in which `encoder` runs it."""
    down: dict[str, Stage] = {f"down_{i}": functools.partial(down_stage, p["down"][i]) for i in p["down"]}
    return _between(p, down | {"mid": functools.partial(middle, p["mid"])})


def decoder_stages(p: dict) -> dict[str, Stage]:
    """The decoder in the order in which `decoder` runs it."""
    up: dict[str, Stage] = {f"up_{i}": functools.partial(up_stage, p["up"][i]) for i in p["up"]}
    mid: dict[str, Stage] = {"mid": functools.partial(middle, p["mid"])}
    return _between(p, mid | up)


def _between(p: dict, body: dict[str, Stage]) -> dict[str, Stage]:
    first = functools.partial(L.causal_conv, p["conv_in"])
    return {"conv_in": first} | body | {"conv_out": functools.partial(head, p)}


def encoder(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Patches [B,T,H/2,W/2,12] → moments [B,t,H/16,W/16,2·z]."""
    return _chain(encoder_stages(p), x, cache, precision)


def decoder(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Latents [B,t,h,w,z] → patches [B,T,8h,8w,12]."""
    return _chain(decoder_stages(p), x, cache, precision)
