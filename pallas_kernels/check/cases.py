"""What is compiled: one table, name → platforms, program, real shapes, and what its kernels may spill.

In: nothing. Out: `TABLE`. A case is built while the mesh of its topology is entered, so that the front doors choose
tiles and backends as they would on the chip; its arguments are abstract, so a case of any size costs no memory. To add
a kernel, add a line to TABLE.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import attention as attentions
from pallas_kernels.flow import programs as flow_programs
from pallas_kernels.norm_rope import programs as norm_rope_programs

Program = tuple[Callable, tuple]  # a function and its abstract arguments
HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. spills: kernel → bytes that it may spill, for each platform that it is compiled for.

    Exactly these kernels must be in the program: one that is missing (something chose XLA) is a failure. refused: the
    compiler must refuse, in words that this pattern finds; a negative control.
    """

    name: str
    build: Callable[[str], Program]  # of a platform
    spills: Mapping[str, Mapping[str, int]]
    refused: str | None = None

    @property
    def platforms(self) -> tuple[str, ...]:
        return tuple(self.spills)


class Packed(NamedTuple):
    """Samples of one buffer, and heads. text, media: tokens of each sample's und and gen stream."""

    samples: int
    text: int
    media: int
    heads: int
    kv_heads: int


NANO, EDGE, SUPER = (32, 8), (16, 8), (64, 8)  # query heads, key heads
IMPL = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}


def abstract(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def gen_attention(platform: str, shape: Packed, part: str, tiles=None) -> Program:
    """gen queries over [und; gen] keys. part: forward, dq or dkv."""
    ids = [abstract(1, shape.samples * n, dtype=jnp.int32) for n in (shape.text, shape.media)]
    how = {"impl": IMPL[platform], "tiles": tiles}
    plan = jax.eval_shape(lambda u, g: attentions.gen_plan(attentions.Segments(u, g), **how), *ids)
    return _attention(plan, ids[1].shape[1], [x.shape[1] for x in ids], shape, part)


def und_attention(platform: str, shape: Packed, part: str) -> Program:
    """und queries over und keys, causal in each sample."""
    ids = abstract(1, shape.samples * shape.text, dtype=jnp.int32)
    plan = jax.eval_shape(lambda u: attentions.und_plan(attentions.Segments(u), impl=IMPL[platform]), ids)
    return _attention(plan, ids.shape[1], [ids.shape[1]], shape, part)


def _attention(plan, queries: int, keys: list[int], shape: Packed, part: str) -> Program:
    """One kernel a program, so that each has a time of its own."""
    q = abstract(1, queries, shape.heads, HEAD_DIM)
    kv = tuple(abstract(1, n, shape.kv_heads, HEAD_DIM) for n in keys)
    line = abstract(1, shape.heads, queries, dtype=jnp.float32)
    scale = 1 / math.sqrt(HEAD_DIM)

    def forward(q, k, v, plan):
        return attentions.attention(q, k, v, plan, scale=scale, return_lse=True)

    def gradient(q, k, v, plan, *of):  # the compiler drops the kernel whose result nobody takes
        dq, dk, dv = attentions.gradient(q, k, v, plan, of=of, scale=scale)
        return dq if part == "dq" else (dk, dv)

    if part == "forward":
        return forward, (q, kv, kv, plan)
    return gradient, (q, kv, kv, plan, q, line, q, line)


def norm_rope_operation(platform: str, name: str) -> Program:
    """Forward or backward, of q and k of Nano on the tokens of a 720p video."""
    return norm_rope_programs.programs(impl=IMPL[platform])[name]


def flow_operation(platform: str, name: str) -> Program:
    """One operation of `pallas_kernels.flow` on the tokens of a 720p video."""
    return flow_programs.programs(impl=IMPL[platform])[name]


def oversized_attention(platform: str) -> Program:
    """Twice the tiles in flight, which do not fit into the shared memory of Hopper."""
    from pallas_kernels.attention import gpu  # jax >= 0.11

    return gen_attention(platform, Packed(1, 300, 44_160, *NANO), "forward", gpu.Tiles(stages=4))


def oversized(platform: str) -> Program:
    """Tiles of 128 MiB, each of them twice in flight: more than any TPU core has."""
    side = 8192

    def corner(x, y):
        y[:8, :128] = x[:8, :128]

    tile = pl.BlockSpec((side, side), lambda i: (i, 0))
    wide = abstract(2 * side, side)
    return pl.pallas_call(corner, grid=(2,), in_specs=[tile], out_specs=tile, out_shape=wide, name="corner"), (wide,)


def _case(name: str, build: Callable[..., Program], *args: Any, refused=None, **spills: Mapping[str, int]) -> Case:
    return Case(name, functools.partial(_build, build, args), spills, refused)


def _build(build, args, platform: str) -> Program:
    return build(platform, *args)


KIB = 1024
# A spill on TPU is a slot of VMEM, which libtpu writes when 64 registers do not hold a tile of scores; measured on all
# four chips (docs/kernels.md), and a quarter more. On a GPU it is memory of a thread: none is needed.
TPU_ATTENTION = {"forward": 2_720, "dq": 2_800, "dkv": 4_256}  # KiB
NORM_ROPE = {"norm_rope": 436, "norm_rope_backward": 9_280}
FLOW = {"noise": 108, "noise_backward": 856, "error": 3_600, "error_backward": 0, "update": 660}
ATTENTION = {
    "nano-720p": (gen_attention, Packed(1, 300, 44_160, *NANO)),
    "nano-packed": (gen_attention, Packed(16, 200, 2_048, *NANO)),
    "nano-packed-und": (und_attention, Packed(16, 200, 2_048, *NANO)),
    "edge-packed": (gen_attention, Packed(16, 200, 2_048, *EDGE)),
    "super-720p": (gen_attention, Packed(1, 300, 44_160, *SUPER)),
}

TABLE = (
    *(
        _case(f"attention/{name}/{part}", build, shape, part,
              tpu={f"attention_{part}": k * KIB}, gpu={f"attention_{part}": 0})
        for name, (build, shape) in ATTENTION.items() for part, k in TPU_ATTENTION.items()
    ),
    *(
        _case(f"{name}/nano-720p", norm_rope_operation, name, tpu={name: k * KIB})
        for name, k in NORM_ROPE.items()
    ),
    *(_case(f"flow/{n}", flow_operation, n, tpu={f"flow_{n}": k * KIB}, gpu={f"flow_{n}": 0}) for n, k in FLOW.items()),
    _case("control/oversized-attention", oversized_attention, refused="exceeds available shared memory", gpu={}),
    _case("control/oversized-tile", oversized, refused="exceed", tpu={}),
)  # fmt: skip
