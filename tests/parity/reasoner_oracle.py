"""The oracle of the reasoners: transformers' Qwen3-VL, Cosmos3Omni and Cosmos3Edge, tiny, as in `cosmos_jax.parity`.

Nobody here wrote the references. `ours` is written out by hand, so that the reader of config.json has something to be
compared with. Thresholds: parity protocol §4.3.
"""

from __future__ import annotations

import functools

import jax
import torch
import transformers

from conversion import reasoner
from conversion.check import check
from conversion.initialise import from_reasoner
from conversion.tree import from_torch
from cosmos_jax.config import ModelConfig, VisionConfig
from cosmos_jax.model import cosmos
from cosmos_jax.parity import tiny
from cosmos_jax.parity.prompts import CASES, Prompt, batch, prompt, rounded, torch_inputs
from cosmos_jax.parity.reasoner import compute, forward, run, shrink
from cosmos_jax.parity.reasoner import outputs as got
from cosmos_jax.parity.reference import cast
from cosmos_jax.parity.rows import relative
from cosmos_jax.parity.tiny import reasoner as reference
from cosmos_jax.parity.tiny import reasoner_config as theirs

__all__ = [
    "CASES", "EDGE", "KINDS", "PEAK", "QWEN", "REL", "batch", "compute", "errors", "forward", "got", "halves", "ours",
    "pair", "params", "prompt", "reference", "rounded", "shrink", "theirs", "torch_inputs", "want",
]  # fmt: skip

REL, PEAK = 2.5e-6, 3e-5
KINDS = tuple(tiny.KINDS)
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


def want(model: transformers.PreTrainedModel, p: Prompt) -> dict:
    """The reference's "logits" [L,vocab], "features" [tokens,D] and "tap 0" … of a prompt, as float32."""
    return run(model, p).outputs


def errors(ours: dict, reference: dict) -> dict[str, tuple[float, float]]:
    """(relL2, max/rms) of every output."""
    assert set(ours) == set(reference), (set(ours), set(reference))
    return {k: relative(ours[k], reference[k]) for k in reference}


def halves(kind: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """(a bfloat16 model, a float32 model with the same rounded weights); rotary frequencies float32 in both."""
    half, rounded = (cast(reference(kind), torch.bfloat16) for _ in range(2))
    return half, rounded.float()
