"""Attention of a gen stream that is spread over devices equals one device's. Runs itself where there are eight."""

import json
import re
from typing import NamedTuple

import pytest
from mesh import devices

ROWS, UND, GEN, HEADS, KEY_HEADS, DIM = 2, 10, 48, 16, 8, 8


class Case(NamedTuple):
    how: str
    cp: int
    data: int = 1
    stripes: bool = False
    limits: bool = True
    impl: str = "xla"
    blocked: bool = False  # of xla: tile by tile
    shuffled: bool = False  # tokens lie anywhere
    remat: bool = False
    dtype: str = "float32"


CASES = {
    "all_gather, 8 devices": Case("all_gather", 8),
    "ring, 8 devices": Case("ring", 8),
    "ulysses, 8 devices": Case("ulysses", 8),
    "all_gather, 4 × 2 devices, stripes": Case("all_gather", 4, 2, stripes=True),
    "ring, 4 × 2 devices, stripes": Case("ring", 4, 2, stripes=True),
    "ulysses, 4 × 2 devices, stripes": Case("ulysses", 4, 2, stripes=True),
    "ring, 2 devices, tile by tile": Case("ring", 2, blocked=True),
    "ring, any device has any token": Case("ring", 4, limits=False, shuffled=True),
    "ring, rematerialised": Case("ring", 4, 2, stripes=True, remat=True),
    "ring, bfloat16": Case("ring", 4, 2, dtype="bfloat16"),
    "all_gather, mosaic_tpu": Case("all_gather", 4, 2, stripes=True, impl="mosaic_tpu"),
    "ring, mosaic_tpu": Case("ring", 4, 2, stripes=True, impl="mosaic_tpu"),
    "ring, tokens before heads": Case("ring", 4, 2, impl="formulas"),
    "ulysses, tokens before heads": Case("ulysses", 4, 2, impl="formulas"),
}
SENT = {"all_gather": {"all-gather", "reduce-scatter"}, "ring": {"collective-permute"}, "ulysses": {"all-to-all"}}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import pallas_kernels.attention as kernels
    from pallas_kernels import platform
    from pallas_kernels.attention import Segments, context

    formulas()
    random = np.random.default_rng(0)
    und_ids = np.array([[0, 0, 0, 1, 1, 3, 3, -1, -1, -1], [0, 1, 1, 1, 1, 1, 2, 2, 4, -1]])
    gen_ids = np.array([[0] * 5 + [1] * 21 + [-1] * 2 + [2] * 7 + [3] + [-1] * 12, [0] * 30 + [1] + [2] * 16 + [5]])
    limit = np.minimum(np.arange(GEN) // 6 * 6 + 6, GEN)  # frames of six tokens, causal
    limit = np.stack([limit, random.permutation(GEN)])  # and anything; some see only und, or nothing
    segments = Segments(*(jnp.asarray(x, jnp.int32) for x in (und_ids, gen_ids, limit)))

    def normal(tokens, heads):
        return jnp.asarray(random.standard_normal((ROWS, tokens, heads, DIM)), jnp.float32)

    q, do = normal(GEN, HEADS), normal(GEN, HEADS)
    k_und, v_und, k, v = (normal(n, KEY_HEADS) for n in (UND, UND, GEN, GEN))
    dlse = jnp.asarray(random.standard_normal((ROWS, GEN, HEADS)), jnp.float32)
    scale, shared, spread_out = DIM**-0.5, (k_und, v_und), (q, k, v, do, dlse)

    def results(attend):
        """o, lse [B,T,H], and what random cotangents of both give: dq, dk and dv of gen, of und."""

        def of(shared, spread_out, plan):
            q, k, v, do, dlse = spread_out

            def attended(q, k, v, k_und, v_und):
                o, lse = attend(q, (k_und, k), (v_und, v), plan)
                return o, lse.swapaxes(1, 2)

            (o, lse), back = jax.vjp(attended, q, k, v, *shared)
            return o, lse, *back((do, dlse))

        return of

    def one_device(s):
        def attend(q, k, v, plan):
            return kernels.attention(q, k, v, plan, scale=scale, return_lse=True)

        return jax.jit(results(attend))(shared, spread_out, kernels.gen_plan(s, impl="xla"))

    def spread(s, case):
        mesh = jax.make_mesh((case.data, case.cp), ("data", "cp"), devices=jax.devices()[: case.data * case.cp])
        rows, tokens, planned = P("data"), P("data", "cp"), P(("data", "cp"))
        order = np.arange(GEN)  # of tokens, device by device
        if case.stripes:
            order = order.reshape(-1, case.cp).T.reshape(-1)
        if case.shuffled:
            order = random.permutation(GEN)

        def make(s):
            options = dict(axis="cp", how=case.how, stripes=case.stripes)
            return context.plan(s, impl=case.impl, **options)

        def attend(q, k, v, plan):
            def local(q, k, v, plan):
                def of(q, k, v):
                    return context.attention(q, k, v, plan, scale=scale, return_lse=True)

                keep = jax.checkpoint_policies.save_only_these_names(*kernels.SAVED)
                return (jax.checkpoint(of, policy=keep) if case.remat else of)(q, k, v)

            specs = (tokens, (rows, tokens), (rows, tokens), planned)
            out = (tokens, P("data", None, "cp"))
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(q, k, v, plan)

        def place(tree, spec):
            def one(x):
                x = x.take(order, 1) if spec == tokens else x
                x = x.astype(case.dtype) if x.ndim == 4 else x
                return jax.device_put(x, NamedSharding(mesh, spec))

            return jax.tree.map(one, tree)

        with jax.set_mesh(mesh), platform.interpreted():
            s = Segments(place(s.und, rows), *place(s[1:], tokens))
            specs = Segments(rows, tokens, None if s.gen_limit is None else tokens)
            specs = dict(mesh=mesh, in_specs=(specs,), out_specs=planned, check_vma=False)
            plan = jax.jit(jax.shard_map(make, **specs))(s)  # made in one shard_map, used in another
            args = place(shared, rows), place(spread_out, tokens), plan
            compiled = jax.jit(results(attend)).lower(*args).compile()
            got = compiled(*args)
        back = np.argsort(order)
        got = [x if i > 4 else x.take(back, 1) for i, x in enumerate(map(np.asarray, got))]
        return got, compiled.as_text()

    def errors(got, want):
        got, want = ([np.asarray(x, np.float32) for x in tree] for tree in (got, want))
        dead = [np.isneginf(x[1]) for x in (got, want)]
        assert np.array_equal(*dead) and 0 < dead[0].mean() < 0.5
        assert not got[0][dead[0]].any() and not got[2][dead[0]].any()
        got[1], want[1] = (np.where(dead[0], 0, x[1]) for x in (got, want))
        return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True)]

    alike = {True: segments, False: segments._replace(gen_limit=None)}
    want = {limits: one_device(s) for limits, s in alike.items()}
    report, whole = {"errors": {}, "sent": {}}, kernels.WHOLE
    for name, case in CASES.items():
        kernels.WHOLE = 0 if case.blocked else whole
        got, text = spread(alike[case.limits], case)
        report["errors"][name], report["sent"][name] = errors(got, want[case.limits]), collectives(text)
    report["refusals"] = []
    for case in (Case("ulysses", 3), Case("both", 2)):
        try:
            spread(segments, case)
        except ValueError as e:
            report["refusals"].append(str(e))
    print(json.dumps(report))


def formulas() -> None:
    """Adds a backend to the fused ones: their contract in formulas, in the layout and with pads of no TPU kernel."""
    import sys
    import types
    from typing import NamedTuple

    import jax.numpy as jnp

    import pallas_kernels.attention as kernels
    from pallas_kernels.attention import fused, segments

    class Tiles(NamedTuple):
        pad: tuple = (5, 7)

    def scores(q, k, flat, scale):
        k = jnp.repeat(k, q.shape[1] // k.shape[1], 1)
        s = jnp.einsum("qhd,khd->hqk", q, k) * scale
        return jnp.where(segments.visible(flat), s, -jnp.inf)

    def forward(q, k, v, flat, lists, tiles, scale, interpret):
        s = scores(q, k, flat, scale)
        top = jnp.maximum(s.max(-1, keepdims=True), -1e30)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        v = jnp.repeat(v, q.shape[1] // v.shape[1], 1)
        o = jnp.einsum("hqk,khd->qhd", p / jnp.where(total > 0, total, 1), v)
        return o, (top + jnp.log(total))[..., 0]

    def backward(q, k, v, o, do, lse, delta, flat, lists, tiles, scale, interpret):
        group, keys = q.shape[1] // k.shape[1], k.shape
        p = jnp.exp(scores(q, k, flat, scale) - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
        k, v = (jnp.repeat(x, group, 1) for x in (k, v))
        ds = p * (jnp.einsum("qhd,khd->hqk", do, v) - delta[..., None]) * scale
        dk, dv = jnp.einsum("hqk,qhd->khd", ds, q), jnp.einsum("hqk,qhd->khd", p, do)
        dk, dv = (x.reshape(*keys[:2], group, -1).sum(2) for x in (dk, dv))
        return jnp.einsum("hqk,khd->qhd", ds, k), dk, dv

    module = types.ModuleType("pallas_kernels.attention.formulas")
    module.HEAD_DIM, module.HEADS_FIRST, module.forward, module.backward = 5, False, forward, backward
    module.tiles, module.plan = lambda *_: Tiles(), lambda flat, tiles: ()
    sys.modules[module.__name__] = module
    fused.BACKENDS["formulas"] = "formulas"
    kernels.BACKENDS += ("formulas",)


def collectives(text: str) -> dict[str, int]:
    """Kind → how many a compiled program has."""
    found = re.findall(r"\s(all-\w+(?:-\w+)?|reduce-scatter|collective-permute)(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in set(found)}


@pytest.fixture(scope="module")
def report():
    return json.loads(devices.run(__file__, 8).splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_spread_attention_equals_one_device(report, case):
    """o, lse, dq, dk and dv of gen, dk and dv of und (summed over devices); nothing at all for blind queries."""
    assert max(report["errors"][case]) <= TOLERANCE[CASES[case].dtype], report["errors"][case]


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_said_travels(report, case):
    """Beside it, one sum over devices: of the gradients of und."""
    assert set(report["sent"][case]) == SENT[CASES[case].how] | {"all-reduce"}, report["sent"][case]


def test_rematerialisation_does_not_send_keys_round_once_more(report):
    assert report["sent"]["ring, rematerialised"] == report["sent"]["ring, 4 × 2 devices, stripes"]


def test_what_cannot_be_is_refused(report):
    heads, how = report["refusals"]
    assert "3 devices of axis 'cp' cannot share 8 key heads" in heads and "all_gather or ring" in heads
    assert "'both' does not exist; choose one of all_gather, ring, ulysses" in how


if __name__ == "__main__":
    main()
