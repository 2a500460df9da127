"""The engine's latents are the same on eight devices as on one, whatever branches run. Runs itself on eight."""

from mesh import devices


def test_the_engine_on_eight_devices():
    devices.run(__file__, 8)


def main():
    import dataclasses

    import jax
    import numpy as np
    from parity import oracle, test_engine, test_guidance, test_sampling

    from cosmos_jax import mesh
    from cosmos_jax import state as states
    from cosmos_jax.config import MeshConfig
    from cosmos_jax.model import cosmos
    from cosmos_jax.precision import HIGHEST
    from cosmos_jax.sampling import engine, generate, memory
    from data_pipelines.schema import MODALITIES

    _, cfg, params = test_sampling.tiny()
    rng = np.random.RandomState(0)

    def four(tree):
        """Four rows, with latents of their own, where there was one."""
        if not isinstance(tree, dict):
            return np.concatenate([tree] * 4)
        rows = {k: four(x) for k, x in tree.items()}
        own = 1 + np.arange(4, dtype=np.float32)[:, None, None] / 10
        return {k: x * own if k.endswith("_x0") or k in MODALITIES else x for k, x in rows.items()}

    cond, uncond, hidden, _ = test_guidance.packed()
    noise = generate.framework_buffers(cond, {(0, 0): (5, [test_guidance.SHAPE] * 2)}, cfg.patch)
    every = dataclasses.replace(test_guidance.CASES["intervals that end on a step"], normalize=True)
    transfer = generate.Job(
        four(cond), four(noise), test_guidance.schedules.unipc(5, 5.0), every, four(uncond), four(hidden)
    )
    one = test_engine.job(schedule=test_engine.DISTILLED, guidance=2.0, key=jax.random.key(1))
    distilled = dataclasses.replace(one, batch=four(one.batch), noise=four(one.noise), uncond=four(one.uncond))
    fresh = {n: rng.standard_normal((4, *x.shape)).astype(np.float32) for n, x in distilled.noise.items()}
    fed = dataclasses.replace(distilled, key=None, fresh=fresh)

    def run(job):
        made = engine.build(states.abstract_params(cfg), cfg, job, precision=HIGHEST, trajectory=True)

        def load(name):
            where = cosmos.part(states.abstract_params(cfg), name)
            return jax.tree.map(lambda x, p: jax.device_put(p, x.sharding), where, cosmos.part(params, name))

        steps = []
        ((got, path),) = made.run(load, [job], steps.append)
        assert steps == list(range(job.schedule.steps))
        for n in got:
            np.testing.assert_array_equal(path[n][-1], got[n])
        return jax.device_get(got), made

    for job in (transfer, distilled, fed):
        want, alone = run(job)
        with jax.set_mesh(mesh.build(MeshConfig(2, 2, 2, 1), jax.devices())):
            got, spread = run(job)
            assert memory.free_memory() < 2**50 / 8
        for n in (n for n, x in want.items() if x.size):
            assert oracle.relative(got[n], want[n])[0] <= 1e-5, n
        assert spread.memory["denoise"].weights < alone.memory["denoise"].weights / 2  # each device holds a part
        assert spread.memory["denoise"].total < alone.memory["denoise"].total


if __name__ == "__main__":
    main()
