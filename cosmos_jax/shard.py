"""The only sharding words of the project: logical axis → mesh axis, and the few operations that need to know.

In: arrays and logical axis names. Out: the same maths, placed. Every function is the identity (or the plain jnp
operation) when no mesh is set, so model code reads and runs the same on a laptop.

Tokens of a stream lie in one of two ways (`Layout`): at work, between a gather and a projection, a device of `tp` has
all tokens of its part of `cp`, for its heads or its part of the MLP; at rest (residuals, norms) `tp` divides them too.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")  # rows of the batch
STORED = ("fsdp", "cp")  # devices that share the parameters of a replica between them

# Parameters: one matrix dimension over STORED (ZeRO-3: gathered at use), one over tp (stays sharded at use).
# `None` is written out, so that an unknown name is an error.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "branch": ("cfg", *BATCH),  # rows of several guidance branches, side by side
    "token": None,
    "token_cp": "cp",
    "token_tp": "tp",
    "token_cp_tp": ("cp", "tp"),
    "device": (*BATCH, "cp"),  # what each device made of its own tokens: plans
    "act": None,
    "embed": STORED,
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "vocab": "tp",
    "vocab_in": None,
    "head_dim": None,
    "layers": None,
    "domains": None,
    "feature": None,
    "hidden": None,
}


class Layout(NamedTuple):
    """Logical axis of a stream's tokens at work and at rest."""

    work: str
    rest: str


WHOLE = Layout("token", "token")  # few tokens: decoding
REPLICATED = Layout("token", "token_tp")  # each device of cp does all of them
SPREAD = Layout("token_cp", "token_cp_tp")


def fitting(layout: Layout, tokens: int) -> Layout:
    """`layout`, but at rest as at work where so many tokens cannot be divided further (training refuses those)."""
    return Layout(layout.work, layout.work) if tokens % parts(layout.rest) else layout


SAME = "same"  # of a result's axis: it lies as that axis of the first operand (or `like`) does


def spec(axes: tuple[str, ...], like: jax.Array | None = None) -> P:
    """PartitionSpec of logical axes. An unknown axis name is a KeyError at once."""
    return P(*(jax.typeof(like).sharding.spec[i] if a == SAME else _mesh_axes(a) for i, a in enumerate(axes)))


def _mesh_axes(name: str) -> str | tuple[str, ...] | None:
    """What RULES says, without mesh axes that this code is already inside of (`per_replica`)."""
    names, inside = RULES[name], jax.sharding.get_abstract_mesh().manual_axes
    if _branches.get() and name in ("batch", "device"):
        names = ("cfg", *names)
    if not inside or names is None:
        return names
    left = tuple(n for n in ((names,) if isinstance(names, str) else names) if n not in inside)
    return left if len(left) > 1 else left[0] if left else None


_branches: contextvars.ContextVar[bool] = contextvars.ContextVar("branches", default=False)


@contextlib.contextmanager
def branches(apart: bool = True):
    """Inside, what is traced works on rows that lie along "branch": a device of cfg has those of its own branch."""
    token = _branches.set(apart)
    try:
        yield
    finally:
        _branches.reset(token)


def no_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty


def gather(w: jax.Array, axes: tuple[str, ...], dtype) -> jax.Array:
    """A parameter ready for use: cast to the compute dtype, then gathered over fsdp and cp (tp stays)."""
    w = w.astype(dtype)
    return w if no_mesh() else jax.sharding.reshard(w, _at_use(axes))


def _at_use(axes: tuple[str, ...]) -> P:
    return P(*(None if RULES[a] == STORED else _mesh_axes(a) for a in axes))


def einsum(equation: str, *operands: jax.Array, out: tuple[str, ...], matmul: str = "default") -> jax.Array:
    """jnp.einsum whose result has the logical axes `out`."""
    sharding = None if no_mesh() else spec(out, operands[0])
    return jnp.einsum(equation, *operands, out_sharding=sharding, precision=matmul)


class Product(NamedTuple):
    """How `project` multiplies. out: logical axes of the result; reduce: dtype in which devices add up gradients."""

    equation: str
    axes: tuple[str, ...]  # of the parameter
    out: tuple[str, ...]
    compute: str
    matmul: str = "default"
    reduce: str = "float32"
    result: str | None = None  # dtype of the result, where it is not that of the operands


def project(x: jax.Array, w: jax.Array, how: Product, like: jax.Array | None = None) -> jax.Array:
    """einsum(x, w) of a parameter as it is stored: cast and gathered (`gather`) for the product, and again backwards.

    The gradient of w comes out of its matmul in `reduce` and lies where w lies: XLA adds up the devices' shares there
    (ZeRO-3: a reduce-scatter over fsdp and cp, then a sum over data). Ordinary differentiation would round each
    device's share to the compute dtype first.
    """
    place = None if no_mesh() else spec(how.out, x if like is None else like)
    return _project(x, w, how, place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project(x, w, how: Product, place: P | None):
    return jnp.einsum(
        how.equation, x.astype(how.compute), gather(w, how.axes, how.compute), out_sharding=place,
        precision=how.matmul, preferred_element_type=how.result,
    )  # fmt: skip


def _project_forward(x, w, how, place):
    return _project(x, w, how, place), (x, w)


def _project_backward(how, place, saved, dy):
    x, w = saved
    (of_x, of_w), of_y = how.equation.split("->")[0].split(","), how.equation.split("->")[1]
    dy = dy.astype(how.compute)

    def product(equation, a, b, there, dtype):
        options = dict(out_sharding=there, precision=how.matmul, preferred_element_type=dtype)
        return jnp.einsum(equation, a, b, **options)

    places = (None, None) if no_mesh() else (jax.typeof(x).sharding.spec, _at_use(how.axes))
    dx = product(f"{of_y},{of_w}->{of_x}", dy, gather(w, how.axes, how.compute), places[0], how.compute)
    reduced = how.compute if how.reduce == "compute" else how.reduce
    dw = product(f"{of_x},{of_y}->{of_w}", x.astype(how.compute), dy, places[1], reduced)
    return dx.astype(x.dtype), constrain(dw, how.axes).astype(w.dtype)


_project.defvjp(_project_forward, _project_backward)


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return x if no_mesh() else jax.sharding.reshard(x, spec(axes, x))


TOKENS = ("token", "token_cp", "token_tp", "token_cp_tp")


def token_axis(x: jax.Array) -> str:
    """Along which of `TOKENS` axis 1 of x [B,T,…] lies."""
    return "token" if no_mesh() else {RULES[a]: a for a in TOKENS}[jax.typeof(x).sharding.spec[1]]


def at_work(x: jax.Array) -> jax.Array:
    """x [B,T,…] at rest → at work: tokens gathered over tp."""
    axis = token_axis(x)
    return constrain(x, ("batch", axis.removesuffix("_tp"), *(SAME,) * (x.ndim - 2))) if "tp" in axis else x


def size(axis: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return 1 if no_mesh() else jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def parts(axis: str) -> int:
    """Into how many parts a logical axis is divided."""
    names = RULES[axis] or ()
    return math.prod(map(size, (names,) if isinstance(names, str) else names))


def reshape(x: jax.Array, shape: tuple[int, ...], out: tuple[str, ...]) -> jax.Array:
    """x.reshape(shape), whose result has the logical axes `out`."""
    return jax.lax.reshape(x, shape) if no_mesh() else jax.lax.reshape(x, shape, out_sharding=spec(out))


ROWS = ("batch",)


def rowwise(f: Callable, *args, takes: tuple = (), gives: Any = ROWS, shared: tuple = (), kernel: bool = False):
    """`f(*args, *shared)` on each device's own part, which knows nothing of the others unless it asks them.

    takes: logical axes of each argument, where `ROWS` (a device has whole rows) is not meant; for a pytree of arrays
    the axes that all begin with, or a pytree of axes. gives: those of the result. shared: arrays that are whole on
    every device. Use it for what must not be distributed: gathers inside a row, random numbers, attention.
    kernel: `f` calls a Pallas kernel, which cannot say over which axes its results vary.
    """
    if no_mesh():
        return f(*args, *shared)
    in_specs = (*(_specs(a) for a in (*takes, *(ROWS,) * (len(args) - len(takes)))), *(P(),) * len(shared))
    return jax.shard_map(f, in_specs=in_specs, out_specs=_specs(gives), check_vma=not kernel)(*args, *shared)


def per_replica(f: Callable, whole, rows, *shared):
    """`f(whole, rows, *shared)` on each replica (mesh axis data) with its own rows; results are added up, once.

    Inside, the other mesh axes are as they were. What `f` returns must add up over rows.
    """
    if size("data") == 1:
        return f(whole, rows, *shared)

    def inside(whole, rows, *shared):
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), f(whole, rows, *shared))

    in_specs = (P(), P("data"), *(P(),) * len(shared))
    alone = jax.shard_map(inside, axis_names={"data"}, in_specs=in_specs, out_specs=P(), check_vma=False)
    return alone(whole, rows, *shared)


def _specs(axes):
    """Logical axes → PartitionSpec; a tuple of axes → a tuple of specs."""
    return spec(axes) if all(isinstance(a, str) for a in axes) else tuple(_specs(a) for a in axes)


def place(tree, axes_tree, mesh: jax.sharding.Mesh | None):
    """Shardings of a tree of parameters from its tree of logical axes; None without a mesh."""
    if mesh is None:
        return None
    return jax.tree.map(lambda _, a: NamedSharding(mesh, spec(a)), tree, axes_tree)


def on_host(tree):
    """Arrays moved to the memory of the host that owns their device; they keep their places."""
    return jax.device_put(tree, jax.memory.Space.Host)


def on_device(tree):
    return jax.device_put(tree, jax.memory.Space.Device)


def one_device():
    """A context without a mesh, whatever has been entered: for what is not divided, the codecs."""
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), dtype=object), ()))


def row_parts() -> int:
    """How many parts the rows of a batch are split into: data × fsdp of the current mesh, 1 without one."""
    return parts("batch")


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of every batch field over the data-parallel axes."""
    return NamedSharding(mesh, P(BATCH))


def own_rows(mesh: jax.sharding.Mesh, rows: int) -> tuple[int, ...]:
    """Which rows of a global batch this process holds, ascending; processes that share a row (tp, cp) both hold it."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    return tuple(sorted({r for (part,) in parts.values() for r in range(rows)[part]}))


def rowwise_cache(f: Callable, *caches, takes: str = "batch", gives: str = "batch"):
    """`rowwise` for keys and values of all layers, [L, B, T, H, d]: rows are axis 1, heads are split over tp."""
    if no_mesh():
        return f(*caches)
    before, after = (spec(("layers", rows, "token", "kv_heads")) for rows in (takes, gives))
    return jax.shard_map(f, in_specs=(before,) * len(caches), out_specs=after, check_vma=takes == gives)(*caches)
