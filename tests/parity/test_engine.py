"""The compiled programs of the denoising loop: the numbers of `sample_latents`, less memory, refusals."""

import dataclasses
import json
import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from parity import oracle
from parity.test_sampling import branches, noise_of, tiny

from cosmos_jax.flow import draw_noise
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST, Precision
from cosmos_jax.sampling import engine, generate, memory, schedules
from cosmos_jax.sampling.guidance import Guidance
from data_pipelines.schema import MODALITIES

DISTILLED = schedules.renoising(
    np.array([1.0, 0.9375, 0.83, 0.625, 0], np.float32), np.array([1000, 937.5, 830.0, 625])
)


def job(steps=4, guidance=6.0, seed=1, **changes):
    _, cfg, _ = tiny()
    _, (cond, uncond) = branches(cfg, seed=seed)
    whole = dict(batch=cond, noise=noise_of(cond), schedule=schedules.unipc(steps, 5.0), uncond=uncond)
    return generate.Job(**whole | dict(guidance=Guidance(guidance)) | changes)


def build(made, cfg=None, dtype=jnp.float32, precision=HIGHEST, **kw):
    cfg = cfg or tiny()[1]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), cosmos.abstract(cfg))
    return engine.build(params, cfg, made, precision=precision, **kw)


def load(name):
    return cosmos.part(tiny()[2], name)


def simply(made, **kw):
    _, cfg, params = tiny()
    return generate.sample_latents(
        params, cfg, made.batch, made.noise, made.schedule, made.guidance, precision=HIGHEST, uncond=made.uncond,
        controls=made.controls, key=made.key, fresh=made.fresh, **kw,
    )  # fmt: skip


def assert_equal(got, want):
    for name in MODALITIES:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_prefill_and_denoise_are_what_sample_latents_does():
    made = job()
    _, cfg, params = tiny()
    cache = generate.prefill(cosmos.part(params, "captions"), made.captions, cfg=cfg, precision=HIGHEST)
    static = generate.Static(cfg, HIGHEST, made.forms)
    got = generate.denoise_cached(load("generator"), cache, made.inputs, made.noise, made.rows, static=static)
    assert_equal(got, simply(made))


def test_the_compiled_programs_give_the_latents_of_sample_latents_to_the_bit():
    """Another number of steps, seed and scale run in the same programs; progress comes in order."""
    jobs, steps = [job(), job(steps=7, guidance=3.0, seed=2)], []
    made = build(jobs[0])
    compiled = generate.denoise_cached._cache_size(), generate.prefill._cache_size()
    results = list(made.run(load, jobs, steps.append))
    assert steps == [*range(4), *range(7)]
    assert compiled == (generate.denoise_cached._cache_size(), generate.prefill._cache_size())
    for one, got in zip(jobs, results, strict=True):
        assert_equal(got, simply(one))


def test_the_path_ends_in_the_result():
    one = job()
    want, path = simply(one, trajectory=True)
    ((got, ours),) = build(one, trajectory=True).run(load, [one])
    for name in MODALITIES:
        assert ours[name].shape == (4, *one.batch[f"{name}_x0"].shape) and isinstance(ours[name], np.ndarray)
        np.testing.assert_array_equal(ours[name], path[name])
        np.testing.assert_array_equal(ours[name][-1], got[name])
        assert oracle.relative(path[name][0], path[name][1])[0] > 1e-3
    assert_equal(got, want)
    assert_equal(want, simply(one))


def test_fresh_noise_comes_from_a_key_or_from_buffers():
    key = jax.random.key(3)
    one = job(schedule=DISTILLED, guidance=1.0, key=key)
    keys = [jax.random.fold_in(key, i) for i in range(4)]
    draw = jax.jit(draw_noise, static_argnames="name")
    drawn = {n: np.stack([draw(k, one.batch, name=n) for k in keys]) for n in MODALITIES}
    fed = dataclasses.replace(one, key=None, fresh=drawn)
    want = simply(one)
    for got in (simply(fed), *(next(build(made).run(load, [made])) for made in (one, fed))):
        for n in MODALITIES:  # drawing is fused into the step, or is not: the last bit
            assert oracle.relative(got[n], want[n])[0] <= 1e-6, n
    shifted = dataclasses.replace(fed, fresh={n: np.roll(x, 1, 0) for n, x in fed.fresh.items()})
    assert oracle.relative(simply(shifted)["vision"], want["vision"])[0] > 1e-2


def test_clean_actions_take_no_step():
    """Forward dynamics: every action row is a condition, and comes back to the bit, whatever its noise buffer holds."""
    one = job()
    for batch in (one.batch, one.uncond):
        batch["action_noisy"] = np.zeros_like(batch["action_noisy"])
    out = simply(one, trajectory=True)[1]
    width = one.batch["action_width"].max()
    for x in out["action"]:
        np.testing.assert_array_equal(x[..., :width], one.batch["action_x0"][..., :width])
    other = simply(dataclasses.replace(one, noise=one.noise | {"action": one.noise["action"] + 1}))
    np.testing.assert_array_equal(other["vision"], out["vision"][-1])


def test_the_weights_of_the_captions_leave_before_the_generators_come():
    alive = []

    def watched(name):
        if name == "generator":
            assert alive and not any(r() is not None for r in alive)
        params = jax.tree.map(jnp.copy, load(name))
        alive.extend(weakref.ref(x) for x in jax.tree.leaves(params))
        return params

    one = job()
    made = build(one)
    assert made.reads == "captions" and set(made.params["captions"]) == {"embed_tokens", "norm_und", "layers"}
    assert_equal(next(made.run(watched, [one])), simply(one))


def test_what_does_not_fit_is_refused_in_one_sentence(monkeypatch):
    made = build(job())
    need = made.memory["denoise"].total
    assert need > memory.held(made.params["generator"]) > 0
    assert "of unknown free memory" in str(_check(made, monkeypatch, None))
    line = _check(made, monkeypatch, 2**40)
    assert "prefill" in line and "1024.00 GiB free" in line and "\n" not in line
    with pytest.raises(ValueError, match="denoise needs .* more than the .* that are free: use bfloat16 weights") as e:
        _check(made, monkeypatch, need - 1)
    assert "\n" not in str(e.value) and "one tower's" not in str(e.value) and "fewer samples" not in str(e.value)
    _check(made, monkeypatch, need)
    with pytest.raises(ValueError, match="one tower's weights at a time"):
        _check(made, monkeypatch, need, release=False)
    with pytest.raises(ValueError, match="fewer samples at a time"):
        _check(made, monkeypatch, need, jobs=2)
    _check(made, monkeypatch, need + made.memory["prefill"].results, jobs=2)


def _check(made, monkeypatch, free, **kw):
    monkeypatch.setattr(engine, "free_memory", lambda: free)
    return made.check(**kw)


def test_free_memory_is_what_the_system_says():
    free = memory.free_memory()
    assert free is None or 2**20 < free < 2**50


def test_a_job_of_another_shape_or_branch_is_refused():
    made = build(job())
    wide = {k: np.concatenate([x, x]) for k, x in job().batch.items()}
    noise = {k: np.concatenate([x, x]) for k, x in job().noise.items()}
    with pytest.raises(ValueError, match=r"captions/0/und_ids of int32\[1, 32\], the job has int32\[2, 32\]"):
        made.prefill(tiny()[2], job(batch=wide, uncond=wide, noise=noise))
    with pytest.raises(ValueError, match="the job has"):
        made.prefill(tiny()[2], job(guidance=1.0))


def wide_model():
    """Weights that outweigh every activation."""
    return dataclasses.replace(
        tiny()[1], layers=6, hidden=256, mlp=1024, heads=4, kv_heads=2, head_dim=64, rope_sections=(16, 8, 8)
    )


def test_bfloat16_weights_are_never_widened_as_a_whole(monkeypatch):
    """A CPU computes in float32; left alone, XLA would keep a wide copy of all layers as working memory."""
    half = build(job(), wide_model(), jnp.bfloat16, Precision("bfloat16"))
    for name in ("prefill", "denoise"):
        assert half.memory[name].working < half.memory[name].weights / 2, half.memory[name]
    monkeypatch.setattr(engine, "NARROW", None)
    usual = build(job(), wide_model(), jnp.bfloat16, Precision("bfloat16"))
    assert usual.memory["denoise"].working > 2 * usual.memory["denoise"].weights


def test_in_bfloat16_the_cache_is_narrow_and_the_solver_is_not():
    one = job()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny()[2])
    made = build(one, None, jnp.bfloat16, Precision("bfloat16"))
    cache = made.prefill(half, one)
    assert {x.dtype for x in cache} == {jnp.dtype("bfloat16")}
    got = made.denoise(half, cache, one)
    want = simply(one)
    for name in MODALITIES:
        assert got[name].dtype == jnp.float32
        assert 1e-4 < oracle.relative(got[name], want[name])[0] < 0.1, name
    clean = ~one.batch["vision_noisy"]
    np.testing.assert_array_equal(np.asarray(got["vision"])[clean], one.batch["vision_x0"][clean])


SECOND_PROCESS = """
import json, sys
import jax, numpy as np, synthetic
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import engine, generate, programs, schedules
jax.jit(lambda x: x + 1)(1)  # something that was compiled before
kept = programs.keep(sys.argv[1])
batch = synthetic.batch(0)
job = generate.Job(batch, {n: batch[n + "_x0"] for n in ("vision", "action", "sound")}, schedules.euler(2, 1.0))
made = engine.build(cosmos.abstract(synthetic.MODEL), synthetic.MODEL, job, precision=HIGHEST)
print(json.dumps([kept.hits, kept.misses, str(kept)]))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    env = synthetic.environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "xla")]
    said = [
        json.loads(subprocess.run(command, env=env, cwd=synthetic.ROOT, check=True, capture_output=True).stdout)
        for _ in range(2)
    ]
    (hits, misses, _), (again, missed, line) = said
    assert hits == 0 and misses >= 3 and (again, missed) == (misses, 0)
    assert str(tmp_path / "xla") in line and f"{misses} came from there" in line and os.listdir(tmp_path / "xla")
