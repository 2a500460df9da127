"""The two feed-forward networks: gated SiLU (Nano, Super) and squared ReLU (Edge). Spec model.md §2.2."""

from __future__ import annotations

import jax
from flax import nnx

from cosmos_jax import shard
from cosmos_jax.model.declare import param, project
from cosmos_jax.precision import Precision


class MLP(nnx.Module):
    """swiglu: down(silu(gate x) · up x); relu2: down(relu(up x)²)."""

    def __init__(self, rngs, hidden: int, mlp: int, act: str, init):
        self.gate = param(rngs, (hidden, mlp), ("embed", "mlp"), init) if act == "swiglu" else None
        self.up = param(rngs, (hidden, mlp), ("embed", "mlp"), init)
        self.down = param(rngs, (mlp, hidden), ("mlp", "embed"), init)

    def __call__(self, x: jax.Array, precision: Precision, like: jax.Array | None = None) -> jax.Array:
        """x [B,T,D], at work → the same; where tokens lie in the result is as in `like` (default x)."""
        x = shard.at_work(x)

        def into(w):
            return project("btd,df->btf", x, w, precision, out=("batch", shard.SAME, "mlp"))

        if self.gate is None:
            inner = jax.nn.relu(into(self.up)) ** 2
        else:
            inner = jax.nn.silu(into(self.gate)) * into(self.up)
        like = x if like is None else like
        return project("btf,fd->btd", inner, self.down, precision, out=("batch", shard.SAME, "act"), like=like)
