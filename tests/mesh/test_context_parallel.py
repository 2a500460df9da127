"""Attention of a gen stream that is spread over devices equals one device's. Runs itself where there are eight."""

import json
import re

import pytest
from mesh import devices

ROWS, UND, GEN, HEADS, KEY_HEADS, DIM = 2, 10, 48, 16, 8, 8
# name: (how, devices along cp, along data, stripes, xla's form)
CASES = {
    "all_gather, 8 devices": ("all_gather", 8, 1, False, "whole"),
    "ring, 8 devices": ("ring", 8, 1, False, "whole"),
    "ulysses, 8 devices": ("ulysses", 8, 1, False, "whole"),
    "all_gather, 4 × 2 devices, stripes": ("all_gather", 4, 2, True, "whole"),
    "ring, 4 × 2 devices, stripes": ("ring", 4, 2, True, "whole"),
    "ulysses, 4 × 2 devices, stripes": ("ulysses", 4, 2, True, "whole"),
    "ring, 2 devices, tile by tile": ("ring", 2, 1, False, "blocked"),
}
SENT = {"all_gather": {"all-gather", "reduce-scatter"}, "ring": {"collective-permute"}, "ulysses": {"all-to-all"}}


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import pallas_kernels.attention as kernels
    from pallas_kernels.attention import context
    from pallas_kernels.attention.segments import Segments

    random = np.random.default_rng(0)
    und_ids = np.array([[0, 0, 0, 1, 1, 3, 3, -1, -1, -1], [0, 1, 1, 1, 1, 1, 2, 2, 4, -1]])
    gen_ids = np.array([[0] * 5 + [1] * 21 + [-1] * 2 + [2] * 7 + [3] + [-1] * 12, [0] * 30 + [1] + [2] * 17])
    limit = np.minimum(np.arange(GEN) // 6 * 6 + 6, GEN)  # frames of six tokens, causal
    limit = np.stack([limit, random.permutation(GEN)])  # and anything; some see only und, or nothing
    segments = Segments(*(jnp.asarray(x, jnp.int32) for x in (und_ids, gen_ids, limit)))

    def normal(tokens, heads):
        return jnp.asarray(random.standard_normal((ROWS, tokens, heads, DIM)), jnp.float32)

    q, do = normal(GEN, HEADS), normal(GEN, HEADS)
    k_und, v_und, k, v = (normal(n, KEY_HEADS) for n in (UND, UND, GEN, GEN))
    dlse = jnp.asarray(random.standard_normal((ROWS, HEADS, GEN)), jnp.float32)
    scale, operands = DIM**-0.5, (q, k_und, v_und, k, v, do, dlse)

    def results(attend):
        """o, lse, and the gradients of both under random cotangents."""

        def of(q, k_und, v_und, k, v, do, dlse, plan):
            (o, lse), back = jax.vjp(lambda q, *kv: attend(q, kv[::2], kv[1::2], plan), q, k_und, v_und, k, v)
            return o, lse, *back((do, dlse))

        return of

    def one_device(s):
        def attend(q, k, v, plan):
            return kernels.attention(q, k, v, plan, scale=scale, return_lse=True)

        return jax.jit(results(attend))(*operands, kernels.gen_plan(s))

    def spread(s, how, cp, data, stripes, remat=False, **options):
        mesh = jax.make_mesh((data, cp), ("data", "cp"), devices=jax.devices()[: data * cp])
        rows, tokens, planned = P("data"), P("data", "cp"), P(("data", "cp"))
        heads_first = P("data", None, "cp")

        def order(x, axis):  # of the stream → of devices that hold stripes of it
            return jnp.concatenate([x.take(jnp.arange(r, GEN, cp), axis) for r in range(cp)], axis)

        def back(x, axis):
            return x.take(jnp.argsort(order(jnp.arange(GEN), 0)), axis)

        def make(s):
            return context.plan(s, axis="cp", how=how, stripes=stripes, **options)

        def attend(q, k, v, plan):
            def local(q, k, v, plan):
                def of(q, k, v):
                    return context.attention(q, k, v, plan, scale=scale, return_lse=True)

                keep = jax.checkpoint_policies.save_only_these_names(*kernels.SAVED)
                return (jax.checkpoint(of, policy=keep) if remat else of)(q, k, v)

            specs = (tokens, (rows, tokens), (rows, tokens), planned)
            out = (tokens, heads_first)
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(q, k, v, plan)

        with jax.set_mesh(mesh):
            q, k_und, v_und, k, v, do, dlse = operands
            args = (q, k, v, do, *s[1:])
            args = [order(x, 1) if stripes else x for x in args]
            q, k, v, do = (jax.device_put(x, NamedSharding(mesh, tokens)) for x in args[:4])
            dlse = jax.device_put(order(dlse, 2) if stripes else dlse, NamedSharding(mesh, heads_first))
            k_und, v_und, ids = (jax.device_put(x, NamedSharding(mesh, rows)) for x in (k_und, v_und, s.und))
            s = Segments(ids, *(jax.device_put(x, NamedSharding(mesh, tokens)) for x in args[4:]))
            specs = Segments(rows, *(tokens,) * len(args[4:]))
            specs = dict(mesh=mesh, in_specs=(specs,), out_specs=planned, check_vma=False)
            plan = jax.jit(jax.shard_map(make, **specs))(s)  # made in one shard_map, used in another
            args = (q, k_und, v_und, k, v, do, dlse, plan)
            compiled = jax.jit(results(attend)).lower(*args).compile()
            got = compiled(*args)
        if stripes:
            got = [x if i in (3, 4) else back(x, 2 if i == 1 else 1) for i, x in enumerate(map(np.asarray, got))]
        return got, compiled.as_text()

    def errors(got, want):
        got, want = ([np.asarray(x) for x in tree] for tree in (got, want))
        dead = [np.isneginf(x[1]) for x in (got, want)]
        assert np.array_equal(*dead) and 0 < dead[0].mean() < 0.5
        assert not got[0].swapaxes(1, 2)[dead[0]].any() and not got[2].swapaxes(1, 2)[dead[0]].any()
        got[1], want[1] = (np.where(dead[0], 0, x[1]) for x in (got, want))
        return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True)]

    want, report = one_device(segments), {"errors": {}, "sent": {}}
    for name, (how, cp, data, stripes, form) in CASES.items():
        whole, kernels.WHOLE = kernels.WHOLE, 0 if form == "blocked" else kernels.WHOLE
        got, text = spread(segments, how, cp, data, stripes)
        kernels.WHOLE = whole
        report["errors"][name] = errors(got, want)
        report["sent"][name] = collectives(text)
    print(json.dumps(report))


def collectives(text: str) -> dict[str, int]:
    """Kind → how many a compiled program has."""
    found = re.findall(r"\s(all-\w+(?:-\w+)?|reduce-scatter|collective-permute)(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in set(found)}


@pytest.fixture(scope="module")
def report():
    return json.loads(devices.run(__file__, 8).splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_spread_attention_equals_one_device(report, case):
    """o, lse, dq, dk and dv of und (summed over devices), dk and dv of gen."""
    assert max(report["errors"][case]) <= 1e-5, report["errors"][case]


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_said_travels(report, case):
    """Beside it, one sum over devices: of the gradients of und."""
    assert set(report["sent"][case]) == SENT[CASES[case][0]] | {"all-reduce"}, report["sent"][case]


if __name__ == "__main__":
    main()
