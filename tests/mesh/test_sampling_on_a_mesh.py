"""Latents, text, weighted controls, what the eyes see: on four devices as on one. Runs itself where there are four."""

from mesh import devices


def test_sampling_decoding_and_seeing_on_four_devices():
    devices.run(__file__, 4)


def main():
    import jax
    import numpy as np
    from parity import oracle, test_decoding, test_sampling

    from cosmos_jax import mesh, shard
    from cosmos_jax.config import MeshConfig, SampleConfig
    from cosmos_jax.model import cosmos
    from cosmos_jax.precision import HIGHEST
    from cosmos_jax.sampling import generate, schedules, text

    _, cfg, params = test_sampling.tiny()
    pairs = [test_sampling.branches(cfg, seed=seed)[1] for seed in (1, 9)]
    cond, uncond = (test_sampling.rows(*b) for b in zip(*pairs, strict=True))
    noise, schedule = test_sampling.noise_of(cond), schedules.unipc(4, 5.0)
    prompts = test_decoding.prompts(cfg, lengths=(9, 3, 14, 6))
    how = SampleConfig(max_new_tokens=6, temperature=1.5, top_k=50, top_p=0.9)

    def run(params, put, progress=None):
        latents = generate.sample_latents(
            params, cfg, put(cond), put(noise), schedule, 6.0, uncond=put(uncond), precision=HIGHEST, progress=progress
        )
        return latents, text.generate_text(params, cfg, put(prompts), how, eos=(10**6,), precision=HIGHEST)

    want, words = run(params, lambda tree: tree)
    for config in (MeshConfig(1, 2, 2, 1), MeshConfig(2, 1, 1, 1)):
        devices = jax.devices()[: config.data * config.fsdp * config.tp]
        here = mesh.build(config, devices)
        with jax.set_mesh(here):
            placed = jax.device_put(params, shard.place(cosmos.abstract(cfg), cosmos.logical_axes(cfg), here))
            steps = []
            got, said = run(placed, lambda tree, m=here: jax.device_put(tree, shard.batch_sharding(m)), steps.append)
            jax.effects_barrier()
        assert sorted(map(int, steps)) == [0, 1, 2, 3]
        np.testing.assert_array_equal(said, words)
        for name in want:
            assert oracle.relative(got[name], want[name])[0] <= 1e-5, (config, name)
            clean = ~cond[f"{name}_noisy"]
            np.testing.assert_array_equal(np.asarray(got[name])[clean], cond[f"{name}_x0"][clean])


def controls():
    """One attention per weighted control, heads split over tp."""
    import jax
    from parity import oracle, test_modes

    from cosmos_jax import mesh, shard
    from cosmos_jax.config import MeshConfig
    from cosmos_jax.model import cosmos

    _, cfg, params = test_modes.pair("nano")
    batch = test_modes.batch_of([test_modes.WEIGHTED] * 2, cfg)
    want = test_modes.network(params, cfg, batch)
    here = mesh.build(MeshConfig(1, 2, 2, 1), jax.devices())
    with jax.set_mesh(here):
        placed = jax.device_put(params, shard.place(cosmos.abstract(cfg), cosmos.logical_axes(cfg), here))
        got = test_modes.network(placed, cfg, jax.device_put(batch, shard.batch_sharding(here)))
    assert oracle.relative(got["vision"], want["vision"])[0] <= 2e-6


def eyes():
    """Both kinds of vision encoder, and the und tower behind them."""
    import jax
    import numpy as np
    from parity import reasoner_oracle as oracle

    from cosmos_jax import mesh, shard
    from cosmos_jax.config import MeshConfig
    from cosmos_jax.model import cosmos
    from cosmos_jax.precision import HIGHEST

    for cfg in (oracle.QWEN, oracle.EDGE):
        params = jax.jit(cosmos.init, static_argnums=0)(cfg, jax.random.key(0))
        rows = [oracle.batch(oracle.prompt(case, cfg), cfg) for case in oracle.CASES]
        batch = {k: np.concatenate([b[k] for b in rows]) for k in rows[0]}
        want = oracle.forward(params, cfg, batch, HIGHEST)
        here = mesh.build(MeshConfig(1, 2, 2, 1), jax.devices())
        with jax.set_mesh(here):
            placed = jax.device_put(params, shard.place(cosmos.abstract(cfg), cosmos.logical_axes(cfg), here))
            got = oracle.forward(placed, cfg, jax.device_put(batch, shard.batch_sharding(here)), HIGHEST)
        tokens, patches = batch["und_segment_ids"] >= 0, batch["vit_segment_ids"][:, ::4] >= 0
        for x, y, real in zip(got[:2], want[:2], (tokens, patches), strict=True):
            assert oracle.relative(np.asarray(x)[real], np.asarray(y)[real])[0] <= 2e-6, cfg.vision.kind


if __name__ == "__main__":
    main()
    controls()
    eyes()
