"""The same losses on every mesh: 20 training steps on 8 devices against one device without a mesh."""

import dataclasses
import json
import tempfile

import numpy as np
import pytest
import synthetic
from mesh import devices

STEPS = 20
MESHES = {
    "fsdp8": dict(fsdp=8),
    "tp2": dict(fsdp=1, tp=2),
    "fsdp4_tp2": dict(fsdp=4, tp=2),
    "data2_fsdp2_tp2": dict(data=2, fsdp=2, tp=2),
}


def losses(config):
    """Losses of a run on the current mesh, and how often its step was compiled."""
    import jax

    from cosmos_jax import shard, state, step

    train_step, current = step.make_train_step(config), state.init(config)
    rows = None if shard.no_mesh() else shard.batch_sharding(jax.sharding.get_mesh())
    out = []
    for i in range(STEPS):
        current, metrics = train_step(current, jax.device_put(synthetic.batch(i % 4), rows))
        out.append(float(metrics["loss"]))
    return out, train_step._cache_size(), current


def main():
    import jax

    from cosmos_jax import mesh, state
    from cosmos_jax.checkpoint import Checkpoints

    config = synthetic.override(synthetic.CONFIG, {"train.steps": STEPS})
    run, compiled, _ = losses(config)
    results = {"none": run, "compiled": {"none": compiled}, "strayed": [], "restored": {}}
    checkpoint = Checkpoints(tempfile.mkdtemp())
    for name, axes in MESHES.items():
        sizes = {"data": 1, "fsdp": 1, "tp": 1, **axes}
        here = jax.devices()[: np.prod(list(sizes.values()))]
        cfg = synthetic.override(config, {f"mesh.{k}": v for k, v in sizes.items()})
        built = mesh.build(cfg.mesh, here)
        mesh.check(cfg, built)
        with jax.set_mesh(built):
            results[name], results["compiled"][name], last = losses(cfg)
            results["strayed"] += [f"{name}: {path}" for path in strayed(last)]
        if name == "fsdp8":
            checkpoint.save(STEPS, last, {}, cfg)
            results["saved"] = synthetic.digest(last)
        else:
            with jax.set_mesh(built):
                results["restored"][name] = synthetic.digest(checkpoint.restore(state.abstract(cfg))[0])
    results["restored"]["none"] = synthetic.digest(checkpoint.restore(state.abstract(config))[0])
    checkpoint.close()
    with jax.set_mesh(mesh.build(dataclasses.replace(config.mesh, fsdp=4, tp=2))):
        results["accumulated"], results["compiled"]["accumulated"], _ = losses(
            synthetic.override(config, {"optim.accumulate": 2})
        )
    muon = synthetic.override(config, {"optim.name": "muon"})
    results["muon without a mesh"], *_ = losses(muon)
    with jax.set_mesh(mesh.build(dataclasses.replace(config.mesh, fsdp=4, tp=2))):
        results["muon"], results["compiled"]["muon"], last = losses(muon)
        results["strayed"] += [f"muon: {path}" for path in strayed(last)]
    print(json.dumps(results))


def strayed(current) -> list[str]:
    """Paths of moments and averages that lie elsewhere than their parameter."""
    import jax

    def by_path(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {tuple(jax.tree_util.keystr((k,), simple=True) for k in path): x for path, x in leaves}

    home, found, bad = by_path(current["params"]), 0, []
    for path, x in by_path({"opt": current["opt"], "ema": current["ema"]}).items():
        for key in (path[i:] for i in range(len(path)) if path[i:] in home):
            found += 1
            bad += [] if x.sharding == home[key].sharding else ["/".join(path)]
    assert found >= 2 * len(home)  # one or two moments and one average each
    return bad


@pytest.fixture(scope="module")
def results():
    return json.loads(devices.run(__file__, 8).splitlines()[-1])


@pytest.mark.parametrize("mesh", [*MESHES, "accumulated"])
def test_same_loss_on_any_mesh(results, mesh):
    np.testing.assert_allclose(results[mesh], results["none"], rtol=1e-5)


def test_muon_gives_the_same_loss_on_a_mesh(results):
    """Orthogonalising lifts rounding errors of small singular values, so the bound is looser than Adam's."""
    np.testing.assert_allclose(results["muon"], results["muon without a mesh"], rtol=1e-4)
    assert results["muon"][-1] != results["none"][-1]


def test_a_run_compiles_its_step_once(results):
    assert set(results["compiled"].values()) == {1}, results["compiled"]


def test_moments_and_averages_lie_where_their_parameter_lies(results):
    assert results["strayed"] == []


def test_a_checkpoint_restores_on_any_mesh(results):
    assert set(results["restored"].values()) == {results["saved"]} and len(results["restored"]) == 4


if __name__ == "__main__":
    main()
