"""Attention tile by tile is the reference, whatever the lengths, segments and tiles; small sizes never see it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

import pallas_kernels.attention as attention
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from pallas_kernels.attention import blocked, segments
from pallas_kernels.attention.blocked import Tiles

B, U, G, HEADS, KV_HEADS, D = 2, 37, 53, 6, 2, 8
TILES = [Tiles(8, 16), Tiles(7, 5, one_head=False), Tiles(16, 8, one_head=False, skip=False)]


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def ids(seed, t, shuffled=False):
    """Three runs and padding in each row; shuffled: in no order, as no packer makes them."""
    rng, out = np.random.default_rng(seed), np.full((B, t), -1, np.int32)
    for row in out:
        ends = np.sort(rng.choice(np.arange(1, t), 3, replace=False))
        for s, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            row[a:b] = s
        if shuffled:
            rng.shuffle(row)
    return jnp.asarray(out)


def operands(shuffled=False):
    gen, und = (G, HEADS), (U, KV_HEADS)
    q, k, v = draw(0, B, *gen, D), draw(1, B, G, KV_HEADS, D), draw(2, B, G, KV_HEADS, D)
    return (q, k, v, draw(3, B, *und, D), draw(4, B, *und, D)), ids(5, G, shuffled), ids(6, U, shuffled)


def calls(arrays, gen_ids, und_ids):
    """The three front doors as functions of their arrays."""
    limit = jnp.minimum(jnp.arange(G) // 5 * 5 + 9, G) * jnp.ones((B, 1), jnp.int32)  # frame-causal: 5 tokens a frame
    plans = {
        "gen": attention.gen_plan(attention.Segments(und_ids, gen_ids)),
        "limited": attention.gen_plan(attention.Segments(und_ids, gen_ids, limit)),
        "und": attention.und_plan(attention.Segments(gen_ids)),
        "full": attention.full_plan(gen_ids),
    }

    def call(plan):
        """The log-sum-exp is part of the answer: what is under test differentiates it too."""

        def f(q, k, v, *und):
            k, v = ((und[0], k), (und[1], v)) if und else (k, v)
            out, lse = attention.attention(q, k, v, plan, scale=0.35, return_lse=True)
            return out, jnp.where(lse == -jnp.inf, 7.0, lse)

        return f

    return {name: (call(plan), arrays[: 3 if len(plan.masks.k_ids) == 1 else 5]) for name, plan in plans.items()}


def results(f, args):
    """Output, and the gradients of a random projection of it."""
    weight, other = draw(9, B, G, HEADS, D), draw(8, B, HEADS, G)

    def loss(*x):
        out, lse = f(*x)
        return (out * weight).sum() + (lse * other).sum(), (out, lse)

    grads, out = jax.jit(jax.grad(loss, tuple(range(len(args))), has_aux=True))(*args)
    return out, grads


@pytest.fixture
def use(monkeypatch):
    """Every size goes through these tiles."""

    def set_tiles(tiles):
        monkeypatch.setattr(attention, "WHOLE", 0)
        monkeypatch.setattr(attention, "xla_tiles", lambda: tiles)

    return set_tiles


@pytest.mark.parametrize(
    ("name", "tiles"),
    [("gen", TILES[0]), ("gen", TILES[1]), ("limited", TILES[2]), ("und", TILES[1]), ("full", TILES[0])],
)
def test_blocked_equals_reference(use, name, tiles):
    f, args = calls(*operands())[name]
    want, want_grads = results(f, args)
    use(tiles)
    got, grads = results(f, args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not np.asarray(got[0])[np.asarray(operands()[1]) < 0].any()  # padding attends to nothing: exactly 0
    for a, b in zip(grads, want_grads, strict=True):
        assert jnp.linalg.norm(a - b) <= 1e-6 * jnp.linalg.norm(b)


def test_ids_in_any_order_are_read_correctly(use):
    """What is skipped is only an optimisation for runs: unsorted ids give the same result."""
    f, args = calls(*operands(shuffled=True))["gen"]
    want = f(*args)
    use(Tiles(8, 16))
    np.testing.assert_allclose(jax.jit(f)(*args)[0], want[0], atol=1e-6)


def test_scores_of_any_size_are_stable(use):
    """The running maximum: scores of ±5,000 neither overflow nor lose a row."""
    (q, *rest), *both = operands()
    f, args = calls((q * 3e3, *rest), *both)["gen"]
    want = f(*args)[0]
    use(Tiles(8, 16))
    got = jax.jit(f)(*args)[0]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_bfloat16_is_as_close_as_the_reference(use):
    both, args = calls(*operands())["gen"]
    exact = lambda *x: both(*x)[0]  # noqa: E731
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)
    truth = exact(*jax.tree.map(lambda x: x.astype(jnp.float32), halves))
    whole = jnp.linalg.norm(jax.jit(exact)(*halves).astype(jnp.float32) - truth)
    use(Tiles(8, 16))
    got = jax.jit(exact)(*halves)
    assert got.dtype == jnp.bfloat16
    assert jnp.linalg.norm(got.astype(jnp.float32) - truth) <= 1.1 * whole


def test_invisible_tiles_are_skipped():
    """Segments of 8 in tiles of 8: of 4 × 4 tiles only the diagonal, and below a causal mask its own lower half."""
    kinds = lambda *x: segments.code(*segments.by_range(*x))  # noqa: E731
    runs = jnp.repeat(jnp.arange(4), 8).reshape(4, 8)
    assert np.array_equal(kinds(runs, runs, None), np.eye(4) * segments.ALL)
    one, limit = jnp.zeros((4, 8), jnp.int32), jnp.arange(1, 33).reshape(4, 8)
    causal = np.tril(np.full((4, 4), segments.ALL), -1) + np.eye(4) * segments.SOME
    assert np.array_equal(kinds(one, one, limit), causal)
    assert not kinds(one, one - 1, None).any()


def test_memory_does_not_grow_with_the_square():
    """XLA's account of temporaries, forward and backward: 4 times the length, 4 times the memory and a little."""

    def temporaries(t, grad):
        x = jax.ShapeDtypeStruct((1, t, 4, 32), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, t, 1, 32), jnp.float32)
        one = jax.ShapeDtypeStruct((1, t), jnp.int32)
        f = lambda q, k, v, ids: blocked.attend(q, ids, [(k, v, ids, None)], 0.1, tiles=Tiles(64, 512))[0].sum()  # noqa: E731
        f = jax.grad(f, (0, 1, 2)) if grad else f
        return jax.jit(f).lower(x, kv, kv, one).compile().memory_analysis().temp_size_in_bytes

    for grad in (False, True):
        short, long = temporaries(2048, grad), temporaries(8192, grad)
        assert long < 5 * short and long < 8192**2, (grad, short, long)


def test_small_sizes_keep_the_reference():
    """The toy (configs/toy.py: 4 rows, 4 heads, 184 queries, 312 keys) trains on the definition, bit for bit."""
    assert attention.form(4, 4, 184, 312) == "whole"
    assert attention.form(2, 32, 2880, 6336) == "blocked"
    assert "tiles of at most 256" in attention.describe(2, 32, 2880, 6336)
    (q, k, v, *_), gen_ids, _ = operands()
    f = lambda q: attention.attention(q, k, v, attention.full_plan(gen_ids), scale=0.35)  # noqa: E731
    assert "while" not in jax.jit(f).lower(q).as_text()


def test_the_whole_network_blocked_equals_whole(use):
    batch, cfg = synthetic.batch(0), synthetic.MODEL
    params = cosmos.init(cfg, jax.random.key(0))
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    times = jnp.full(batch["segment_shift"].shape, 400.0)

    def run():
        return jax.jit(lambda p: cosmos.apply(p, cfg, batch, noised, times, precision=HIGHEST))(params)

    want = run()
    use(Tiles(8, 8))
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
