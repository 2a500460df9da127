"""The pieces of the Wan 2.2 VAE, each a pure function of its parameters, its input and the frames before it.

In and out: activations [B,T,H,W,C] in the compute dtype. A function that looks back in time takes `past`, the frames
that precede x (None: x starts the clip), and also returns the `past` of whatever follows. That is the whole causal
cache: a clip fed in pieces means the same as a clip fed at once. Formulas: spec reference_parity.md
§2.1, after `AutoencoderKLWan` of diffusers and `vae2_2.py` of Wan 2.2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from cosmos_jax.precision import Precision

LAYOUT = {4: ("NHWC", "HWIO", "NHWC"), 5: ("NDHWC", "DHWIO", "NDHWC")}
EPS = 1e-12  # smallest norm that `normalise` divides by


def conv(p: dict, x: jax.Array, precision: Precision, stride: tuple[int, ...] = (), pad: tuple = ()) -> jax.Array:
    """Convolution with bias, in space (x [N,H,W,C]) or in time and space (x [B,T,H,W,C]); zero padding `pad`."""
    n = x.ndim - 2
    y = jax.lax.conv_general_dilated(
        x, p["kernel"].astype(precision.dtype), stride or (1,) * n, pad or ((0, 0),) * n,
        dimension_numbers=LAYOUT[x.ndim], precision=precision.matmul,
    )  # fmt: skip
    return y + p["bias"].astype(precision.dtype)


def extend(x: jax.Array, past: jax.Array | None, frames: int) -> jax.Array:
    """x with the `frames` frames before it in front; before the clip there are zeros."""
    if past is None:
        past = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
    return jnp.concatenate([past, x], 1)


def causal_conv(p: dict, x: jax.Array, past: jax.Array | None, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Frame t sees frames t−2, t−1, t and, in space, its zero-padded surroundings. past: [B,2,H,W,C]."""
    kt, kh, kw = p["kernel"].shape[:3]
    x = extend(x, past, kt - 1)
    y = conv(p, x, precision, pad=((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)))
    return y, x[:, -(kt - 1) :]


def frames(x: jax.Array) -> jax.Array:
    """[B,T,H,W,C] → [B·T,H,W,C]."""
    return x.reshape(-1, *x.shape[2:])


def clips(x: jax.Array, batch: int) -> jax.Array:
    """[B·T,H,W,C] → [B,T,H,W,C]."""
    return x.reshape(batch, -1, *x.shape[1:])


def norm(p: dict, x: jax.Array) -> jax.Array:
    """x / max(‖x‖₂, 1e-12) · √C · gamma over the channels; the norm in float32, each product in the dtype of x."""
    x32 = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(x32 * x32, -1, keepdims=True))
    y = (x32 / jnp.maximum(length, EPS)).astype(x.dtype)
    # √C must not become bfloat16 before it is used: the reference multiplies by the exact number
    y = (y.astype(jnp.float32) * math.sqrt(x.shape[-1])).astype(x.dtype)
    return y * p["gamma"].astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def residual(p: dict, x: jax.Array, past: dict | None, precision: Precision) -> tuple[jax.Array, dict]:
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1×1×1 convolution on the shortcut where the width changes."""
    past = past or {"conv1": None, "conv2": None}
    y, first = causal_conv(p["conv1"], silu(norm(p["norm1"], x)), past["conv1"], precision)
    y, second = causal_conv(p["conv2"], silu(norm(p["norm2"], y)), past["conv2"], precision)
    short = conv(p["shortcut"], x, precision) if "shortcut" in p else x
    return y + short, {"conv1": first, "conv2": second}


def attend(q: jax.Array, k: jax.Array, v: jax.Array, precision: Precision) -> jax.Array:
    """[N,S,C] each, one head: softmax(q kᵀ / √C) v, the softmax in float32."""
    scores = jnp.einsum("nqc,nkc->nqk", q, k, precision=precision.matmul, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), -1).astype(v.dtype)
    return jnp.einsum("nqk,nkc->nqc", weights, v, precision=precision.matmul)


def attention(p: dict, x: jax.Array, precision: Precision) -> jax.Array:
    """x + self-attention of the pixels of each frame; no frame sees another."""
    y = frames(x)
    qkv = conv(p["qkv"], norm(p["norm"], y), precision).reshape(y.shape[0], -1, 3 * x.shape[-1])
    q, k, v = jnp.split(qkv, 3, -1)
    out = attend(q, k, v, precision).reshape(y.shape)
    return x + clips(conv(p["proj"], out, precision), x.shape[0])


def space_down(p: dict, x: jax.Array, precision: Precision) -> jax.Array:
    """Half the height and width: 3×3, stride 2, one row and column of zeros at the bottom and right. H and W even."""
    return clips(conv(p, frames(x), precision, (2, 2), ((0, 1), (0, 1))), x.shape[0])


def space_up(p: dict, x: jax.Array, precision: Precision) -> jax.Array:
    """Twice the height and width: every pixel repeated, then 3×3."""
    x_up = jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)
    return clips(conv(p, frames(x_up), precision, pad=((1, 1), (1, 1))), x.shape[0])


def time_down(p: dict, x: jax.Array, past: jax.Array | None, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Half the frames. The clip's first frame passes untouched; then kernel 3, stride 2 over frames 0-1-2, 2-3-4 …

    At the start T = 1+2m → 1+m frames, later (past: [B,1,H,W,C]) T = 2m → m.
    """
    last = x[:, -1:]
    if past is not None:
        return conv(p, extend(x, past, 1), precision, (2, 1, 1)), last
    if x.shape[1] == 1:
        return x, last
    return jnp.concatenate([x[:, :1], conv(p, x, precision, (2, 1, 1))], 1), last


def time_up(p: dict, x: jax.Array, past: jax.Array | None, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Twice the frames: a causal convolution makes 2·C channels, the halves become two successive frames.

    The clip's first frame passes untouched and never enters the convolution, so to the second frame the past is zero.
    At the start T → 2T−1 frames, later (past: [B,2,H,W,C]) T → 2T.
    """
    head = x[:, :0]
    if past is None:
        head, x = x[:, :1], x[:, 1:]
        past = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
    if not x.shape[1]:
        return head, past
    y, past = causal_conv(p, x, past, precision)
    b, t, h, w, c = x.shape
    y = y.reshape(b, t, h, w, 2, c).transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, c)
    return jnp.concatenate([head, y], 1), past


def avg_down(x: jax.Array, time: int, space: int, channels: int, start: bool) -> jax.Array:
    """Shortcut of an encoder stage: fold time×space×space neighbours into channels, average consecutive groups.

    An odd clip gets a frame of zeros in front, so its first frame counts half at every halving of time.
    """
    if start and time > 1:
        x = extend(x, None, time - 1)
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // time, time, h // space, space, w // space, space, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    x = x.reshape(*x.shape[:4], channels, -1)
    return x.astype(jnp.float32).mean(-1).astype(x.dtype)


def dup_up(x: jax.Array, time: int, space: int, channels: int, start: bool) -> jax.Array:
    """Shortcut of a decoder stage: repeat each channel, unfold the copies into time×space×space neighbours.

    The copies of the clip's first frame are cut to one.
    """
    b, t, h, w, c = x.shape
    x = jnp.repeat(x, channels * time * space * space // c, -1).reshape(b, t, h, w, channels, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * time, h * space, w * space, channels)
    return x[:, time - 1 :] if start else x


def patchify(x: jax.Array, size: int) -> jax.Array:
    """[B,T,H,W,C] → [B,T,H/p,W/p,C·p·p], channels ordered (colour, column, row): not the transformer's order."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h // size, size, w // size, size, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, t, h // size, w // size, -1)


def unpatchify(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `patchify`."""
    b, t, h, w, _ = x.shape
    x = x.reshape(b, t, h, w, -1, size, size).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, t, h * size, w * size, -1)
