"""`convert` of reasoners: alone, inside a whole model, grown into one; and of training runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from conversion_tiny import assert_same, placed, reasoner_folder, run
from diffusers import Cosmos3OmniTransformer
from flax.traverse_util import flatten_dict
from parity import reasoner_oracle

from conversion import (
    convert,
    export,
    folder,
    initialise,
    manifest,
    omni,
    reasoner,
    safetensors,
    source,
)
from conversion.check import ConversionError
from conversion.weights import Held
from cosmos_jax import checkpoint
from cosmos_jax import state as states
from cosmos_jax.config import Config, OptimConfig
from cosmos_jax.model import cosmos


@pytest.mark.parametrize(
    ("kind", "other"), [("qwen3_vl", {}), ("qwen3_vl", {"tie_word_embeddings": True}), ("cosmos3_omni", {}),
                        ("cosmos3_edge", {})],
)  # fmt: skip
@torch.no_grad()
def test_a_reasoner_comes_back_byte_for_byte_and_loads_in_transformers(kind, other, tmp_path):
    """Names as transformers' files have them; nothing missing, nothing unexpected; bit-equal logits."""
    tiny = reasoner_folder(tmp_path / "tiny", kind, **other)
    assert len(list(tiny.glob("*.safetensors"))) > 1
    run(tiny, tmp_path / "orbax")
    run(tmp_path / "orbax", tmp_path / "back", "transformers")
    assert_same(*(safetensors.open_folder(p) for p in (tmp_path / "back", tiny)))
    cls = type(reasoner_oracle.reference(kind, **other))
    got, info = cls.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    ids = torch.arange(29)[None] * 17 % 590
    assert torch.equal(got.eval()(input_ids=ids).logits, cls.from_pretrained(tiny).eval()(input_ids=ids).logits)
    if other:
        assert "lm_head.weight" not in safetensors.open_folder(tmp_path / "back")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cosmos3_omni", "cosmos3_edge"])
def test_the_reasoner_inside_a_whole_model_is_exported_alone(kind, tmp_path):
    """A diffusers folder with its vision encoder, written by us → transformers: reads no tensor of the generator."""
    source_cfg = reasoner_oracle.ours(kind)
    both = reasoner_oracle.pair(kind)[2]
    parts = {"transformer": omni.part(both), "vision_encoder": reasoner.vision_part(both)}
    whole = {name: (source_cfg, Held(tree)) for name, tree in parts.items()}
    plan = export.plan(source.Source(tmp_path, "run", whole), "diffusers")
    export.write(plan, tmp_path / "folder")
    found = folder.open_folder(tmp_path / "folder")
    assert set(found.components) == {"transformer", "vision_encoder"}
    assert found.components["transformer"].config.vision == source_cfg.vision
    assert (tmp_path / "folder" / "vision_encoder" / "config.json").exists() == (kind != "cosmos3_edge")
    run(tmp_path / "folder", tmp_path / "reasoner", "transformers")
    model = reasoner_oracle.reference(kind)
    for folder_of_it in ("reasoner", "folder"):  # the repository itself has an index at its top
        got, info = type(model).from_pretrained(tmp_path / folder_of_it, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "mismatched_keys", "error_msgs")), info
        assert not info["unexpected_keys"], info
        for (name, a), b in zip(got.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_a_repository_as_the_framework_exports_it_is_read_whole(tmp_path):
    """Edge: no config in vision_encoder/, the top one describes it, and the exporter's own fields in both configs."""
    cfg, tree = reasoner_oracle.EDGE, reasoner_oracle.pair("cosmos3_edge")[2]
    parts = {
        "transformer": (cfg, Held(omni.part(tree))),
        "vision_encoder": (cfg, Held({"vit": tree["vit"]})),
    }
    repository = tmp_path / "edge"
    export.write(export.plan(source.Source(tmp_path, "run", parts), "diffusers"), repository)
    change(repository / "transformer" / "config.json", backbone_type="cosmos3_edge_nemotron_dense",
           temporal_compression_factor=4, rope_scaling={"mrope_section": list(cfg.rope_sections)})  # fmt: skip
    projector = dict(
        model_type="cosmos3_edge_projector", input_hidden_size=32, merger_intermediate_size=72, out_hidden_size=48,
        spatial_merge_size=2, use_postshuffle_norm=False,
    )  # fmt: skip
    change(repository / "config.json", projector_config=projector, allow_patterns_overrides=["*/*.safetensors"])
    found = folder.open_folder(repository)
    assert set(found.components) == {"transformer", "vision_encoder"}
    assert found.components["vision_encoder"].config.vision == cfg.vision
    change(repository / "config.json", projector_config=projector | {"use_postshuffle_norm": True})
    with pytest.raises(ConversionError, match="use_postshuffle_norm = True is not supported"):
        folder.open_folder(repository)
    (repository / "config.json").unlink()
    with pytest.raises(ConversionError, match="vision_encoder has no config.json, and .* describes no vision encoder"):
        folder.open_folder(repository)


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_vision_encoder_that_transformers_saved_is_read(tmp_path):
    """Nano's and Super's folder is `Qwen3VLVisionModel.save_pretrained`."""
    model = reasoner_oracle.reference("qwen3_vl")
    model.model.visual.save_pretrained(tmp_path / "vision_encoder")
    cfg, tree = reasoner_oracle.pair("qwen3_vl")[1:]
    plan = export.plan(source.Source(tmp_path, "run", {"transformer": (cfg, Held(omni.part(tree)))}), "diffusers")
    export.write(plan, tmp_path)
    found = folder.open_folder(tmp_path).components["vision_encoder"]
    assert found.config.vision == cfg.vision
    jax.tree.map(np.testing.assert_array_equal, found.load()["vit"], tree["vit"])


@pytest.mark.parametrize("kind", ["qwen3_vl", "cosmos3_edge"])
def test_a_reasoner_grows_into_a_whole_model(kind, tmp_path):
    """Both towers start as the reasoner, the rest is fresh and float32 and listed; equal to doing it in memory."""
    tiny = reasoner_folder(tmp_path / "tiny", kind)
    cfg = dataclasses.replace(reasoner_oracle.ours(kind), action_dim=6, sound_dim=5)
    run(tiny, tmp_path / "orbax", model=cfg)
    got = convert.load(tmp_path / "orbax", {"model": jax.tree.map(placed, cosmos.abstract(cfg))})["model"]
    reasoner_only = folder.open_folder(tiny).components["reasoner"].load()
    want, left = initialise.from_reasoner(cosmos.init(cfg, jax.random.key(3)), reasoner_only)
    fresh = manifest.read(tmp_path / "orbax")["fresh"]
    assert sorted(fresh["paths"]) == left and fresh["seed"] == 0
    got, want = flatten_dict(got), flatten_dict(want)
    for path, x in want.items():
        if "/".join(path) not in left:
            np.testing.assert_array_equal(got[path], x, err_msg=str(path))
        else:
            a, b = np.asarray(got[path]), np.asarray(x)
            assert a.std() == pytest.approx(b.std(), rel=0.5, abs=1e-6) and a.mean() == pytest.approx(b.mean(), abs=0.1)
            assert a.size < 2 or not a.std() or not np.array_equal(a, b)
    run(tmp_path / "orbax", tmp_path / "diffusers", "diffusers")
    assert Cosmos3OmniTransformer.from_pretrained(tmp_path / "diffusers" / "transformer").config.sound_dim == 5
    with pytest.raises(
        ConversionError, match="the reasoner has rope_theta=.* but the model that --config describes has"
    ):
        convert.prepare(tiny, tmp_path / "x", model=dataclasses.replace(cfg, rope_theta=3.0))


def test_a_training_run_is_exported(tmp_path):
    """The average where there is one (and the frozen parameters themselves), or the last parameters when asked."""
    cfg = Config(
        model=dataclasses.replace(reasoner_oracle.QWEN, action_dim=6, sound_dim=5), optim=OptimConfig(frozen=("vit",))
    )
    state = states.init(cfg)
    state["ema"] = jax.tree.map(lambda x: x + 1, state["ema"])
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as c:
        c.save(7, state, {}, cfg)
    with pytest.raises(ConversionError, match="states its own architecture"):
        convert.prepare(tmp_path / "run", tmp_path / "out", "diffusers", model=cfg.model)
    for average, by in ((None, 1), (True, 1), (False, 0)):
        out = tmp_path / f"out {average}"
        lines, _, work = convert.prepare(tmp_path / "run", out, "diffusers", average=average)
        work(lambda n: None)
        assert lines[0].startswith("step 7, the averaged" if by else "step 7, the last")
        found = folder.open_folder(out)
        params = found.components["transformer"].load() | found.components["vision_encoder"].load()
        got, want = flatten_dict(params), flatten_dict(state["params"])
        assert set(got) == set(want)
        for path, x in want.items():
            np.testing.assert_array_equal(got[path], x + (by if path[0] != "vit" else 0), err_msg=str(path))


def test_tied_embeddings_that_came_to_differ_are_refused(tmp_path):
    run(reasoner_folder(tmp_path / "tiny", "qwen3_vl", tie_word_embeddings=True), tmp_path / "orbax")
    store = checkpoint.open_arrays(tmp_path / "orbax" / "weights", "model")["lm_head",]
    array = next((tmp_path / "orbax" / "weights" / "model" / "lm_head" / "c").rglob("0"))
    array = array if array.is_file() else next(p for p in array.rglob("*") if p.is_file())
    data = bytearray(array.read_bytes())
    data[2] ^= 0x40
    array.write_bytes(bytes(data))
    assert store.shape == (48, 640)
    with pytest.raises(ConversionError, match="'lm_head' and its twin have come to differ"):
        run(tmp_path / "orbax", tmp_path / "back", "transformers")
    assert not (tmp_path / "back").exists()
