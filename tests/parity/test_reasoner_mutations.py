"""Plausible bugs of a reasoner, each past the threshold that the real code keeps (parity protocol §4.2).

A bug is put on our side: into the config, into the batch, into the weights, or in place of one of our functions.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from parity import reasoner_oracle as oracle

from cosmos_jax.model import rope, vision
from data_pipelines import patch_grid

OMNI, EDGE = "cosmos3_omni", "cosmos3_edge"
PROBE = 5e-6  # threshold of the eps probe


@functools.lru_cache
def setting(kind: str, case: str, probe: bool):
    """(prompt, what transformers says), after checking that our code agrees."""
    model, cfg, params = oracle.pair(kind, probe)
    p = oracle.prompt(case, cfg)
    want = oracle.want(model, p)
    found = oracle.errors(oracle.got(params, cfg, oracle.batch(p, cfg), p), want)
    assert max(rel for rel, _ in found.values()) <= (PROBE if probe else oracle.REL)
    return p, want


def mutant(kind, case, output, probe=False, cfg=None, batch=lambda b: b, params=lambda p: p, patch=None) -> float:
    """relL2 of one output of a mutant. patch: (module, name of one of its functions, what stands in for it)."""
    p, want = setting(kind, case, probe)
    _, good, tree = oracle.pair(kind, probe)
    with pytest.MonkeyPatch.context() as m:
        run = None
        if patch:
            m.setattr(*patch)
            run = jax.jit(lambda *x: oracle.compute(*x), static_argnums=(1, 3))  # nothing traced before will do
        ours = oracle.got(params(tree), cfg or good, batch(oracle.batch(p, good)), p, run)
    rel = oracle.errors(ours, want)[output][0]
    print(f"{rel:.1e}")  # pytest -s tells by how much
    return rel


def eye(kind, **changes):
    cfg = oracle.ours(kind)
    return dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, **changes))


@pytest.mark.parametrize("kind", [OMNI, EDGE])
def test_eps_of_the_vision_encoder(kind):
    assert mutant(kind, "images", "features", probe=True, cfg=eye(kind, norm_eps=1e-5)) > PROBE


@pytest.mark.parametrize("kind", [OMNI, EDGE])
def test_eps_of_the_text_tower(kind):
    cfg = oracle.ours(kind)
    for factor in (0.1, 10):
        wrong = dataclasses.replace(cfg, norm_eps=factor * cfg.norm_eps)
        assert mutant(kind, "images", "logits", probe=True, cfg=wrong) > PROBE


@pytest.mark.parametrize("kind", [OMNI, EDGE])
@pytest.mark.parametrize("where", ["_gelu_tanh", "_gelu_exact"])
def test_gelu_variant_in_the_mlp_and_in_the_merger(kind, where):
    other = {"_gelu_tanh": vision._gelu_exact, "_gelu_exact": vision._gelu_tanh}[where]
    assert mutant(kind, "images", "logits", patch=(vision, where, other)) > oracle.REL


def test_theta_of_the_vision_encoder():
    assert mutant(OMNI, "images", "features", cfg=eye(OMNI, rope_theta=5e3)) > oracle.REL


@pytest.mark.parametrize("kind", [OMNI, EDGE])
def test_chunked_instead_of_interleaved_positions(kind):
    def chunked(sections):
        return np.repeat(np.arange(3), sections)

    assert mutant(kind, "images", "logits", patch=(rope, "slot_axis", chunked)) > oracle.REL


def changed(**fields):
    return lambda b: b | {k: f(b).astype(b[k].dtype) for k, f in fields.items()}


@pytest.mark.parametrize("kind", [OMNI, EDGE])
def test_rows_and_columns_swapped(kind):
    swap = changed(und_positions=lambda b: b["und_positions"][:, [0, 2, 1]])
    assert mutant(kind, "images", "logits", batch=swap) > oracle.REL


def test_rows_and_columns_of_patches_swapped():
    swap = changed(vit_rowcol=lambda b: b["vit_rowcol"][..., ::-1])
    assert mutant(OMNI, "images", "features", batch=swap) > oracle.REL


def resized(kind, align_corners, antialias):
    """The table's weights for the images of the prompt as torch resizes, in our fields."""
    grid = oracle.ours(kind).vision.grid
    table = torch.eye(grid**2).reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    parts = []
    for _, *size in oracle.CASES["images"][0]:
        how = dict(mode="bilinear", align_corners=align_corners, antialias=antialias)
        x = torch.nn.functional.interpolate(table, size=size, **how)[0].permute(1, 2, 0)
        parts.append(patch_grid.merge_order(x.numpy()))
    return np.concatenate(parts)


def with_weights(dense):
    """Batch → the same with these weights over the whole table in both kinds' form."""

    def change(b):
        n, corners = len(dense), b["vit_interp_index"].shape[-1]
        if corners:  # the largest are all there is
            index = np.argsort(-dense, -1)[:, :corners]
            b["vit_interp_index"][0, :n], b["vit_interp_weight"][0, :n] = index, np.take_along_axis(dense, index, -1)
        else:
            b["vit_interp_weight"][0, :n] = dense
        return b

    return change


@pytest.mark.parametrize("kind", [OMNI, EDGE])
def test_corners_aligned_or_not(kind):
    right, wrong = {OMNI: (True, False), EDGE: (False, True)}[kind]
    assert mutant(kind, "images", "features", batch=with_weights(resized(kind, right, kind == EDGE))) <= oracle.REL
    assert mutant(kind, "images", "features", batch=with_weights(resized(kind, wrong, False))) > oracle.REL


def test_without_antialiasing():
    assert mutant(EDGE, "images", "features", batch=with_weights(resized(EDGE, False, False))) > oracle.REL


@pytest.mark.parametrize("kind", [OMNI, EDGE])
@pytest.mark.parametrize("case", ["images", "video"])
def test_attention_across_frames(kind, case):
    one = changed(vit_segment_ids=lambda b: np.minimum(b["vit_segment_ids"], 0))
    assert mutant(kind, case, "features", batch=one) > oracle.REL


@pytest.mark.parametrize("kind", [OMNI, EDGE])
def test_raster_instead_of_merge_order(kind):
    def in_raster(b):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(patch_grid, "merge_order", lambda x: x.reshape(-1, *x.shape[2:]))
            return oracle.batch(setting(kind, "images", False)[0], oracle.ours(kind))

    assert mutant(kind, "images", "features", batch=in_raster) > oracle.REL


def test_deepstack_dropped():
    def drop(tree):
        taps = tree["vit"]["deepstack"]
        last = {k: 0 * v for k, v in taps["fc2"].items()}
        return tree | {"vit": tree["vit"] | {"deepstack": taps | {"fc2": last}}}

    assert mutant(OMNI, "images", "logits", params=drop) > oracle.REL


def test_order_of_the_frames_in_a_patch():
    def flip(b):
        x = b["vit_patches"]
        cut = x.reshape(*x.shape[:2], 3, 2, -1)
        return cut[:, :, :, ::-1].reshape(x.shape)

    assert mutant(OMNI, "images", "features", batch=changed(vit_patches=flip)) > oracle.REL


def test_channels_first_in_a_patch():
    def turn(b):
        x = b["vit_patches"]
        return x.reshape(*x.shape[:2], -1, 3).swapaxes(2, 3).reshape(x.shape)

    assert mutant(EDGE, "images", "features", batch=changed(vit_patches=turn)) > oracle.REL


def test_no_norm_at_the_end_of_the_encoder():
    """Edge alone has one; the projector's own norm would hide a missing one but for its weight and bias."""

    def plain(tree):
        norm = tree["vit"]["norm"]
        one = {"weight": np.ones_like(norm["weight"]), "bias": np.zeros_like(norm["bias"])}
        return tree | {"vit": tree["vit"] | {"norm": one}}

    assert mutant(EDGE, "images", "features", params=plain) > oracle.REL
