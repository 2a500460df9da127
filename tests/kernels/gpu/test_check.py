"""The check with the real compiler of Hopper: a kernel that spills is reported, and judged by its limit."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import targets
from pallas_kernels.check import dumps, judge, program, topology
from pallas_kernels.check.cases import Case

if why := topology.missing("h200:1"):
    pytest.skip(why, allow_module_level=True)
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")


def greedy(rows: int):
    """One warpgroup that holds rows × 128 numbers, `rows` for each of its 128 threads, all until the end."""

    def build(platform):
        def greedy_kernel(x, y):
            held = plgpu.load(x, (), layout=plgpu.Layout.WGMMA, optimized=False)
            y[...] = held * jax.lax.broadcast_in_dim(held.sum(1), held.shape, (0,))

        whole = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
        return plgpu.kernel(greedy_kernel, out_type=whole), (whole,)

    return build


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    for name, value in dumps.flags("gpu", tmp_path).items():
        monkeypatch.setenv(name, value)
    mesh = jax.sharding.Mesh(targets.topology("h200:1").devices[:1], ("device",))
    return lambda case: program.compiled(case, "h200:1", mesh, tmp_path)


def test_registers_and_spills_are_the_compilers(compiled):
    small, large = (Case("toy", greedy(n), {"gpu": {"greedy_kernel": 0}}) for n in (64, 512))
    outcome = compiled(small)
    assert judge.problems(small, outcome) == []
    (fits,) = outcome.kernels
    assert 64 < fits.registers < 255 and fits.spilled == 0
    outcome = compiled(large)
    (spills,) = outcome.kernels
    assert spills.registers == 255 and spills.spilled > 0
    assert "greedy_kernel spills" in judge.problems(large, outcome)[0]
    allowed = dataclasses.replace(large, spills={"gpu": {"greedy_kernel": spills.spilled}})
    assert judge.problems(allowed, outcome) == []
    unlike = dataclasses.replace(large, spills={"gpu": {"other": 10**6}})
    assert "there is no kernel other in the program" in judge.problems(unlike, outcome)


def test_what_the_compiler_refuses_is_an_outcome(compiled):
    def build(platform):
        raise ValueError("tiles do not fit")

    outcome = compiled(Case("toy", build, {"gpu": {}}))
    assert outcome.error == "ValueError: tiles do not fit" and outcome.kernels == ()
