"""The only sharding words of the project: logical axis → mesh axis, and the few operations that need to know.

In: arrays and logical axis names. Out: the same maths, placed. Every function is the identity (or the plain jnp
operation) when no mesh is set, so model code reads and runs the same on a laptop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")  # rows of the batch

# Parameters: one matrix dimension over fsdp (ZeRO-3: gathered at use), one over tp (stays sharded at use).
# `None` is written out, so that an unknown name is an error.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "token": None,
    "act": None,  # the residual stream is replicated over tp
    "embed": "fsdp",
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


def spec(axes: tuple[str, ...]) -> P:
    """PartitionSpec of logical axes. An unknown axis name is a KeyError at once."""
    return P(*(RULES[a] for a in axes))


def no_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty


def gather(w: jax.Array, axes: tuple[str, ...], dtype) -> jax.Array:
    """A parameter ready for use: cast to the compute dtype, then gathered over fsdp (tp stays sharded)."""
    w = w.astype(dtype)
    if no_mesh():
        return w
    return jax.sharding.reshard(w, P(*(None if RULES[a] == "fsdp" else RULES[a] for a in axes)))


def einsum(equation: str, *operands: jax.Array, out: tuple[str, ...], matmul: str = "default", dtype=None) -> jax.Array:
    """jnp.einsum whose result has the logical axes `out` (a contracted tp axis is reduced there)."""
    sharding = None if no_mesh() else spec(out)
    return jnp.einsum(equation, *operands, out_sharding=sharding, precision=matmul, preferred_element_type=dtype)


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return x if no_mesh() else jax.sharding.reshard(x, spec(axes))


def reshape(x: jax.Array, shape: tuple[int, ...], out: tuple[str, ...]) -> jax.Array:
    """x.reshape(shape), whose result has the logical axes `out`."""
    return jax.lax.reshape(x, shape) if no_mesh() else jax.lax.reshape(x, shape, out_sharding=spec(out))


def rowwise(f: Callable, *args, heads: tuple[int, ...] = (), out_heads: bool = False, kernel: bool = False):
    """Run `f` on each device's own rows: every argument is [B, ...] (or a pytree of such), and so is every result.

    `heads`: positions of arguments whose axis 2 is split over tp ([B, T, H, d]); `out_heads`: the same for the result.
    Use it for what must not be distributed: gathers inside a row, random numbers, attention kernels. kernel: `f` calls
    a Pallas kernel, which cannot say over which axes its results vary.
    """
    if no_mesh():
        return f(*args)
    row, head = P(BATCH), P(BATCH, None, "tp")
    in_specs = tuple(head if i in heads else row for i in range(len(args)))
    return jax.shard_map(f, in_specs=in_specs, out_specs=head if out_heads else row, check_vma=not kernel)(*args)


def place(tree, axes_tree, mesh: jax.sharding.Mesh | None):
    """Shardings of a tree of parameters from its tree of logical axes; None without a mesh."""
    if mesh is None:
        return None
    return jax.tree.map(lambda _, a: NamedSharding(mesh, spec(a)), tree, axes_tree)


def one_device():
    """A context without a mesh, whatever has been entered: for what is not divided, the codecs."""
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), dtype=object), ()))


def row_parts() -> int:
    """How many parts the rows of a batch are split into: data × fsdp of the current mesh, 1 without one."""
    return 1 if no_mesh() else math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in BATCH)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of every batch field over the data-parallel axes."""
    return NamedSharding(mesh, P(BATCH))


def rowwise_shared(f: Callable, rows: tuple, shared: tuple):
    """`f(*rows, *shared)` on each device's own rows, with `shared` arrays whole on every device."""
    if no_mesh():
        return f(*rows, *shared)
    in_specs = (P(BATCH),) * len(rows) + (P(),) * len(shared)
    return jax.shard_map(f, in_specs=in_specs, out_specs=P(BATCH))(*rows, *shared)


def rowwise_cache(f: Callable, *caches):
    """`rowwise` for keys and values of all layers, [L, B, T, H, d]: rows are axis 1, heads are split over tp."""
    if no_mesh():
        return f(*caches)
    spec = P(None, BATCH, None, "tp")
    return jax.shard_map(f, in_specs=(spec,) * len(caches), out_specs=spec)(*caches)
