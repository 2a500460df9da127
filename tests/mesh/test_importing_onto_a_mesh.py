"""An imported checkpoint, and PyTorch files themselves, land on any mesh in their shards. Runs itself on 8 devices."""

import pathlib
import tempfile

from mesh import devices


def test_restoring_onto_eight_devices():
    devices.run(__file__, 8)


def main(scratch: pathlib.Path):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from parity import oracle

    from conversion import convert, folder, weights
    from cosmos_jax import mesh
    from cosmos_jax import state as states
    from cosmos_jax.config import MeshConfig

    oracle.reference(oracle.OMNI).save_pretrained(scratch / "tiny", max_shard_size="100KB")
    convert.prepare(scratch / "tiny", scratch / "orbax")[2](lambda n: None)
    component = folder.open_folder(scratch / "tiny").components["transformer"]
    want = component.load()
    for config in (MeshConfig(1, 8, 1, 1), MeshConfig(2, 2, 2, 1)):
        for dtype in (jnp.float32, jnp.bfloat16):
            with jax.set_mesh(mesh.build(config)):
                abstract = states.abstract_params(component.config, dtype)
                ways = (
                    convert.load(scratch / "orbax", {"model": abstract})["model"],
                    weights.place(component.weights(), abstract),
                )
            for got in ways:
                jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, jnp.asarray(y, x.dtype)), got, want)
                assert jax.tree.map(lambda x: (x.dtype, x.sharding), got) == jax.tree.map(
                    lambda x: (x.dtype, x.sharding), abstract
                )
            q = ways[1]["layers"]["gen"]["mlp"]["up"]
            assert q.addressable_shards[0].data.size * config.fsdp * config.tp == q.size


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(pathlib.Path(folder))
