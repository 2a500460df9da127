"""Folders of reasoners that transformers wrote: read, checked, written again. Tied embeddings. Eyes alone."""

import jax
import numpy as np
import pytest
import transformers
from parity import reasoner_oracle as oracle
from published import tensors

from configs import edge, nano
from conversion import convert, folder, reasoner, safetensors, tree
from conversion.check import ConversionError, check
from cosmos_jax.config import from_dict
from cosmos_jax.model import cosmos

CLASSES = {
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
    "cosmos3_omni": transformers.Cosmos3OmniForConditionalGeneration,
    "cosmos3_edge": transformers.Cosmos3EdgeForConditionalGeneration,
}
TIED = dict(tie_word_embeddings=True)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("kind", "other"),
    [("qwen3_vl", {}), ("cosmos3_omni", {}), ("cosmos3_edge", {}), ("qwen3_vl", TIED)],
    ids=["qwen3_vl", "cosmos3_omni", "cosmos3_edge", "qwen3_vl_tied"],
)
def test_a_saved_reasoner_comes_in_and_goes_out(kind, other, tmp_path):
    """From `save_pretrained`, in several files; to a folder with the same bytes, which `from_pretrained` reads."""
    model = oracle.reference(kind, **other)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    found = folder.open_folder(tmp_path / "theirs")
    params = found.components["reasoner"].load()
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    same(params, tree.from_torch(reasoner.entries(oracle.ours(kind)), state))
    assert np.array_equal(params["lm_head"], params["embed_tokens"].T) == bool(other)

    convert.prepare(tmp_path / "theirs", tmp_path / "ours", "transformers")[2](lambda n: None)
    before, after = (safetensors.open_folder(tmp_path / p) for p in ("theirs", "ours"))
    assert after.shapes == before.shapes
    for name in before:
        assert after[name].tobytes() == before[name].tobytes(), name
    again = CLASSES[kind].from_pretrained(tmp_path / "ours").state_dict()
    assert set(again) == set(state)
    for name, x in state.items():
        np.testing.assert_array_equal(again[name].numpy(), x, err_msg=name)


def test_tied_embeddings_give_transformers_logits_and_refuse_to_part():
    model, cfg = oracle.reference("qwen3_vl", **TIED), oracle.QWEN
    state = {k: v.detach().numpy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    names, whole = reasoner.entries(cfg, tied=True), cosmos.init(cfg, jax.random.key(0))
    check(names, {k: v.shape for k, v in state.items()}, reasoner.part(whole))
    params = tree.from_torch(names, state)
    p = oracle.prompt("images", cfg)
    whole["layers"]["und"] = params.pop("layers")["und"]
    ours = oracle.got(whole | params, cfg, oracle.batch(p, cfg), p)
    assert max(rel for rel, _ in oracle.errors(ours, oracle.want(model, p)).values()) <= oracle.REL

    params |= {"layers": {"und": whole["layers"]["und"]}}
    back = tree.to_torch(names, params)
    assert set(back) == set(state) and all(back[k].tobytes() == v.tobytes() for k, v in state.items())
    params["lm_head"][0, 0] += 1
    with pytest.raises(
        ConversionError, match="'model.language_model.embed_tokens.weight' is one tensor in this layout"
    ):
        tree.to_torch(names, params)
    assert "lm_head.weight" in tree.to_torch(reasoner.entries(cfg), params)


@pytest.mark.parametrize("kind", ["cosmos3_omni", "cosmos3_edge"])
def test_a_vision_encoder_alone(kind):
    """The bare module of Qwen3-VL; for Edge, encoder and projector under their full names (spec training.md §3.4)."""
    model, cfg, params = oracle.pair(kind)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    if kind == "cosmos3_edge":
        alone = {k: v for k, v in state.items() if k.startswith(("model.visual.", "model.projector."))}
    else:
        alone = {k: v.detach().numpy() for k, v in model.model.visual.state_dict().items()}
    names = reasoner.vision_entries(cfg)
    check(names, {k: v.shape for k, v in alone.items()}, reasoner.vision_part(params))
    same(tree.from_torch(names, alone), reasoner.vision_part(params))


@pytest.mark.parametrize(("config", "bare"), [(nano, "model.visual."), (edge, "")], ids=["nano", "edge"])
def test_the_released_vision_encoders_are_mapped(config, bare):
    cfg = from_dict(config.get_config()).model
    eye = ("model.visual.", "model.projector.")
    found = {k.removeprefix(bare): v for k, v in tensors(f"reasoner_{cfg.name}").items() if k.startswith(eye)}
    assert len(found) == {"nano": 351, "edge": 443}[cfg.name]
    check(reasoner.vision_entries(cfg), found, reasoner.vision_part(cosmos.abstract(cfg)))


def test_a_model_without_eyes_has_no_reasoner_file():
    with pytest.raises(ValueError, match="has no vision encoder"):
        reasoner.entries(from_dict({"model": {}}).model)
    with pytest.raises(ValueError, match="has no vision encoder"):
        cosmos.see({}, from_dict({"model": {}}).model, {}, precision=None)
