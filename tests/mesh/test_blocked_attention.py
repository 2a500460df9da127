"""Attention tile by tile inside shard_map: each device its own rows and heads. Runs itself where there are four."""

from mesh import devices


def test_blocked_attention_on_four_devices():
    devices.run(__file__, 4)


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import pallas_kernels.attention as kernels
    from cosmos_jax import mesh, shard
    from cosmos_jax.config import MeshConfig
    from cosmos_jax.model import attention
    from cosmos_jax.precision import HIGHEST
    from pallas_kernels.attention.blocked import Tiles

    q, k = jax.random.normal(jax.random.key(0), (4, 12, 4, 8)), jax.random.normal(jax.random.key(1), (4, 12, 2, 8))
    ids = jnp.repeat(jnp.array([0, 0, 1, -1]), 3) * jnp.ones((4, 1), jnp.int32)

    def loss(q, k, ids):
        plans = attention.gen_plans(ids, ids, "xla", HIGHEST)
        out = attention.gen_attend(q, (k, k), (k, k), plans, None, HIGHEST)
        return jnp.square(out).sum(), out

    want = jax.grad(loss, (0, 1), has_aux=True)(q, k, ids)
    here = mesh.build(MeshConfig(data=2, fsdp=1, tp=2), jax.devices()[:4])
    kernels.WHOLE = 0
    for tiles in (Tiles(4, 5), Tiles(4, 5, one_head=False, skip=False)):
        kernels.xla_tiles = lambda t=tiles: t
        with jax.set_mesh(here):
            rows, heads = NamedSharding(here, P(shard.BATCH)), NamedSharding(here, P(shard.BATCH, None, "tp"))
            placed = jax.device_put((q, k, ids), (heads, heads, rows))
            got = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*placed)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.linalg.norm(np.asarray(a) - b) <= 1e-6 * np.linalg.norm(b)


if __name__ == "__main__":
    main()
