"""Kernels inside shard_map: each device its own rows, heads and plans. Runs itself where there are four."""

from mesh import devices


def test_kernels_on_four_devices():
    devices.run(__file__, 4)


def main():
    import dataclasses

    import jax
    import numpy as np
    import synthetic

    from cosmos_jax import mesh, shard
    from cosmos_jax.config import MeshConfig
    from cosmos_jax.model import cosmos
    from cosmos_jax.precision import HIGHEST
    from pallas_kernels import platform

    cfg, batch = dataclasses.replace(synthetic.MODEL, layers=1), synthetic.batch(0)
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    times = np.full(batch["segment_shift"].shape, 400.0, np.float32)
    params = cosmos.init(cfg, jax.random.key(0))

    def loss(p, batch, noised, times, attention):
        here = dataclasses.replace(cfg, attention=attention)
        out = cosmos.apply(p, here, batch, noised, times, precision=HIGHEST)
        return sum(jax.numpy.sin(3 * x).sum() for x in jax.tree.leaves(out))

    def run(attention, *args):
        return jax.jit(jax.value_and_grad(lambda *x: loss(*x, attention)))(*args)

    for axes in (MeshConfig(data=1, fsdp=2, tp=2), MeshConfig(data=1, fsdp=1, tp=2, cp=2)):
        here = mesh.build(axes, jax.devices()[:4])
        with jax.set_mesh(here):
            placed = jax.device_put(params, shard.place(params, cosmos.logical_axes(cfg), here))
            data = jax.device_put((batch, noised, times), shard.batch_sharding(here))
            want = run("xla", placed, *data)  # that this is what one device computes, test_mesh.py shows
            with platform.interpreted():
                got = run("mosaic_tpu", placed, *data)
        for a, b in zip(jax.tree.leaves(got), map(np.asarray, jax.tree.leaves(want)), strict=True):
            assert np.abs(np.asarray(a) - b).max() <= 1e-5 * np.abs(b).max()


if __name__ == "__main__":
    main()
