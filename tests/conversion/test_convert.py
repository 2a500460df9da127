"""`convert`: every layout to every other, byte for byte, in little memory, and never half a checkpoint."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from conversion_tiny import assert_same, diffusers_folder, placed, run
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer, Cosmos3OmniTransformer
from parity import oracle

from conversion import (
    convert,
    dcp,
    folder,
    manifest,
    pth,
    safetensors,
    source,
)
from conversion.check import ConversionError
from conversion.names import Entry
from conversion.weights import Foreign, place
from cosmos_jax import checkpoint
from cosmos_jax.__main__ import main
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos

COMPONENTS = ("transformer", "vae", "sound_tokenizer")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return diffusers_folder(tmp_path_factory.mktemp("tiny") / "checkpoint", mixed=True)


@pytest.fixture(scope="module")
def orbax(tiny):
    to = tiny.with_name("orbax")
    run(tiny, to)
    return to


def test_a_diffusers_folder_comes_back_byte_for_byte(tiny, orbax, tmp_path):
    """In many files, bfloat16 and float32 mixed, also within one stacked parameter; the other files travel along."""
    assert len(list((tiny / "transformer").glob("*.safetensors"))) > 3
    run(orbax, tmp_path / "back", "diffusers")
    dtypes = set()
    for name in COMPONENTS:
        before, after = (safetensors.open_folder(p / name) for p in (tiny, tmp_path / "back"))
        dtypes |= set(before.dtypes.values())
        assert_same(after, before)
    assert dtypes == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    for name in ("model_index.json", "scheduler/scheduler_config.json", "text_tokenizer/tokenizer.json"):
        assert (tiny / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


@torch.no_grad()
def test_the_exported_folder_loads_in_diffusers_and_gives_the_same_output(tmp_path):
    """No missing and no unexpected key; bit-equal velocity. Through every layout of the transformer in turn."""
    tiny = diffusers_folder(tmp_path / "tiny")
    cfg = folder.open_folder(tiny).components["transformer"].config
    run(tiny, tmp_path / "a")
    run(tmp_path / "a", tmp_path / "b", "dcp")
    run(tmp_path / "b", tmp_path / "c", "native", model=cfg)
    run(tmp_path / "c", tmp_path / "d", "diffusers", model=cfg)
    want, got = (Cosmos3OmniTransformer.from_pretrained(p / "transformer") for p in (tiny, tmp_path / "d"))
    _, info = Cosmos3OmniTransformer.from_pretrained(tmp_path / "d" / "transformer", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    kw = oracle.inputs(oracle.OMNI)
    a, b = got(**kw), want(**kw)
    for name in ("sample", "sound", "action"):
        assert torch.equal(a[name][0], b[name][0]) and b[name][0].any()
    run(tmp_path / "a", tmp_path / "e", "diffusers")
    for name, cls in (("vae", AutoencoderKLWan), ("sound_tokenizer", Cosmos3AVAEAudioTokenizer)):
        models = [cls.from_pretrained(p / name) for p in (tiny, tmp_path / "e")]
        for (k, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            assert torch.equal(a, b), k


def test_framework_checkpoints_come_back_byte_for_byte(tiny, orbax, tmp_path):
    """DCP and safetensors under cosmos-framework's names; the average is taken where there is one, and it is said."""
    cfg = folder.open_folder(tiny).components["transformer"].config
    for layout, opened in (("dcp", dcp.open_folder), ("native", safetensors.open_folder)):
        run(orbax, tmp_path / layout, layout)
        first = opened(tmp_path / layout)
        assert len(first) == 88 and all(k.startswith("net." if layout == "dcp" else "model.net.") for k in first)
        run(tmp_path / layout, tmp_path / f"{layout} in", model=cfg)
        run(tmp_path / f"{layout} in", tmp_path / f"{layout} back", layout)
        assert_same(opened(tmp_path / f"{layout} back"), first)
    tensors = {k: (x.dtype, x.shape) for k, x in dcp.open_folder(tmp_path / "dcp").tensors.items()}
    twice = tensors | {k.replace("net.", "net_ema.", 1): v for k, v in tensors.items()}
    values = {k: np.zeros(shape, dtype) if "ema" in k else np.ones(shape, dtype) for k, (dtype, shape) in twice.items()}
    dcp.write_folder(tmp_path / "both" / "model", twice, values.items())
    for average, value in ((None, 0), (True, 0), (False, 1)):
        found = folder.open_folder(tmp_path / "both", cfg, average).components["transformer"]
        assert found.load()["lm_head"].max() == value
        assert len(found.dropped) == 88 and "are taken" in next(iter(found.dropped.values()))


def test_the_original_sound_tokeniser_file_comes_back_byte_for_byte(tiny, orbax, tmp_path):
    """As the framework trained it: other names, alpha and beta without unit axes, wrapped, with its bottleneck."""
    run(orbax, tmp_path / "out", "native")
    plain = torch.load(tmp_path / "out" / "avae.pth", weights_only=True)
    assert plain["decoder.layers.1.layers.2.layers.0.alpha"].ndim == 1
    wrapped = {
        "generator": plain | {"bottleneck.scale": torch.ones(1)},
        "step": 7,
        "discriminator": {"w": torch.ones(2)},
    }
    torch.save(wrapped, tmp_path / "avae.ckpt")
    (tmp_path / "avae.json").write_text((tmp_path / "out" / "avae.json").read_text())
    run(tmp_path / "avae.ckpt", tmp_path / "in")
    dropped = manifest.read(tmp_path / "in")["source"]["dropped"]["sound_tokenizer"]
    assert dropped == {
        "generator.bottleneck.scale": "the bottleneck computes without parameters",
        "discriminator.w": "not of the generator",
    }
    run(tmp_path / "in", tmp_path / "diffusers", "diffusers")
    assert_same(*(safetensors.open_folder(p / "sound_tokenizer") for p in (tmp_path / "diffusers", tiny)))
    assert Cosmos3AVAEAudioTokenizer.from_pretrained(tmp_path / "diffusers" / "sound_tokenizer")
    run(tmp_path / "in", tmp_path / "again", "native")
    assert_same(*(pth.open_file(p / "avae.pth") for p in (tmp_path / "again", tmp_path / "out")))


def test_the_original_vae_file_comes_back_byte_for_byte(tiny, orbax, tmp_path, monkeypatch):
    """As Wan2.2_VAE.pth, which states no config: the tests' VAE stands for the published one."""
    run(orbax, tmp_path / "out", "native")
    cfg = folder.open_folder(tiny).components["vae"].config
    monkeypatch.setattr(folder.video, "WanConfig", lambda: cfg)
    first = tmp_path / "out" / "Wan2.2_VAE.pth"
    assert set(pth.open_file(first)) == set(torch.load(first, weights_only=True))
    run(first, tmp_path / "in")
    for asked in ({"average": True}, {"model": ModelConfig()}):
        with pytest.raises(ConversionError, match="leave --"):
            convert.prepare(first, tmp_path / "x", **asked)
    monkeypatch.undo()
    run(tmp_path / "in", tmp_path / "diffusers", "diffusers")
    assert_same(safetensors.open_folder(tmp_path / "diffusers" / "vae"), safetensors.open_folder(tiny / "vae"))
    assert AutoencoderKLWan.from_pretrained(tmp_path / "diffusers" / "vae")


def test_the_manifest_accounts_for_everything(tiny, orbax):
    table = manifest.read(orbax)
    assert table["source"]["layout"] == "diffusers"
    used = [p for p in tiny.rglob("*") if p.suffix in (".safetensors", ".json") and "index" not in p.suffixes[0]]
    stated = set(table["source"]["sha256"])
    assert stated == {str(p.relative_to(tiny)) for p in used if not p.name.endswith(".index.json")}
    one = "transformer/config.json"
    assert table["source"]["sha256"][one] == hashlib.sha256((tiny / one).read_bytes()).hexdigest()
    assert {k: c["item"] for k, c in table["components"].items()} == {
        "transformer": "model", "vae": "vae", "sound_tokenizer": "sound_tokenizer"
    }  # fmt: skip
    assert table["source"]["tensors"]["transformer"] == {"float32": 69, "bfloat16": 19} and table["fresh"] == {}
    assert table["components"]["transformer"]["narrowed"] == {"layers/und/attn/q[1]": "bfloat16"}
    assert "Karras sigmas 200 to 0.147" in table["scheduler"]["choice"]
    assert table["prompts"] == {"convention": "diffusers", "use_system_prompt": False, "stated": True}
    assert table["action_statistics"] is None and table["versions"]["jax"] == jax.__version__


def test_a_distilled_checkpoint_keeps_its_own_sigmas(tiny, tmp_path):
    """They are stated in modular_model_index.json, and nothing else fits them."""
    copy = tmp_path / "distilled"
    shutil.copytree(tiny / "vae", copy / "vae")
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "stochastic_sampling": True}
    (copy / "scheduler").mkdir()
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(euler))
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "Cosmos3OmniPipeline"}))
    (copy / "modular_model_index.json").write_text(json.dumps({"distilled_sigmas": [1.0, 0.9375, 0.8333, 0.625]}))
    found = folder.open_folder(copy)
    stated = manifest.scheduler(found)
    assert "4 steps, fixed sigmas" in stated["choice"] and "fresh noise" in stated["choice"]
    assert stated["index"] == {"distilled_sigmas": [1.0, 0.9375, 0.8333, 0.625]}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(euler | {"shiftt": 2}))
    with pytest.raises(ValueError, match="shiftt=2 is a field that this version does not know"):
        convert.prepare(copy, tmp_path / "out")


def test_only_what_a_job_needs_is_read(orbax, tmp_path):
    """The reasoner loads with every array of the generator gone; the generator then does not."""
    shutil.copytree(orbax, tmp_path / "copy")
    cfg = source.open_source(orbax).components["transformer"][0]
    whole = jax.tree.map(placed, cosmos.abstract(cfg))
    full = convert.load(orbax, {"model": whole})["model"]
    for array in (tmp_path / "copy" / "weights" / "model").iterdir():
        if array.name.startswith(("io.", "norm_gen", "layers.gen")):
            shutil.rmtree(array / "c")
    got = convert.load(tmp_path / "copy", {"model": cosmos.part(whole, "reasoner")})["model"]
    jax.tree.map(np.testing.assert_array_equal, got, cosmos.part(full, "reasoner"))
    with pytest.raises(Exception, match="Failed to load"):
        convert.load(tmp_path / "copy", {"model": cosmos.part(whole, "generator")})


def test_parameters_go_straight_from_files_to_devices(tiny):
    """Equal to the Orbax way; only the asked tensors are read; in the dtype that is asked for."""

    class Watched:
        def __init__(self, tensors):
            self.tensors, self.dtypes, self.read = tensors, tensors.dtypes, set()

        def __getitem__(self, name):
            self.read.add(name)
            return self.tensors[name]

    c = folder.open_folder(tiny).components["transformer"]
    watched = Watched(c.tensors)
    job = cosmos.part(cosmos.abstract(c.config), "reasoner")
    got = place(Foreign(c.entries, watched, c.target), jax.tree.map(placed, job))
    want = cosmos.part(c.load(), "reasoner")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), got, want)
    assert watched.read and not any("gen" in n or "add_" in n or "proj_in" in n for n in watched.read)
    with pytest.raises(ConversionError, match=r"embed_tokens has the shape \[640, 48\] .* but \[640, 3\] is asked"):
        place(c.weights(), {"embed_tokens": placed(np.zeros((640, 3)))})
    with pytest.raises(ConversionError, match="vit is absent"):
        place(c.weights(), {"vit": placed(np.zeros((640, 3)))})


def test_the_text_tower_can_be_released_after_the_prompt(tiny):
    """With cached keys and values the generator's parameters alone give the same velocities, bit for bit."""
    from parity.test_transformer import HIGHEST

    c = folder.open_folder(diffusers_folder(tiny.with_name("exact"))).components["transformer"]
    params, cfg = c.load(), c.config
    batch = oracle.batch(oracle.inputs(oracle.OMNI), cfg)
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    t = np.full((1, 2), 437, np.float32)
    cache = jax.jit(lambda p: cosmos.und(p, cfg, batch, precision=HIGHEST).cache)(cosmos.part(params, "reasoner"))
    run = jax.jit(lambda p, cache: cosmos.gen(p, cfg, batch, noised, t, cache, precision=HIGHEST))
    released = cosmos.part(params, "generator")
    assert sum(x.size for x in jax.tree.leaves(released)) < 0.6 * sum(x.size for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, run(released, cache), run(params, cache))


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tiny, tmp_path):
    """SIGKILL while arrays are being written; the same command then succeeds."""
    code = f"""
import time, sys
from conversion import convert, weights
read = weights.Foreign.read
def slow(self, path, layer=None):
    print("reading", flush=True)
    time.sleep(0.05)
    return read(self, path, layer)
weights.Foreign.read = slow
convert.prepare({str(tiny)!r}, {str(tmp_path / "out")!r})[2](lambda n: None)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.getcwd()) as process:
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "weights").exists()
    for path in (tmp_path / "out", tmp_path / "out.partial"):
        with pytest.raises(ConversionError, match="does not exist|is no checkpoint"):
            source.open_source(path)
    with pytest.raises(ConversionError, match="its writing was interrupted"):
        convert.load(tmp_path / "out.partial", {})
    run(tiny, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and manifest.read(tmp_path / "out")


def test_a_failing_conversion_removes_what_it_wrote(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Foreign, "read", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tiny, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.8 GB through at most 16 MB in flight, in a process of its own: what is added stays far below the model."""
    code = """
import json, pathlib, sys
from conversion import bench
from cosmos_jax import checkpoint
from cosmos_jax.config import ModelConfig
checkpoint.IN_FLIGHT = 16 << 20
cfg = ModelConfig(name="bench", layers=12, hidden=1024, heads=8, kv_heads=4, mlp=4096, vocab=4096)
print(json.dumps(bench.run(pathlib.Path(sys.argv[1]), cfg)))
"""
    env = os.environ | {"MALLOC_ARENA_MAX": "2"}  # what glibc hoards for each thread is not what is measured
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    results = json.loads(done.stdout.splitlines()[-1])
    size = results["model"]["bytes"]
    assert size > 0.75e9
    for name in ("PyTorch to Orbax", "Orbax to PyTorch"):
        assert results[name]["bytes"] < size / 3, (name, results)


def test_zeros_are_written(tmp_path):
    """Storage that leaves out what equals its fill value would make them look missing."""
    plan = {"model": {("a",): checkpoint.Planned((2, 3), np.dtype(np.float32), False)}}
    checkpoint.write_arrays(tmp_path / "w", plan, [("model", ("a",), None, np.zeros((2, 3), np.float32))])
    got = checkpoint.load_arrays(tmp_path / "w", {"model": {"a": placed(np.ones((2, 3)))}})["model"]["a"]
    assert got.shape == (2, 3) and not np.asarray(got).any()


def test_every_index_is_written_once(tmp_path):
    """An array that its slices do not cover is an error, not zeros."""
    plan = {"model": {("a",): checkpoint.Planned((2, 3), np.dtype(np.float32), True)}}
    with pytest.raises(ValueError, match="a of model was not written exactly once"):
        checkpoint.write_arrays(tmp_path / "w", plan, [("model", ("a",), 0, np.zeros(3, np.float32))])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from={tiny}"], "convert needs --to."),
        (["--to=x"], "convert needs --from."),
        (["--from={tiny}/none", "--to={new}"], "does not exist"),
        (["--from={tiny}", "--to={tiny}"], "exists already"),
        (["--from={tiny}", "--to={new}", "--layout=hf"], "invalid choice: 'hf'"),
        (["--from={tiny}", "--to={new}", "--layout=transformers"], "holds no reasoner"),
        (["--from={tiny}/text_tokenizer", "--to={new}"], "is no checkpoint that is known here"),
        (["--from={tiny}", "--to={new}", "--config=configs/toy.py"], "states its own architecture"),
        (["--from={tiny}", "--to={new}", "--params=ema"], "holds one set of parameters"),
        (["--from={orbax}", "--to={new}"], "is an Orbax checkpoint already"),
        (["--from={tiny}", "--to={new}", "--frm=x"], "convert has no option '--frm' (did you mean '--from'?)"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(words, message, tiny, orbax, tmp_path, capsys):
    assert main(["convert", *(w.format(tiny=tiny, orbax=orbax, new=tmp_path / "new") for w in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_component_that_is_named_but_absent_or_unknown_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny / "model_index.json", tmp_path / "bare")
    with pytest.raises(ConversionError, match="bare has a model_index.json, but none of transformer, vae"):
        folder.open_folder(tmp_path / "bare")
    shutil.rmtree(tmp_path / "copy" / "vae")
    with pytest.raises(ConversionError, match="model_index.json names vae, but vae/config.json is not there"):
        folder.open_folder(tmp_path / "copy")
    config = tmp_path / "copy" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ConversionError, match="transformer: the checkpoint holds 'layers.2"):
        folder.open_folder(tmp_path / "copy" / "transformer")


def test_layers_of_dtypes_that_none_holds_are_refused():
    class Tensors(dict):
        dtypes = {"a": np.dtype(ml_dtypes.float8_e4m3fn), "b": np.dtype(ml_dtypes.bfloat16)}

    names = [Entry("a", ("w",), layer=0), Entry("b", ("w",), layer=1)]
    with pytest.raises(ConversionError, match="the layers of w have the dtypes bfloat16, float8_e4m3fn"):
        Foreign(names, Tensors(), {"w": np.zeros((2, 3))})
