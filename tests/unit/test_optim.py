"""Schedules, frozen and paced parameters, clipping, EMA, and a real step that keeps its promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import synthetic

from cosmos_jax import optim, state, step
from cosmos_jax.config import ConfigError, OptimConfig

PARAMS = {
    "embed": jnp.ones(4),
    "layers": {tower: {"q": jnp.ones((2, 3)), "norm": jnp.ones(3)} for tower in ("und", "gen")},
    "action_in": {"kernel": jnp.ones((2, 2))},
}
SMALL = synthetic.override(
    synthetic.CONFIG, {"model.layers": 1, "optim.frozen": ["layers/und", "embed_tokens"], "optim.warmup": 0}
)


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_schedules(name, middle, end):
    rate = optim.schedule(OptimConfig(lr=2.0, schedule=name, warmup=10, final_lr=0.1), steps=110)
    assert [float(rate(n)) for n in (0, 5, 10)] == [0.0, 1.0, 2.0]
    assert float(rate(60)) == pytest.approx(2 * middle) and float(rate(110)) == pytest.approx(2 * end)
    assert float(optim.schedule(OptimConfig(lr=2.0, warmup=0), 100)(0)) == 2.0


def test_selection_by_path():
    cfg = OptimConfig(trainable=("gen", "action"), frozen=("norm",))
    trained, frozen = optim.select(cfg, PARAMS)
    assert set(trained) == {"layers", "action_in"} and set(trained["layers"]) == {"gen"}
    assert set(trained["layers"]["gen"]) == {"q"} and set(frozen["layers"]["gen"]) == {"norm"}
    assert jax.tree.structure(optim.join(trained, frozen)) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (OptimConfig(trainable=("layers/gne",)), "optim.trainable: 'layers/gne' .*did you mean 'layers/gen'"),
        (OptimConfig(frozen=("nrom",)), "optim.frozen: 'nrom' .*did you mean 'norm'"),
        (OptimConfig(lr_scale=(("action_out", 5.0),)), "optim.lr_scale: 'action_out' .*did you mean 'action_in'"),
        (OptimConfig(frozen=("",)), "leave no parameter to train"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(cfg, message):
    with pytest.raises(ConfigError, match=message):
        optim.select(cfg, PARAMS)


def test_frozen_parameters_cost_no_memory():
    trained, _ = optim.select(OptimConfig(trainable=("gen",)), PARAMS)
    moments = jax.eval_shape(optim.build(OptimConfig(), 10, trained).init, trained)
    sizes = sum(x.size for x in jax.tree.leaves(moments) if x.ndim)
    assert sizes == 2 * sum(x.size for x in jax.tree.leaves(trained))


def test_adamw_matches_its_formula():
    """Two steps by hand: clip to the global norm, bias-corrected Adam, decoupled decay, pace, learning rate."""
    cfg = OptimConfig(
        lr=0.1, schedule="constant", warmup=0, weight_decay=0.5, clip=1.0, eps=1e-6, lr_scale=(("a", 5.0), ("", 1.0))
    )
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    tx = optim.build(cfg, 100, params)
    opt, m, v = tx.init(params), np.zeros(3), np.zeros(3)
    want, pace = np.array([1.0, -2.0, 3.0]), np.array([5.0, 5.0, 1.0])
    for t, g in enumerate((np.array([3.0, 0.0, 4.0]), np.array([0.3, -0.1, 0.2])), 1):
        updates, opt = tx.update({"a": jnp.array(g[:2], jnp.float32), "b": jnp.array(g[2:], jnp.float32)}, opt, params)
        params = optax.apply_updates(params, updates)
        g = g * min(1.0, 1.0 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        want = want - 0.1 * pace * (adam + 0.5 * want)
    np.testing.assert_allclose(np.concatenate([params["a"], params["b"]]), want, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "shape", "inputs"), [("q", (2, 24, 4, 8), 1), ("o", (2, 4, 8, 24), 2), ("down", (2, 40, 24), 1)]
)
def test_muon_takes_the_step_of_torch(name, shape, inputs):
    """First step against torch.optim.Muon, which iterates in bfloat16; every layer is a matrix of its own."""
    torch = pytest.importorskip("torch")
    rng = np.random.RandomState(0)
    start, grad = rng.standard_normal((2, *shape)).astype(np.float32)
    cfg = OptimConfig(name="muon", lr=0.1, schedule="constant", warmup=0, clip=0.0, weight_decay=0.3)
    params = {"layers": {"gen": {name: jnp.array(start)}}}
    tx = optim.build(cfg, 10, params)
    updates, _ = tx.update({"layers": {"gen": {name: jnp.array(grad)}}}, tx.init(params), params)
    got = np.asarray(optax.apply_updates(params, updates)["layers"]["gen"][name])
    fan_in = int(np.prod(shape[1 : 1 + inputs]))
    for layer in range(shape[0]):
        want = torch.nn.Parameter(torch.from_numpy(start[layer].reshape(fan_in, -1).copy()))
        want.grad = torch.from_numpy(grad[layer].reshape(fan_in, -1).copy())
        torch.optim.Muon([want], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
        moved = want.detach().numpy() - start[layer].reshape(fan_in, -1)
        difference = got[layer].reshape(fan_in, -1) - start[layer].reshape(fan_in, -1) - moved
        assert np.linalg.norm(difference) < 0.03 * np.linalg.norm(moved)


def test_muon_takes_the_matrices_of_the_towers_and_adam_the_rest():
    cfg, plain = OptimConfig(name="muon", warmup=0, clip=0.0), OptimConfig(warmup=0, clip=0.0)
    stacked = {"mlp": {"up": jnp.ones((2, 4, 6))}, "norm": {"weight": jnp.ones((2, 4))}}
    params = {"layers": {"und": stacked, "gen": stacked}, "embed": jnp.ones((5, 4))}
    grads = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), params)
    muon, adam = (
        tx.update(grads, tx.init(params), params)[0] for tx in (optim.build(c, 10, params) for c in (cfg, plain))
    )
    same = jax.tree.map(lambda a, b: bool((a == b).all()), muon, adam)
    tower = {"mlp": {"up": False}, "norm": {"weight": True}}
    assert same == {"layers": {"und": tower, "gen": tower}, "embed": True}


def test_ema_follows_the_power_law():
    """Values of the reference (training.md §1.4) for s = 0.1."""
    assert optim.ema_exponent(0.1) == pytest.approx(6.9372039376, abs=1e-9)
    steps = {0: 0.0, 1: 0.004080, 2: 0.040025, 10: 0.469308, 100: 0.924060, 500: 0.984267, 1000: 0.992098}
    for step_, beta in steps.items():
        assert float(optim.ema_beta(step_, 0.1)) == pytest.approx(beta, abs=2e-6)
    first = optim.ema_update({"x": jnp.array(7.0)}, {"x": jnp.array(3.0)}, 0, 0.1)
    assert float(first["x"]) == 3.0


@pytest.fixture(scope="module")
def three_steps():
    """A small model with a frozen und tower, before and after three real steps, and the compiled step."""
    train_step, current = step.make_train_step(SMALL), state.init(SMALL)
    before, logged = jax.device_get(current), []
    for i in range(3):
        current, metrics = train_step(current, synthetic.batch(i))
        logged.append(jax.device_get(metrics))
    return before, current, logged, train_step


def test_a_step_compiles_once_and_frozen_parameters_stay(three_steps):
    before, after, logged, train_step = three_steps
    assert train_step._cache_size() == 1 and int(after["step"]) == 3
    trained, frozen = optim.select(SMALL.optim, after["params"])
    was_trained, was_frozen = optim.select(SMALL.optim, before["params"])
    jax.tree.map(np.testing.assert_array_equal, was_frozen, frozen)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), was_trained, trained)
    assert all(jax.tree.leaves(moved)), moved
    assert logged[0]["finite"] and {"loss/vision", "loss/action", "loss/sound", "loss/text"} <= set(logged[0])


def test_logged_losses_add_up(three_steps):
    flow = SMALL.flow
    for row in three_steps[2]:
        parts = [(getattr(flow, f"weight_{m}"), row[f"loss/{m}"]) for m in ("vision", "action", "sound", "text")]
        assert sum(w * x for w, x in parts) == pytest.approx(float(row["loss"]), rel=1e-5)
        assert row["tokens/und"] > 0 and row["tokens/gen"] > 0


def test_a_step_that_is_not_finite_changes_nothing(three_steps):
    _, current, _, train_step = three_steps
    before, bad = jax.device_get(current), synthetic.batch(0)
    bad["vision_x0"][0, 0, 0] = np.nan
    after, metrics = train_step(jax.tree.map(jnp.array, before), bad)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))


def test_micro_batches_add_up_to_the_batch(three_steps):
    """Same loss and same gradient norm, split into 1 and 4 micro-batches."""
    rows = []
    for n in (1, 4):
        cfg = synthetic.override(SMALL, {"optim.accumulate": n})
        run = step.make_train_step(cfg)
        rows.append(jax.device_get(run(state.init(cfg), synthetic.batch(0))[1]))
    for name, value in rows[0].items():
        np.testing.assert_allclose(rows[1][name], value, rtol=1e-6, err_msg=name)
