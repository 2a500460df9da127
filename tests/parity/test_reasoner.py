"""The reasoner (vision tower, deep-stack, text tower, lm_head) equals transformers' Qwen3-VL on the CPU."""

import functools
import inspect

import jax
import numpy as np
import pytest
import torch
from parity import oracle
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from conversion import reasoner
from conversion.check import check
from conversion.tree import from_torch
from cosmos_jax.config import ModelConfig, VisionConfig
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST
from data_pipelines.schema import Bucket, empty_batch

IMAGE = 600  # id of the visual pad
VISION = VisionConfig(layers=3, hidden=32, heads=2, mlp=64, patch=4, grid=6, deepstack=(0, 2))
CFG = ModelConfig(
    layers=3, hidden=48, heads=4, kv_heads=2, head_dim=16, mlp=80, rope_sections=(4, 2, 2), vocab=640,
    latent_channels=8, action_dim=0, sound_dim=0, vision=VISION,
)  # fmt: skip
GRID = np.array([[1, 4, 6], [1, 8, 4]])  # two images, in patches


@functools.lru_cache
def reference():
    config = Qwen3VLConfig(
        text_config=dict(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=80, vocab_size=640, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
        ),
        vision_config=dict(
            depth=3, hidden_size=32, num_heads=2, intermediate_size=64, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=48, num_position_embeddings=36, deepstack_visual_indexes=[0, 2],
        ),
        image_token_id=IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = qwen.Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = oracle.rng(name, 5).standard_normal(tuple(p.shape))
            if p.ndim == 1:
                x = 0.1 * x if name.endswith("bias") else 1.0 + 0.25 * x
            elif "embed" not in name or "patch" in name:
                x = x / np.sqrt(np.prod(p.shape[1:]))
            p.copy_(torch.from_numpy(x))
    return model


@functools.lru_cache
def params() -> dict:
    """Ours, by the project's own name map; the generator, which has no part in this, is random."""
    state = {k: v.detach().numpy() for k, v in reference().state_dict().items()}
    names, whole = reasoner.entries(CFG), cosmos.init(CFG, jax.random.key(0))
    check(names, {k: v.shape for k, v in state.items()}, reasoner.part(whole))
    found = from_torch(names, state)
    return whole | found | {"layers": whole["layers"] | found["layers"]}


def inputs():
    """Two images inside text: (ids, pixel patches, our batch)."""
    n = [int(np.prod(g)) // 4 for g in GRID]
    ids = np.concatenate([[5, 9, 33], np.full(n[0], IMAGE), [7, 21], np.full(n[1], IMAGE), [41, 3, 77, 15]])
    patches = oracle.rng("pixels").standard_normal((int(GRID.prod(1).sum()), 96)).astype(np.float32)
    kinds = torch.from_numpy((ids == IMAGE).astype(np.int64))[None]
    rope = reference().model.get_rope_index
    known = inspect.signature(rope).parameters
    kw = dict(input_ids=torch.from_numpy(ids)[None], image_grid_thw=torch.from_numpy(GRID))
    if "mm_token_type_ids" in known:
        kw["mm_token_type_ids"] = kinds
    positions, _ = rope(**kw)
    index, weight = get_vision_interpolation_indices_and_weights(
        torch.from_numpy(GRID),
        num_grid_per_side=6,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=2,
        kwargs={},
    )
    u = len(ids)
    b = empty_batch(Bucket(1, u + 2, 4, 4, 0, 0, 1, len(patches)), CFG.sequence)
    b["und_ids"][0, :u], b["und_segment_ids"][0, :u] = ids, 0
    b["und_positions"][0, :, :u] = positions[:, 0]
    b["und_vit_index"][0, :u][ids == IMAGE] = np.arange(sum(n))
    b["vit_patches"][0] = patches
    b["vit_segment_ids"][0] = np.repeat(np.arange(len(GRID)), GRID.prod(1))
    b["vit_rowcol"][0] = get_vision_position_ids(torch.from_numpy(GRID), 2, kwargs={}).reshape(-1, 2)
    b["vit_interp_index"][0], b["vit_interp_weight"][0] = index, weight
    return ids, patches, kinds, b


def test_logits_equal_transformers():
    ids, patches, kinds, b = inputs()
    with torch.no_grad():
        want = reference()(
            input_ids=torch.from_numpy(ids)[None], pixel_values=torch.from_numpy(patches),
            image_grid_thw=torch.from_numpy(GRID), mm_token_type_ids=kinds,
        ).logits[0].numpy()  # fmt: skip
    hidden = jax.jit(lambda p: cosmos.und(p, CFG, b, precision=HIGHEST).hidden)(params())
    ours = cosmos.logits(params(), CFG, hidden, precision=HIGHEST)[0, : len(ids)]
    rel, peak = oracle.relative(ours, want)
    assert rel <= 2.5e-6 and peak <= 3e-5, (rel, peak)


@pytest.mark.parametrize("bug", ["attention_across_frames", "row_and_column_swapped", "deepstack_dropped"])
def test_the_suite_can_fail(bug):
    _, _, _, b = inputs()
    tree = params()
    good = cosmos.und(tree, CFG, b, precision=HIGHEST).hidden
    if bug == "attention_across_frames":
        b["vit_segment_ids"][:] = 0
    elif bug == "row_and_column_swapped":
        b["vit_rowcol"] = b["vit_rowcol"][..., ::-1].copy()
    else:
        stack = tree["vit"]["deepstack"]
        fc2 = {k: 0 * v for k, v in stack["fc2"].items()}
        tree = tree | {"vit": tree["vit"] | {"deepstack": stack | {"fc2": fc2}}}
    bad = cosmos.und(tree, CFG, b, precision=HIGHEST).hidden
    assert oracle.relative(np.asarray(bad)[0, :-2], np.asarray(good)[0, :-2])[0] > 1e-4
