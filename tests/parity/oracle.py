"""The oracle: diffusers' `Cosmos3OmniTransformer` on the CPU, its weights in our tree, its inputs in our batch.

Nobody here wrote the reference. Every weight is random (stock initialisation leaves norms at 1 and embeddings at 0 and
hides bugs); thresholds are those of the parity protocol (3 layers: relL2 ≤ 2e-6, max/rms ≤ 2e-5).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from diffusers import Cosmos3OmniTransformer
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens

from conversion import omni
from conversion.check import check
from conversion.tree import from_torch
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos
from data_pipelines.packing import patchify
from data_pipelines.schema import Bucket, empty_batch

OMNI = dict(
    head_dim=16, hidden_size=48, intermediate_size=80, latent_channel=8, latent_patch_size=2, num_attention_heads=4,
    num_hidden_layers=3, num_key_value_heads=2, patch_latent_dim=32, rms_norm_eps=1e-6, rope_theta=5_000_000.0,
    rope_axes_dim=[4, 2, 2], vocab_size=640, action_dim=12, action_gen=True, num_embodiment_domains=32, sound_dim=6,
    sound_gen=True, sound_latent_fps=25.0,
)  # fmt: skip
EDGE = dict(
    OMNI, hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True, rms_norm_eps=1e-5, rope_theta=1e8,
    sound_gen=False, sound_dim=None,
)  # fmt: skip


def model_config(ref: dict) -> ModelConfig:
    edge = ref.get("hidden_act") == "relu2"
    return ModelConfig(
        name="tiny", layers=ref["num_hidden_layers"], hidden=ref["hidden_size"], heads=ref["num_attention_heads"],
        kv_heads=ref["num_key_value_heads"], head_dim=ref["head_dim"], mlp=ref["intermediate_size"],
        mlp_act="relu2" if edge else "swiglu", norm_eps=ref["rms_norm_eps"],
        norm_cast="after_weight" if edge else "before_weight", qk_norm_und=not edge, k_norm_und_for_gen=edge,
        rope_theta=ref["rope_theta"], rope_sections=tuple(ref["rope_axes_dim"]), vocab=ref["vocab_size"],
        latent_channels=ref["latent_channel"], patch=ref["latent_patch_size"], action_dim=ref["action_dim"],
        domains=ref["num_embodiment_domains"], sound_dim=ref["sound_dim"] or 0,
    )  # fmt: skip


def rng(name: str, seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) & 0xFFFFFFFF)


def reference(ref: dict, seed: int = 3) -> Cosmos3OmniTransformer:
    """The PyTorch model with every parameter drawn from a generator named after it."""
    model = Cosmos3OmniTransformer(**ref).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = rng(name, seed).standard_normal(tuple(p.shape))
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "weight" and p.ndim == 1:
                x = 1.0 + 0.25 * x
            elif leaf == "bias" or name.endswith("bias.weight"):
                x = 0.1 * x
            elif "modality_embed" in name:
                x = 0.5 * x
            elif "embed_tokens" in name:
                x = 0.7 * x
            elif "fc.weight" in name:
                x = x / math.sqrt(ref["action_dim"] if "proj_in" in name else ref["hidden_size"])
            else:
                x = x / math.sqrt(p.shape[-1])
            p.copy_(torch.from_numpy(x))
    return model


def params(model: Cosmos3OmniTransformer, cfg: ModelConfig) -> dict:
    """State dict → our tree, by the project's own name map."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    check(omni.entries(cfg), {k: v.shape for k, v in state.items()}, omni.part(cosmos.abstract(cfg)))
    return from_torch(omni.entries(cfg), state)


def inputs(
    ref, und_len=29, T=3, H=5, W=6, cond=(0,), sound=7, action=4, action_cond=(), fps=10.0, t=437, domain=9, seed=1
):
    """Keyword arguments of the reference's forward: one sample of text, vision, sound and action."""
    p = ref["latent_patch_size"]
    ph, pw = math.ceil(H / p), math.ceil(W / p)
    text, nxt = get_3d_mrope_ids_text_tokens(und_len, 0, use_float_positions=True)
    off, pos, at = nxt + 15000, [text], und_len
    ids, _ = get_3d_mrope_ids_vae_tokens(T, ph, pw, off, True, fps, 24.0, 4)
    pos.append(ids.float())
    noisy = [f for f in range(T) if f not in cond]

    def draw(name, *shape):
        return torch.from_numpy(rng(name, seed).standard_normal(shape).astype(np.float32))

    kw = dict(
        input_ids=torch.arange(und_len) * 37 % 430, text_indexes=torch.arange(und_len), und_len=und_len,
        vision_tokens=[draw("vision", 1, ref["latent_channel"], T, H, W)], vision_token_shapes=[(T, ph, pw)],
        vision_sequence_indexes=torch.arange(at, at + T * ph * pw),
        vision_mse_loss_indexes=(at + torch.arange(T * ph * pw).view(T, -1)[noisy].flatten()).long(),
        vision_timesteps=torch.full((len(noisy) * ph * pw,), t),
        vision_noisy_frame_indexes=[torch.tensor(noisy, dtype=torch.long)],
    )  # fmt: skip
    at += T * ph * pw
    if sound and ref["sound_gen"]:
        ids, _ = get_3d_mrope_ids_vae_tokens(sound, 1, 1, off, True, 25.0, 24.0, 1)
        pos.append(ids.float())
        index = torch.arange(at, at + sound)
        kw |= dict(
            sound_tokens=[draw("sound", ref["sound_dim"], sound)], sound_token_shapes=[(sound, 1, 1)],
            sound_sequence_indexes=index, sound_mse_loss_indexes=index.clone(),
            sound_timesteps=torch.full((sound,), t), sound_noisy_frame_indexes=[torch.arange(sound)],
        )  # fmt: skip
        at += sound
    if action:
        ids, _ = get_3d_mrope_ids_vae_tokens(
            action, 1, 1, off, True, fps, 24.0, 1, base_temporal_compression_factor=4, start_frame_offset=1
        )
        pos.append(ids.float())
        index = torch.arange(at, at + action)
        rows = torch.tensor([i for i in range(action) if i not in action_cond], dtype=torch.long)
        kw |= dict(
            action_tokens=[draw("action", action, ref["action_dim"])], action_token_shapes=[(action, 1, 1)],
            action_sequence_indexes=index, action_mse_loss_indexes=index[rows],
            action_timesteps=torch.full((len(rows),), t), action_noisy_frame_indexes=[rows],
            action_domain_ids=[torch.tensor([domain])],
        )  # fmt: skip
        at += action
    return kw | dict(position_ids=torch.cat(pos, 1), sequence_length=at)


def batch(kw: dict, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The same sample as one row of our batch, built from the reference's own indexes and positions."""
    u, n = kw["und_len"], kw["sequence_length"]
    x = kw["vision_tokens"][0][0].numpy()
    tokens = patchify(x, cfg.patch)
    s = kw["sound_tokens"][0].shape[1] if "sound_tokens" in kw else 0
    a = kw["action_tokens"][0].shape[0] if "action_tokens" in kw else 0
    out = empty_batch(Bucket(1, u + 3, n - u + 5, len(tokens) + 2, a + 1, s + 2, 2), cfg.sequence)
    out["und_ids"][0, :u] = kw["input_ids"]
    out["und_segment_ids"][0, :u] = 0
    out["und_positions"][0, :, :u] = kw["position_ids"][:, :u]
    out["gen_segment_ids"][0, : n - u] = 0
    out["gen_positions"][0, :, : n - u] = kw["position_ids"][:, u:]
    offsets = np.cumsum([0, out["vision_x0"].shape[1], out["action_x0"].shape[1]])
    payload = {"vision": tokens}
    if a:
        payload["action"] = kw["action_tokens"][0].numpy()
        out["action_width"][0, :a], out["action_domain"][0, :a] = cfg.action_dim, int(kw["action_domain_ids"][0])
    if s:
        payload["sound"] = kw["sound_tokens"][0].numpy().T
    for name, rows in payload.items():
        k, at = len(rows), kw[f"{name}_sequence_indexes"].numpy() - u
        out[f"{name}_x0"][0, :k] = rows
        out[f"{name}_index"][0, :k] = at
        out[f"{name}_segment_ids"][0, :k] = 0
        out[f"{name}_noisy"][0, :k] = np.isin(at, kw[f"{name}_mse_loss_indexes"].numpy() - u)
        out["gen_source"][0, at] = np.arange(k) + offsets[("vision", "action", "sound").index(name)]
    T, H, W = x.shape[1:]
    rows, cols = (np.minimum(cfg.patch, d - cfg.patch * np.arange(-(-d // cfg.patch))) for d in (H, W))
    extent = np.stack(np.broadcast_arrays(rows[:, None], cols[None, :]), -1).reshape(1, -1, 2)
    out["vision_extent"][0, : len(tokens)] = np.repeat(extent, T, 0).reshape(-1, 2)
    return out


def relative(a, b) -> tuple[float, float]:
    """(relL2, max error / rms) of a against the reference b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    rms = math.sqrt(np.mean(b**2)) + 1e-300
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-300)), float(np.abs(a - b).max() / rms)
