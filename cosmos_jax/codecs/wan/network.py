"""Encoder and decoder of the Wan 2.2 VAE for one piece of a clip.

In: parameters, activations [B,T,H,W,C], the causal cache left by the piece before (None: the piece starts the clip).
Out: activations, and the cache for the next piece: a pytree of the one or two frames before each convolution over
time, whose size does not depend on the length of the clip.
"""

from __future__ import annotations

import functools

import jax

from cosmos_jax.codecs.wan import layers as L
from cosmos_jax.codecs.wan.tiling import Stage, tiled
from cosmos_jax.precision import Precision


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
    down = {f"down_{i}": functools.partial(down_stage, p["down"][i]) for i in p["down"]}
    return _between(p, down | {"mid": functools.partial(middle, p["mid"])})


def decoder_stages(p: dict) -> dict[str, Stage]:
    """The decoder in the order in which `decoder` runs it."""
    up = {f"up_{i}": functools.partial(up_stage, p["up"][i]) for i in p["up"]}
    return _between(p, {"mid": functools.partial(middle, p["mid"])} | up)


def _between(p: dict, body: dict[str, Stage]) -> dict[str, Stage]:
    first = functools.partial(L.causal_conv, p["conv_in"])
    return {"conv_in": first} | body | {"conv_out": functools.partial(head, p)}


def reach(p: dict) -> dict[str, int | None]:
    """How many pixels of its input each stage of an encoder or decoder looks sideways; None: over the whole frame.

    A 3×3 convolution looks one pixel, a residual block two, a change of resolution one more.
    """
    side = {"down": "downsample", "up": "upsample"}
    stages = {f"{way}_{i}": 2 * len(s["resnets"]) + (side[way] in s) for way in side if way in p for i, s in p[way].items()}
    return {"conv_in": 1, "mid": None, "conv_out": 1} | stages


def in_windows(p: dict, stages: dict[str, Stage], tile: int) -> dict[str, Stage]:
    """`stages`, each in windows of `tile` pixels per side; the middle whole.

    The first two and the last two go together: between them lies the largest array of the encoder and of the decoder.
    """
    names, far = list(stages), reach(p)
    out: dict[str, Stage] = {}
    for group in (names[:2], *([name] for name in names[2:-2]), names[-2:]):
        stage = functools.partial(_chain, {name: stages[name] for name in group})
        steps = [far[name] for name in group]
        out["+".join(group)] = stage if None in steps else tiled(stage, sum(steps), tile)
    return out


def encoder(
    p: dict, x: jax.Array, cache: dict | None, precision: Precision, tile: int | None = None
) -> tuple[jax.Array, dict]:
    """Patches [B,T,H/2,W/2,12] → moments [B,t,H/16,W/16,2·z]. `tile`: see `in_windows`; None: whole frames."""
    stages = encoder_stages(p)
    return _chain(stages if tile is None else in_windows(p, stages, tile), x, cache, precision)


def decoder(
    p: dict, x: jax.Array, cache: dict | None, precision: Precision, tile: int | None = None
) -> tuple[jax.Array, dict]:
    """Latents [B,t,h,w,z] → patches [B,T,8h,8w,12]. `tile`: see `in_windows`; None: whole frames."""
    stages = decoder_stages(p)
    return _chain(stages if tile is None else in_windows(p, stages, tile), x, cache, precision)
