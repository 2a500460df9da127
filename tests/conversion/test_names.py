"""Name maps: complete for the real models, exact in both directions, and loud when something does not fit."""

import importlib
import itertools

import jax
import numpy as np
import published
import pytest
from flax.traverse_util import flatten_dict
from parity import oracle
from parity import reasoner_oracle as reasoners

from conversion import framework, omni, reasoner
from conversion.check import ConversionError, check
from conversion.initialise import from_reasoner
from conversion.names import Entry, compact
from conversion.tree import from_torch, to_torch
from cosmos_jax.config import from_dict
from cosmos_jax.model import cosmos

LAYOUTS = {"transformer": omni, "reasoner": reasoner}


@pytest.mark.parametrize(
    ("layout", "name", "tensors"),
    [("transformer", "nano", 814), ("transformer", "super", 1430), ("transformer", "edge", 549),
     ("reasoner", "nano", 750), ("reasoner", "super", 1058), ("reasoner", "edge", 670)],
)  # fmt: skip
def test_every_tensor_of_the_released_models_is_mapped(layout, name, tensors):
    """Abstractly: no weight is allocated."""
    cfg = from_dict(importlib.import_module(f"configs.{name}").get_config()).model
    source = published.tensors(f"{layout}_{name}")
    assert len(source) == tensors
    assert check(LAYOUTS[layout].entries(cfg), source, LAYOUTS[layout].part(cosmos.abstract(cfg))) == {}


@pytest.mark.parametrize("which", ["omni", "edge", *reasoners.KINDS])
def test_there_and_back_is_byte_identical(which):
    """Every tensor of a random PyTorch model, in float32 and with half of them in bfloat16."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    if which in reasoners.KINDS:
        model, names = reasoners.reference(which), reasoner.entries(reasoners.ours(which))
    else:
        ref = {"omni": oracle.OMNI, "edge": oracle.EDGE}[which]
        model, names = oracle.reference(ref), omni.entries(oracle.model_config(ref))
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}
    for tensors in (state, half):
        back = to_torch(names, from_torch(names, tensors))
        assert set(back) == set(tensors)
        for k, v in tensors.items():
            assert back[k].dtype == v.dtype and back[k].shape == v.shape and back[k].tobytes() == v.tobytes(), k


SOURCE = {"a.weight": (4, 6), "b.weight": (6, 2)}
NAMES = [
    Entry("a.weight", ("a",), axes=(1, 0), part=0, parts=2),
    Entry("a.weight", ("c",), axes=(1, 0), part=1, parts=2),
    Entry("b.weight", ("b",), layer=0),
]
TIED = Entry("b.weight", ("d",), axes=(1, 0), tied=True)
TARGET = {"a": np.zeros((6, 2)), "c": np.zeros((6, 2)), "b": np.zeros((1, 6, 2))}


@pytest.mark.parametrize(
    ("names", "source", "target", "message"),
    [
        (NAMES, SOURCE | {"z": (1,)}, TARGET, "holds 'z', which no rule maps"),
        (NAMES, {"a.weight": (4, 6)}, TARGET, "lacks 'b.weight'"),
        (NAMES, SOURCE | {"a.weight": (4, 5)}, TARGET, r"'a.weight' of shape \[4, 5\] does not fit 'a'"),
        (NAMES[1:], SOURCE, TARGET, "uses part 0 of 'a.weight' 0 times"),
        ([*NAMES, NAMES[0]], SOURCE, TARGET, "uses part 0 of 'a.weight' 2 times"),
        ([*NAMES[:2], TIED], SOURCE, TARGET, "uses part 0 of 'b.weight' 0 times"),
        ([*NAMES, TIED, TIED], SOURCE, TARGET | {"d": np.zeros((2, 6))}, "ties 'b.weight' to more than one"),
        ([*NAMES, TIED], SOURCE, TARGET, "'b.weight' maps to 'd', but the model has no"),
        (NAMES, SOURCE, TARGET | {"d": np.zeros(3)}, "fills 'd' not exactly once"),
        (NAMES, SOURCE, TARGET | {"b": np.zeros((2, 6, 2))}, r"fills 'b' \(layer 1\) not exactly once"),
        (NAMES, SOURCE, {k: v for k, v in TARGET.items() if k != "c"}, "'a.weight' maps to 'c', but the model has no"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(names, source, target, message):
    with pytest.raises(ConversionError, match=message):
        check(names, source, target)


def test_dropped_tensors_are_listed_with_their_reason():
    assert check(NAMES, SOURCE | {"old.z": (1,)}, TARGET, {"old.*": "unused"}) == {"old.z": "unused"}


def test_the_frameworks_own_names():
    """Spelt out for one layer, as cosmos-framework's checkpoints have them; no two names coincide."""
    cfg = oracle.model_config(oracle.OMNI | {"num_hidden_layers": 1})
    names = [e.source for e in framework.entries(cfg)]
    attention = [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer = [f"{n}{s}" for n in (*attention, "input_layernorm", "post_attention_layernorm") for s in ("", "_moe_gen")]
    layer += [f"mlp{s}.{n}_proj" for n in ("gate", "up", "down") for s in ("", "_moe_gen")]
    model = [f"language_model.model.{n}.weight" for n in ("embed_tokens", "norm", "norm_moe_gen")]
    heads = ["vae2llm", "llm2vae", "time_embedder.mlp.0", "time_embedder.mlp.2", "sound2llm", "llm2sound"]
    want = [f"language_model.model.layers.0.{n}.weight" for n in layer] + model + ["language_model.lm_head.weight"]
    want += [f"{n}.{leaf}" for n in heads for leaf in ("weight", "bias")]
    want += [f"{n}.{leaf}.weight" for n in ("action2llm", "llm2action") for leaf in ("fc", "bias")]
    want += ["action_modality_embed", "sound_modality_embed"]
    assert sorted(names) == sorted(f"net.{n}" for n in want)
    edge = [e.source for e in framework.entries(oracle.model_config(oracle.EDGE), "net_ema.")]
    assert "net_ema.language_model.model.layers.0.self_attn.k_norm_und_for_gen.weight" in edge


@pytest.mark.parametrize("ref", ["OMNI", "EDGE"])
def test_both_towers_start_as_the_reasoner(ref):
    cfg = oracle.model_config(getattr(oracle, ref))
    rngs = map(np.random.RandomState, (0, 1))
    fresh, trained = (jax.tree.map(lambda x, r=r: r.normal(size=x.shape), cosmos.abstract(cfg)) for r in rngs)
    params, left = from_reasoner(fresh, reasoner.part(trained))
    und, gen = (flatten_dict(params["layers"][t]) for t in ("und", "gen"))
    for path, x in gen.items():
        source = und[path] if path in und else fresh["layers"]["gen"][path[0]][path[1]][path[2]]
        np.testing.assert_array_equal(x, source, err_msg=str(path))
    np.testing.assert_array_equal(params["embed_tokens"], trained["embed_tokens"])
    np.testing.assert_array_equal(params["norm_gen"]["weight"], trained["norm_und"]["weight"])
    norms = [f"layers/{n}/weight" for n in ("gen/attn/k_norm", "gen/attn/q_norm", "und/attn/k_norm_for_gen")]
    assert [p for p in left if not p.startswith("io/")] == (norms if ref == "EDGE" else [])
    with pytest.raises(ConversionError, match="lm_head .* does not fit the model"):
        from_reasoner(fresh, {"lm_head": trained["lm_head"][:, :3]})


def test_copies_in_memory_order_are_exact():
    """Every permutation of up to five axes, with gaps, with nothing, without axes; matrices larger than a strip."""
    rng = np.random.RandomState(0)
    views = [
        rng.rand(*rng.randint(1, 9, n)).transpose(p) for n in range(1, 6) for p in itertools.permutations(range(n))
    ]
    views += [x[::2] for x in views] + [np.ones(()), np.zeros((3, 0, 2)).T, rng.rand(4099, 37).T, rng.rand(37, 8199).T]
    for x in views:
        y = compact(x)
        assert y.flags.c_contiguous and y.shape == x.shape
        np.testing.assert_array_equal(y, x)
