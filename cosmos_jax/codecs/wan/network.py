"""Encoder and decoder of the Wan 2.2 VAE for one piece of a clip.

In: parameters, activations [B,T,H,W,C], the causal cache left by the piece before (None: the piece starts the clip).
Out: activations, and the cache for the next piece: a pytree of the one or two frames before each convolution over
time, whose size does not depend on the length of the clip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

import jax

from cosmos_jax.codecs.wan import layers as L
from cosmos_jax.codecs.wan.tiling import Sight, Window
from cosmos_jax.precision import Precision

Stage = Callable[..., tuple[jax.Array, dict | jax.Array]]  # (x, its part of the cache, precision) → the same, moved on


def _of(cache: dict | None, name: str):
    return None if cache is None else cache[name]


def chain(
    stages: dict[str, Stage], x: jax.Array, cache: dict | None, precision: Precision, window: Window | None = None
) -> tuple[jax.Array, dict]:
    """One stage after another, each with its own part of the cache. `window`: what to keep after each; None: all."""
    new = {}
    for k, (name, stage) in enumerate(stages.items()):
        x, new[name] = stage(x, _of(cache, name), precision)
        if window is not None:
            x = window.keep(x, k)
    return x, new


def _resnets(p: dict) -> dict[str, Stage]:
    """The residual blocks "0", "1", … of p."""
    return {name: functools.partial(L.residual, p[name]) for name in map(str, range(len(p)))}


def down_stage(p: dict, x: jax.Array, cache: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """Residual blocks, then (in all but the last stage) half the space and perhaps half the time; plus `avg_down`."""
    short, space, time = x, 1, 1
    x, resnets = chain(_resnets(p["resnets"]), x, _of(cache, "resnets"), precision)
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
    x, resnets = chain(_resnets(p["resnets"]), x, _of(cache, "resnets"), precision)
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
    """The encoder in the order in which it runs."""
    down: dict[str, Stage] = {f"down_{i}": functools.partial(down_stage, p["down"][i]) for i in p["down"]}
    return _between(p, down | {"mid": functools.partial(middle, p["mid"])})


def decoder_stages(p: dict) -> dict[str, Stage]:
    """The decoder in the order in which it runs."""
    up: dict[str, Stage] = {f"up_{i}": functools.partial(up_stage, p["up"][i]) for i in p["up"]}
    mid: dict[str, Stage] = {"mid": functools.partial(middle, p["mid"])}
    return _between(p, mid | up)


def _between(p: dict, body: dict[str, Stage]) -> dict[str, Stage]:
    first = functools.partial(L.causal_conv, p["conv_in"])
    return {"conv_in": first} | body | {"conv_out": functools.partial(head, p)}


def encoder_halves(p: dict) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """Patches [B,T,H/2,W/2,12] → local half → features [B,t,H/16,W/16,C] → global half → moments [B,t,H/16,W/16,2·z].

    Local: convolutions only. Global: with the middle, whose attention sees the whole frame.
    """
    return _cut(encoder_stages(p), "down")


def decoder_halves(p: dict) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """Latents [B,t,h,w,z] → global half → features [B,t,h,w,C] → local half → patches [B,T,8h,8w,12]."""
    return _cut(decoder_stages(p), "up")[::-1]


def _cut(stages: dict[str, Stage], way: str) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """The stages on the side of `mid` where the frame is large, and the others."""
    names = list(stages)
    mid = names.index("mid")
    large = names[:mid] if way == "down" else names[mid + 1 :]
    return {n: stages[n] for n in large}, {n: stages[n] for n in names if n not in large}


def encoder_sights(p: dict) -> list[Sight]:
    """How far each stage of the encoder's local half sees: a residual block two pixels, 3×3 with stride 2 one."""
    down = [(2 * len(s["resnets"]), "downsample" in s) for s in (p["down"][i] for i in p["down"])]
    return [Sight(1)] + [Sight(n + 1, 0, Fraction(1, 2)) if half else Sight(n) for n, half in down]


def decoder_sights(p: dict) -> list[Sight]:
    """How far each stage of the decoder's local half sees: a residual block two pixels, the 3×3 after doubling one."""
    up = [(2 * len(s["resnets"]), "upsample" in s) for s in (p["up"][i] for i in p["up"])]
    return [Sight(n, 1, Fraction(2)) if double else Sight(n) for n, double in up] + [Sight(1)]
