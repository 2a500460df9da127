"""The gradient of the training loss equals torch autograd's, parameter by parameter: relL2 ≤ 1e-5, zeros exactly zero.

The generator (diffusers, both families): flow matching and cross entropy, one sample alone and two packed in one row.
The reasoner (transformers, both eyes): cross entropy over prompts with images and with a clip, packed in one row.
"""

import copy
import functools

import jax
import numpy as np
import pytest
import torch
from parity import reasoner_oracle

from conversion import reasoner
from cosmos_jax.config import Config
from cosmos_jax.model import block, declare, stack
from cosmos_jax.parity import gradients, packs, reference, rows, tiny, transformer
from data_pipelines.schema import Bucket

MARGIN = 100  # a mutant exceeds the threshold at least so many times
QUICK = {"xla_backend_optimization_level": 0}  # a program that runs once need not be a fast one
quick = jax.jit(gradients.gradient, static_argnums=1, compiler_options=QUICK)
UND = ("attn/q", "attn/q_norm/weight", "attn/o", "norm_post/weight", "mlp/gate", "mlp/up", "mlp/down")
ENDS = {"lm_head", "norm_und/weight"}
DEAD = {  # in generation: what nobody but the text's own output needs (Edge has neither text norms nor a gate)
    "nano": ENDS | {f"layers/und/{n}[2]" for n in UND},
    "edge": ENDS | {f"layers/und/{n}[2]" for n in UND if n not in ("attn/q_norm/weight", "mlp/gate")},
}


@functools.cache
def world(family):
    """What torch says, our parameters, our config."""
    config = tiny.NANO if family == "nano" else tiny.EDGE
    model = tiny.transformer(config)
    cfg = transformer.model_config(dict(model.config))
    golden = gradients.golden(lambda dtype: reference.cast(tiny.transformer(config), dtype))
    return golden, transformer.params(model, cfg), cfg


def judge(found, tree, dead):
    """Everything passes; every parameter of the tree is compared, but for those whose every layer is dead."""
    assert not rows.failures(found), rows.failures(found)
    *live, still = found
    errors = [r.rel for r in live]
    print(f"{live[0].part}: worst of {len(live)}: {live[0].rel:.1e} (floor {live[0].floor:.1e}), {live[0].what}")
    assert errors == sorted(errors, reverse=True) and all(r.floor or "rounding" in r.note for r in live)
    assert set(still.note.rsplit("; ", 1)[0].split(", ")) - {still.note} == dead
    whole = {d for d in dead if "[" not in d}
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    assert {r.what.split("[")[0] for r in live} | whole >= paths


@pytest.mark.parametrize("family", ["nano", "edge"])
def test_gradients_of_the_generator_equal_torchs(family):
    golden, params, cfg = world(family)
    found = gradients.check(golden, params, cfg)
    for part, dead in ((gradients.ALONE, DEAD[family]), (gradients.PACKED, set())):
        judge([r for r in found if r.part == part], params, dead)


# ---------------------------------------------------------------------------------------- the reasoner


def supervised(p):
    """Places of a prompt that predict the next word: inside pictures too, or the last deep-stack tap would be idle."""
    return np.arange(3, len(p.ids) - 1)


def reasoner_batch(cfg, prompts):
    """The prompts in one row, with room for padding of every kind."""
    ones = []
    for p in prompts:
        patches = sum(len(x.patches) for x in p.pictures)
        one = reasoner_oracle.batch(p, cfg, packs.tight(len(p.ids), vit=patches))
        one["und_targets"][0, supervised(p)] = p.ids[supervised(p) + 1]
        ones.append(one)
    return packs.pack(ones, Bucket(1, 80, 4, 4, 0, 0, 3, 136), cfg.sequence)


@functools.cache
def reasoner_world(kind):
    """The row, torch's gradients in float32 and float64, our parameters, our config."""
    whole, cfg, params = reasoner_oracle.pair(kind)
    prompts = [reasoner_oracle.prompt(case, cfg) for case in ("images", "video")]
    count = sum(len(supervised(p)) for p in prompts)

    def torchs(dtype):
        model = copy.deepcopy(whole).to(dtype)

        def loss():
            total = 0.0
            for p in prompts:
                logits = model(**reasoner_oracle.torch_inputs(p, dtype)).logits[0, supervised(p)]
                ids = torch.from_numpy(p.ids[supervised(p) + 1])
                total = total + torch.nn.functional.cross_entropy(logits, ids, reduction="sum") / count
            return total

        return gradients.of(model, loss)

    return reasoner_batch(cfg, prompts), torchs(torch.float32), torchs(torch.float64), params, cfg


def reasoner_rows(kind, call=quick):
    batch, want, want64, params, cfg = reasoner_world(kind)
    got = call(params, Config(model=cfg), batch)
    place = ("reasoner", "two prompts in one row")
    return gradients.compare(place, got, reasoner.entries(cfg), want, want64, rows.GRADIENT)


@pytest.mark.parametrize("kind", ["qwen3_vl", "cosmos3_edge"])
def test_gradients_of_the_reasoner_equal_transformers(kind):
    _, _, _, params, cfg = reasoner_world(kind)
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    generator = {p for p in paths if p.startswith(("io", "norm_gen", "layers/gen")) or "k_norm_for_gen" in p}
    found = reasoner_rows(kind)
    judge(found, params, generator)
    # keys that are not rotated: their bias adds the same to every score of a query, so its gradient is 0 on paper
    rounding = [r for r in found if "rounding" in r.note]
    assert [r.what.split("[")[0] for r in rounding] == ["vit/layers/k/bias"] * (kind == "cosmos3_edge")


# ---------------------------------------------------------------------------------------- the suite can fail


def fields(**changes):
    """A batch with these fields, each a function of the batch, changed."""
    return lambda b: b | {k: np.asarray(f(b), b[k].dtype) for k, f in changes.items()}


def shown(found):
    """parameter → relL2, of what exceeds the threshold by the margin."""
    return {r.what.split("[")[0]: r.rel for r in found if r.rel > MARGIN * rows.GRADIENT}


BATCH = {  # mistake → (how it is made, parameters whose gradient must show it); nothing is compiled again
    "weight of the sound loss doubled": (fields(sound_weight=lambda b: 2 * b["sound_weight"]), ["io/sound_out/kernel"]),
    "mean over noisy elements alone": (
        fields(vision_weight=lambda b: np.where(b["vision_segment_ids"] == 0, 1.5, 1) * b["vision_weight"]),
        ["io/vision_out/kernel"],
    ),
    "items of the first sample alone counted": (
        fields(segment_items=lambda b: b["segment_items"] * (np.arange(3) == 0)[:, None]),
        ["io/vision_out/bias", "io/action_out/bias"],
    ),
    "targets one place late": (fields(und_targets=lambda b: np.roll(b["und_targets"], 1, 1)), ["lm_head"]),
    "text of two samples in one segment": (
        fields(und_segment_ids=lambda b: np.minimum(b["und_segment_ids"], 0)), ["layers/und/attn/v", "embed_tokens"],
    ),
    "unused action channels in the loss": (
        fields(action_width=lambda b: np.where(b["action_index"] >= 0, b["action_x0"].shape[-1], 0)),
        ["io/action_out/kernel", "io/action_out/bias"],
    ),
    "one embodiment for both": (
        fields(action_domain=lambda b: np.full_like(b["action_domain"], 9)),
        ["io/action_in/bias", "io/action_in/kernel"],
    ),
    "sigma of the other sample": (
        fields(segment_sample_id=lambda b: b["segment_sample_id"][:, [1, 0, 2]]), ["io/time/linear_1/kernel"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BATCH)
def test_a_mistake_in_the_batch_shows(mistake):
    golden, params, cfg = world("nano")
    change, where = BATCH[mistake]
    found = shown(r for r in gradients.check(golden, params, cfg, change) if r.part == gradients.PACKED)
    assert not set(where) - set(found), found


def detached(owner, name):
    """One of our functions whose result is a constant for the gradient: (owner, name, what stands in for it)."""
    true = getattr(owner, name)
    return owner, name, lambda *a, **kw: jax.lax.stop_gradient(true(*a, **kw))


def without_bias(self, x, precision, out=None):
    y = DENSE(self, x, precision, out)
    return y if self.bias is None else y - self.bias[...] + jax.lax.stop_gradient(self.bias[...])


DENSE = declare.Dense.__call__
CODE = {
    "keys and values of the text detached": (detached(block, "KV"), ["layers/und/attn/v", "embed_tokens"]),
    "biases without gradient": ((declare.Dense, "__call__", without_bias), ["io/vision_in/bias", "io/sound_out/bias"]),
}


def mutant(patch, check):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(*patch)
        # nothing traced before will do
        return check(jax.jit(lambda *a: gradients.gradient(*a), static_argnums=1, compiler_options=QUICK))


@pytest.mark.parametrize("mistake", CODE)
def test_a_mistake_in_the_code_shows(mistake):
    golden, params, cfg = world("nano")
    patch, where = CODE[mistake]
    only = gradients.Golden({k: v for k, v in golden.samples.items() if k == gradients.PACKED}, golden.want)
    found = mutant(patch, lambda call: gradients.check(only, params, cfg, call=call))
    assert not set(where) - set(shown(found)), shown(found)


def test_a_detached_deepstack_shows():
    found = shown(mutant(detached(stack, "_tap"), lambda call: reasoner_rows("qwen3_vl", call=call)))
    assert {"vit/deepstack/fc2/kernel", "vit/patch_in/kernel", "vit/positions"} <= set(found)
