"""The Hopper kernels compile for an H200 that is not here, keep their registers and fit its shared memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("Mosaic GPU kernels need jax ≥ 0.11 (Python ≥ 3.12)", allow_module_level=True)
pytest.importorskip("jax_cuda13_plugin", reason="compiling for a GPU needs jax-cuda13-plugin and jax-cuda13-pjrt")

from pallas_kernels import attention, targets
from pallas_kernels.attention import Segments
from pallas_kernels.attention.gpu import Tiles

SPILLS = 32  # bytes of a kernel


@pytest.fixture(scope="module")
def h200():
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # of an absent chip it cannot be read
    with jax.set_mesh(jax.sharding.Mesh(np.array(targets.topology("h200:1").devices), ("gpu",))):
        yield
    jax.config.update("jax_enable_compilation_cache", kept)


def gradients(q, k, v, segments, tiles=None):
    plan = attention.gen_plan(segments, tiles=tiles)
    assert plan.backend == "mosaic_gpu"  # what `auto` takes there

    def loss(q, k, v):
        o, lse = attention.attention(q, k, v, plan, scale=128**-0.5, return_lse=True)
        return o.astype(jnp.float32).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


def compiled(und, gen, heads, kv_heads, **how):
    def random(tokens, heads):
        return jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16)

    keys = random(und, kv_heads), random(gen, kv_heads)
    ids = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (und, gen))
    run = jax.jit(lambda *x: gradients(*x, **how))
    return run.lower(random(gen, heads), keys, keys, Segments(*ids)).compile()


def test_all_kernels_keep_their_registers_and_fit_shared_memory(h200, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled(300, 44_160, 32, 8)
    said = {re.sub(r"_\d+\.ptxas", "", path.name): path.read_text() for path in tmp_path.glob("*.ptxas")}
    assert sorted(said) == ["attention_dkv", "attention_dq", "attention_forward"]
    for name, text in said.items():
        stored, loaded = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())
        assert stored <= SPILLS and loaded <= SPILLS, f"{name}: {text}"
        assert "sm_90a" in text and int(re.search(r"Used (\d+) registers", text).group(1)) <= 168, text
    for path in tmp_path.glob("*.resources.txt"):
        used = int(re.search(r"smem_scratch_bytes=(\d+)", path.read_text()).group(1))
        assert 128 * 1024 < used <= targets.SHARED_MEMORY, path.name


def test_tiles_beyond_shared_memory_are_refused(h200):
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        compiled(128, 256, 2, 1, tiles=Tiles(stages=3))
