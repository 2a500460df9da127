"""The oracle of the reasoners: transformers' Qwen3-VL, Cosmos3Omni and Cosmos3Edge, their inputs in our batch.

Nobody here wrote the references. Every weight is random; a prompt is ids and flattened patches, so that nothing but the
networks is compared. Thresholds are those of the parity protocol (§4.3): relL2 ≤ 2.5e-6, max/rms ≤ 3e-5.
"""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import jax
import numpy as np
import torch
import transformers
from parity.oracle import relative, rng

from conversion import reasoner
from conversion.check import check
from conversion.initialise import from_reasoner
from conversion.tree import from_torch
from cosmos_jax.config import ModelConfig, VisionConfig
from cosmos_jax.model import cosmos
from cosmos_jax.precision import HIGHEST, Precision
from data_pipelines import patch_grid, positions
from data_pipelines.schema import Bucket, empty_batch

REL, PEAK = 2.5e-6, 3e-5
KINDS = ("qwen3_vl", "cosmos3_omni", "cosmos3_edge")
IMAGE, VIDEO, START, END = 600, 601, 602, 603
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
BUCKET = Bucket(1, 44, 4, 4, 0, 0, 1, 72)  # room for every case, and some padding

QWEN = ModelConfig(
    name="tiny", layers=3, hidden=48, heads=4, kv_heads=2, head_dim=16, mlp=80, rope_sections=(4, 2, 2), vocab=640,
    latent_channels=8, action_dim=0, sound_dim=0,
    vision=VisionConfig(layers=4, hidden=32, heads=2, mlp=52, patch=4, grid=6, deepstack=(0, 2, 3)),
)  # fmt: skip
EDGE = ModelConfig(
    name="tiny", layers=3, hidden=48, heads=4, kv_heads=2, head_dim=16, mlp=80, mlp_act="relu2", norm_eps=1e-5,
    norm_cast="after_weight", qk_norm_und=False, k_norm_und_for_gen=True, rope_theta=1e8, rope_sections=(4, 2, 2),
    vocab=640, latent_channels=8, action_dim=0, sound_dim=0,
    vision=VisionConfig(
        kind="siglip2", layers=3, hidden=32, heads=4, mlp=52, patch=4, temporal=1, grid=6, deepstack=(), merger=72,
    ),
)  # fmt: skip


def ours(kind: str) -> ModelConfig:
    """Our config of the tiny model of this kind."""
    return EDGE if kind == "cosmos3_edge" else QWEN


def theirs(kind: str, **other) -> transformers.PretrainedConfig:
    """transformers' config of the same model; `other`: settings of the outermost table."""
    cfg = ours(kind)
    eye = cfg.vision
    text = dict(
        vocab_size=cfg.vocab, hidden_size=cfg.hidden, intermediate_size=cfg.mlp, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim,
        rms_norm_eps=cfg.norm_eps, rope_parameters=dict(
            rope_type="default", rope_theta=cfg.rope_theta, mrope_section=list(cfg.rope_sections),
        ),
    )  # fmt: skip
    if kind == "cosmos3_edge":
        vision = dict(
            hidden_size=eye.hidden, intermediate_size=eye.mlp, num_hidden_layers=eye.layers,
            num_attention_heads=eye.heads, patch_size=eye.patch, num_patches=eye.grid**2,
        )  # fmt: skip
        config = transformers.Cosmos3EdgeConfig(
            text_config=text, vision_config=vision, projector_hidden_size=eye.merger, **IDS, **other
        )
    else:
        text["rope_parameters"]["mrope_interleaved"] = True
        vision = dict(
            depth=eye.layers, hidden_size=eye.hidden, num_heads=eye.heads, intermediate_size=eye.mlp,
            patch_size=eye.patch, temporal_patch_size=eye.temporal, out_hidden_size=cfg.hidden,
            num_position_embeddings=eye.grid**2, deepstack_visual_indexes=list(eye.deepstack),
        )  # fmt: skip
        cls = transformers.Qwen3VLConfig if kind == "qwen3_vl" else transformers.Cosmos3OmniConfig
        config = cls(text_config=text, vision_config=vision, **IDS, **other)
    config._attn_implementation = "eager"
    return config


def reference(kind: str, seed: int = 5, **other) -> transformers.PreTrainedModel:
    """The PyTorch model with every parameter drawn from a generator named after it."""
    cls = {
        "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
        "cosmos3_omni": transformers.Cosmos3OmniForConditionalGeneration,
        "cosmos3_edge": transformers.Cosmos3EdgeForConditionalGeneration,
    }[kind]
    model = cls(theirs(kind, **other)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = rng(name, seed).standard_normal(tuple(p.shape))
            if p.ndim == 1:
                x = 0.1 * x if name.endswith("bias") else 1.0 + 0.25 * x
            elif any(table in name for table in ("embed_tokens", "pos_embed", "position_embedding")):
                x = 0.7 * x
            else:
                x = x / np.sqrt(np.prod(p.shape[1:]))
            p.copy_(torch.from_numpy(x))
    return model


def shrink(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The eps probe: what is written into the two residual streams made small, so that the norms' eps decides."""
    small = (
        "embed_tokens",
        "pos_embed",
        "position_embedding",
        "patch_embed",
        "attn.",
        "linear_fc2",
        "fc2",
        "down_proj",
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(s in name for s in small) and "norm" not in name:
                p.mul_(3e-3 if "visual" in name and "merger" not in name else 1e-2)
    return model


def params(model: transformers.PreTrainedModel, cfg: ModelConfig) -> dict:
    """State dict → our tree, by the project's own name map; the generator, which has no part in this, is random."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    names, whole = reasoner.entries(cfg), cosmos.init(cfg, jax.random.key(0))
    check(names, {k: v.shape for k, v in state.items()}, reasoner.part(whole))
    return from_reasoner(whole, from_torch(names, state))[0]


@functools.lru_cache
def pair(kind: str, probe: bool = False) -> tuple:
    """(PyTorch model, our config, our parameters)."""
    model = shrink(reference(kind)) if probe else reference(kind)
    return model, ours(kind), params(model, ours(kind))


class Picture(NamedTuple):
    grid: tuple[int, int, int]  # frames (groups that share patches), rows, columns of patches
    patches: np.ndarray  # [frames·rows·cols, features] float32


class Prompt(NamedTuple):
    ids: np.ndarray  # [L]
    pictures: tuple[Picture, ...]  # images, then clips, in order of appearance


CASES = {  # images of several sizes (a side below the table's six, one above), clips, neither
    "images": (((1, 4, 10), (1, 8, 2)), ()),
    "video": ((), ((2, 4, 6),)),
    "image_and_video": (((1, 8, 2),), ((2, 4, 6),)),
    "text": ((), ()),
}


def prompt(case: str, cfg: ModelConfig) -> Prompt:
    """Words, then every picture between its marks (a clip: frame by frame, a time stamp before each), then words."""
    word = iter(rng(case).randint(0, IMAGE, 200).tolist())
    images, clips = CASES[case]
    ids = [next(word) for _ in range(6 if images or clips else 19)]
    for pad, grids in ((IMAGE, images), (VIDEO, clips)):
        for t, rows, cols in grids:
            for _ in range(t):
                ids += [next(word), next(word)] if pad == VIDEO else []
                ids += [START, *[pad] * (rows * cols // 4), END]
    ids += [next(word) for _ in range(7)]
    pictures = tuple(
        Picture(g, rng(f"{case}{i}").standard_normal((int(np.prod(g)), cfg.sequence.vit_patch_dim)).astype(np.float32))
        for i, g in enumerate((*images, *clips))
    )
    return Prompt(np.array(ids), pictures)


def torch_inputs(p: Prompt, dtype: torch.dtype = torch.float32) -> dict:
    """Keyword arguments of the reference's forward and generate."""
    ids = torch.from_numpy(p.ids)[None]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    kw = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds)
    clips = bool((ids == VIDEO).any())
    images = p.pictures[:-1] if clips else p.pictures
    for pixels, grid, found in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", p.pictures[-1:] if clips else ()),
    ):
        if found:
            kw[pixels] = torch.from_numpy(np.concatenate([x.patches for x in found])).to(dtype)
            kw[grid] = torch.tensor([x.grid for x in found])
    return kw


def batch(p: Prompt, cfg: ModelConfig, bucket: Bucket = BUCKET) -> dict[str, np.ndarray]:
    """The same prompt as one row of our batch, placed by the project's own code."""
    out = empty_batch(bucket, cfg.sequence)
    pads = np.isin(p.ids, (IMAGE, VIDEO))
    out["und_ids"][0, : len(p.ids)] = p.ids
    out["und_segment_ids"][0, : len(p.ids)] = 0
    out["und_positions"][0, :, : len(p.ids)] = positions.reasoner(runs(p))
    out["und_vit_index"][0, : len(p.ids)][pads] = np.arange(pads.sum())
    if p.pictures:
        fields = patch_grid.places([x.grid for x in p.pictures], cfg.sequence)
        n = len(fields.frame_ids)
        out["vit_patches"][0, :n] = np.concatenate([x.patches for x in p.pictures])
        out["vit_segment_ids"][0, :n], out["vit_rowcol"][0, :n] = fields.frame_ids, fields.rowcol
        out["vit_interp_index"][0, :n], out["vit_interp_weight"][0, :n] = fields.interp_index, fields.interp_weight
    return out


def runs(p: Prompt) -> list[int | tuple[int, int]]:
    """The prompt as runs of text and merged grids (`positions.reasoner`)."""
    frames = iter([(rows // 2, cols // 2) for t, rows, cols in (x.grid for x in p.pictures) for _ in range(t)])
    out, i = [], 0
    while i < len(p.ids):
        if p.ids[i] in (IMAGE, VIDEO):
            out.append(next(frames))
            i += out[-1][0] * out[-1][1]
        else:
            n = next((k for k, x in enumerate(p.ids[i:]) if x in (IMAGE, VIDEO)), len(p.ids) - i)
            out.append(n)
            i += n
    return out


def want(model: transformers.PreTrainedModel, p: Prompt, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """The reference's "logits" [L,vocab], "features" [tokens,D] and "tap 0" … of a prompt, as float32."""
    kw = torch_inputs(p, dtype)
    out: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        out["logits"] = [model(**kw).logits[0]]
        for see, pixels, grid in (
            (model.model.get_image_features, "pixel_values", "image_grid_thw"),
            (model.model.get_video_features, "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels in kw:
                seen = see(kw[pixels], kw[grid], return_dict=True)
                out.setdefault("features", []).extend(seen.pooler_output)
                for i, tap in enumerate(getattr(seen, "deepstack_features", None) or ()):
                    out.setdefault(f"tap {i}", []).extend([tap] if isinstance(tap, torch.Tensor) else tap)
    return {k: torch.cat(v).float().numpy() for k, v in out.items()}


def got(params: dict, cfg: ModelConfig, b: dict, p: Prompt, run=None, precision: Precision = HIGHEST) -> dict:
    """Ours, in the same form. run: `forward`, or a version of it that was compiled elsewhere."""
    logits, features, taps = (run or forward)(params, cfg, b, precision)
    n = sum(len(x.patches) for x in p.pictures) // 4
    out = {"logits": np.asarray(logits)[0, : len(p.ids)]}
    if n:
        out["features"] = np.asarray(features)[0, :n]
        out |= {f"tap {i}": np.asarray(x)[0, :n] for i, x in enumerate(() if taps is None else taps)}
    return out


def compute(params, cfg, b, precision):
    """(logits, features, taps) of a batch, not compiled."""
    features, taps = cosmos.see(params, cfg, b, precision=precision)
    hidden = cosmos.und(params, cfg, b, precision=precision).hidden
    return cosmos.logits(params, cfg, hidden, precision=precision), features, taps


forward = jax.jit(compute, static_argnums=(1, 3))


def errors(ours: dict, reference: dict) -> dict[str, tuple[float, float]]:
    """(relL2, max/rms) of every output."""
    assert set(ours) == set(reference), (set(ours), set(reference))
    return {k: relative(ours[k], reference[k]) for k in reference}


def halves(kind: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """(a bfloat16 model, a float32 model with the same rounded weights); rotary frequencies float32 in both."""
    whole = reference(kind)
    half = copy.deepcopy(whole).bfloat16()
    rounded = copy.deepcopy(half).float()
    for model in (half, rounded):
        for x, y in zip(model.buffers(), whole.buffers(), strict=True):
            x.data = y.data.clone()
    return half, rounded


def rounded(p: Prompt) -> Prompt:
    """The prompt with its patches rounded to bfloat16."""
    half = [torch.from_numpy(x.patches).bfloat16().float().numpy() for x in p.pictures]
    return Prompt(p.ids, tuple(Picture(x.grid, y) for x, y in zip(p.pictures, half, strict=True)))
