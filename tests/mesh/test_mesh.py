"""Loss, gradients and what travels, on every kind of mesh: 8 devices against one device without a mesh."""

import json
import tempfile

import numpy as np
import pytest
import synthetic
from mesh import devices

pytestmark = pytest.mark.slow
STEPS = 3
MESHES = {  # mesh axes, and settings that go with them
    "fsdp8": dict(fsdp=8),
    "data2_fsdp2_tp2": dict(data=2, fsdp=2, tp=2),
    "tp4": dict(tp=4),
    "cp8": dict(cp=8),
    "fsdp2_tp2_cp2": dict(fsdp=2, tp=2, cp=2),
    "ulysses": dict(tp=2, cp=2, context="ulysses"),
    "ring": dict(fsdp=2, cp=4, context="ring"),
    "und replicated": dict(data=2, cp=4, und_tokens="replicated"),
    "accumulated": dict(data=2, fsdp=2, tp=2, accumulate=2),
    "rematerialised, offloaded": dict(fsdp=2, tp=2, cp=2, remat="attn", offload=True),
    "muon": dict(fsdp=4, tp=2, name="muon"),
}
GROUPS = {"context": "model", "und_tokens": "model", "remat": "model", "name": "optim"}
GROUPS |= dict.fromkeys(("accumulate", "offload"), "optim")
PLANNED = {"ulysses": ["all-to-all"], "ring": ["collective-permute"]}  # exchanges of shards; nowhere else
HEADS = {"model.heads": 8, "model.kv_heads": 4}


def settings(row: dict) -> dict:
    """Config overrides of a row of MESHES."""
    sizes = {f"mesh.{a}": row.get(a, 1) for a in ("data", "fsdp", "tp", "cp")}
    return sizes | {f"{group}.{name}": row[name] for name, group in GROUPS.items() if name in row}


def run(config):
    """Losses, first gradient and last state of a run on the current mesh; how often its step was compiled; its text."""
    import jax

    from cosmos_jax import shard, state, step

    train_step, current = step.make_train_step(config), state.init(config)
    rows = None if shard.no_mesh() else shard.batch_sharding(jax.sharding.get_mesh())
    losses, gradient = [], None
    for i in range(STEPS):
        current, metrics = train_step(current, jax.device_put(synthetic.batch(i % 4), rows))
        losses.append(float(metrics["loss"]))
        if i == 0 and config.optim.name == "adamw":  # its first moment after one step: a tenth of the clipped gradient
            gradient = [np.asarray(x) for x in jax.tree.leaves(current["opt"][1].mu)]
    text = train_step.lower(current, jax.device_put(synthetic.batch(0), rows)).compile().as_text()
    return losses, gradient, current, train_step._cache_size(), text


def main():
    import jax

    from cosmos_jax import mesh, state
    from cosmos_jax.checkpoint import Checkpoints
    from cosmos_jax.plan import hlo

    config = synthetic.override(synthetic.CONFIG, {"train.steps": STEPS, **HEADS})
    muon = synthetic.override(config, {"optim.name": "muon"})
    want, gradient, *_ = run(config)
    results = {"none": want, "muon alone": run(muon)[0], "strayed": [], "restored": {}}
    results |= {"gradients": {}, "compiled": {}, "exchanges": {}, "over data": {}}
    checkpoint = Checkpoints(tempfile.mkdtemp())
    for name, row in MESHES.items():
        cfg = synthetic.override(config, settings(row))
        sizes = [row.get(a, 1) for a in mesh.AXES]
        built = mesh.build(cfg.mesh, jax.devices()[: np.prod(sizes)])
        mesh.check(cfg, built)
        with jax.set_mesh(built):
            results[name], own, last, results["compiled"][name], text = run(cfg)
            if name == "fsdp8":
                checkpoint.save(STEPS, last, {}, cfg)
                results["saved"] = synthetic.digest(last)
            elif row.get("data", 1) == 2 or name == "muon":
                results["strayed"] += [f"{name}: {path}" for path in strayed(last)]
            if row.get("offload"):
                results["waits"] = sorted(
                    {x.sharding.memory_kind for k in ("opt", "ema") for x in jax.tree.leaves(last[k])}
                )
            if name in ("data2_fsdp2_tp2", "rematerialised, offloaded"):
                results["restored"][name] = synthetic.digest(checkpoint.restore(state.abstract(cfg))[0])
        if own is not None:
            pairs = zip(own, gradient, strict=True)
            results["gradients"][name] = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
        sent = hlo.collectives(text, dict(built.shape))
        results["exchanges"][name] = sorted({c.kind for c in sent} & {"all-to-all", "collective-permute"})
        results["over data"][name] = max((c.times for c in sent if "data" in c.axes and c.bytes > 64), default=0)
    results["restored"]["none"] = synthetic.digest(checkpoint.restore(state.abstract(config))[0])
    checkpoint.close()
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


@pytest.mark.parametrize("mesh", [m for m in MESHES if m != "muon"])
def test_same_loss_and_gradient_on_any_mesh(results, mesh):
    np.testing.assert_allclose(results[mesh], results["none"], rtol=1e-5)
    assert results["gradients"][mesh] <= 1e-5


def test_muon_gives_the_same_loss_on_a_mesh(results):
    """Orthogonalising lifts rounding errors of small singular values, so the bound is looser than Adam's."""
    np.testing.assert_allclose(results["muon"], results["muon alone"], rtol=1e-4)
    assert results["muon"][-1] != results["none"][-1]


def test_a_run_compiles_its_step_once(results):
    assert set(results["compiled"].values()) == {1} and len(results["compiled"]) == len(MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_is_exchanged_that_was_not_asked_for(results, mesh):
    """Shards travel between devices (all-to-all, collective-permute) only for the attention that is named so."""
    assert results["exchanges"][mesh] == PLANNED.get(mesh, [])


def test_replicas_add_up_their_gradients_once_a_step(results):
    """Not once a micro-batch, and not in the loop over layers."""
    assert results["over data"]["accumulated"] == 1
    assert results["over data"]["data2_fsdp2_tp2"] > 1  # one micro-batch: layer by layer, beside the backward pass


def test_moments_and_averages_lie_where_their_parameter_lies(results):
    assert results["strayed"] == []


def test_offloaded_moments_and_averages_wait_on_the_host(results):
    assert results["waits"] == ["pinned_host"]


def test_a_checkpoint_restores_on_any_mesh(results):
    assert set(results["restored"].values()) == {results["saved"]} and len(results["restored"]) == 3


if __name__ == "__main__":
    main()
