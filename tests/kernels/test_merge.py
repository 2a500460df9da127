"""Two partial attentions merged are the attention over both key sets, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Segments, attention, gen_plan, make_plan
from pallas_kernels.attention.merge import merge
from pallas_kernels.attention.segments import Masks, gen_masks


def test_merged_partials_equal_one_attention():
    """Some queries see keys in the first set only, some in the second only, some in neither."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    und, gen = jnp.array([[0, 0, 1, 3, -1]]), jnp.array([[0, 1, 1, 2, 2, 3, 4, -1]])
    segments = Segments(und, gen, jnp.array([[1, 2, 8, 8, 4, 0, 0, 8]]))
    q = normal(1, 8, 4, 16)
    k, v = ((normal(1, 5, 2, 16), normal(1, 8, 2, 16)) for _ in range(2))
    cotangents = normal(1, 8, 4, 16) * 100, normal(1, 4, 8) * 100  # large: nothing may overflow in what is dead

    def whole(q, k, v):
        return attention(q, k, v, gen_plan(segments), scale=0.25, return_lse=True)

    def merged(q, k, v):
        m = gen_masks(segments)
        plans = [make_plan(Masks(m.q_ids, (ids,), (limit,))) for ids, limit in zip(m.k_ids, m.limits, strict=True)]
        return merge(*(attention(q, *kv, p, scale=0.25, return_lse=True) for *kv, p in zip(k, v, plans, strict=True)))

    def results(f):
        out, back = jax.vjp(f, q, k, v)
        return jax.tree.leaves((out, back(cotangents)))

    got, want = jax.jit(results, static_argnums=0)(merged), jax.jit(results, static_argnums=0)(whole)
    dead = np.isneginf(want[1])
    assert dead[0, 0].tolist() == [False] * 6 + [True] * 2 and np.array_equal(np.isneginf(got[1]), dead)
    for a, b in zip(got, want, strict=True):
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    assert not got[0].swapaxes(1, 2)[dead].any() and not got[2].swapaxes(1, 2)[dead].any()
