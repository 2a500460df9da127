"""One sample of text, vision, sound and action: as the arguments of diffusers' transformer, and as a row of our batch.

In: sizes, conditions, frame rate. Out: keyword arguments of `Cosmos3OmniTransformer.forward`; the same sample in the
batch contract, built from the reference's own indexes and positions, so that only the network is compared.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens

from cosmos_jax.config import ModelConfig
from cosmos_jax.parity.reference import draw
from data_pipelines.packing import patchify, unpatchify
from data_pipelines.schema import MODALITIES, Bucket, empty_batch

TIMESTEP = 437
CASES: dict[str, dict] = {  # task layouts: what is there, and what is a condition
    "everything": {},
    "text to video": dict(cond=(), sound=0, action=0),
    "image to video, odd latent size": dict(T=2, H=7, W=5, cond=(0,), sound=0, action=0),
    "forward dynamics": dict(cond=(0,), action=4, action_cond=(0, 1, 2, 3), sound=0),
    "inverse dynamics": dict(cond=(0, 1, 2), action=8, action_cond=(0,), sound=0),
    "text to image": dict(T=1, cond=(), sound=0, action=0, fps=24.0),
}
BUCKET = Bucket(rows=1, und=32, gen=47, vision=29, action=9, sound=9, segments=2)  # holds every case: one compilation


def inputs(
    ref: dict, und_len=29, T=3, H=5, W=6, cond=(0,), sound=7, action=4, action_cond=(), fps=10.0, t=TIMESTEP,
    domain=9, seed=1,
) -> dict[str, Any]:  # fmt: skip
    """ref: `config.json` of the transformer. cond, action_cond: clean latent frames and action rows."""
    p = ref["latent_patch_size"]
    ph, pw = math.ceil(H / p), math.ceil(W / p)
    text, nxt = get_3d_mrope_ids_text_tokens(und_len, 0, use_float_positions=True)
    off, pos, at = nxt + 15000, [text], und_len
    ids, _ = get_3d_mrope_ids_vae_tokens(T, ph, pw, off, True, fps, 24.0, 4)
    pos.append(ids.float())
    noisy = [f for f in range(T) if f not in cond]
    kw: dict[str, Any] = dict(
        input_ids=torch.arange(und_len) * 37 % 430, text_indexes=torch.arange(und_len), und_len=und_len,
        vision_tokens=[torch.from_numpy(draw("vision", 1, ref["latent_channel"], T, H, W, seed=seed))],
        vision_token_shapes=[(T, ph, pw)], vision_sequence_indexes=torch.arange(at, at + T * ph * pw),
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
            sound_tokens=[torch.from_numpy(draw("sound", ref["sound_dim"], sound, seed=seed))],
            sound_token_shapes=[(sound, 1, 1)], sound_sequence_indexes=index, sound_mse_loss_indexes=index.clone(),
            sound_timesteps=torch.full((sound,), t), sound_noisy_frame_indexes=[torch.arange(sound)],
        )  # fmt: skip
        at += sound
    if action and ref["action_gen"]:
        ids, _ = get_3d_mrope_ids_vae_tokens(
            action, 1, 1, off, True, fps, 24.0, 1, base_temporal_compression_factor=4, start_frame_offset=1
        )
        pos.append(ids.float())
        index = torch.arange(at, at + action)
        rows = torch.tensor([i for i in range(action) if i not in action_cond], dtype=torch.long)
        kw |= dict(
            action_tokens=[torch.from_numpy(draw("action", action, ref["action_dim"], seed=seed))],
            action_token_shapes=[(action, 1, 1)], action_sequence_indexes=index, action_mse_loss_indexes=index[rows],
            action_timesteps=torch.full((len(rows),), t), action_noisy_frame_indexes=[rows],
            action_domain_ids=[torch.tensor([domain])],
        )  # fmt: skip
        at += action
    return kw | dict(position_ids=torch.cat(pos, 1), sequence_length=at)


def batch(kw: dict, cfg: ModelConfig, bucket: Bucket = BUCKET) -> dict[str, np.ndarray]:
    """The same sample as the one row of our batch."""
    u, n = kw["und_len"], kw["sequence_length"]
    x = kw["vision_tokens"][0][0].numpy()
    payload = {"vision": patchify(x, cfg.patch)}
    out = empty_batch(bucket, cfg.sequence)
    out["und_ids"][0, :u] = kw["input_ids"]
    out["und_segment_ids"][0, :u] = 0
    out["und_positions"][0, :, :u] = kw["position_ids"][:, :u]
    out["gen_segment_ids"][0, : n - u] = 0
    out["gen_positions"][0, :, : n - u] = kw["position_ids"][:, u:]
    offsets = np.cumsum([0, out["vision_x0"].shape[1], out["action_x0"].shape[1]])
    if "action_tokens" in kw:
        a = len(kw["action_tokens"][0])
        payload["action"] = kw["action_tokens"][0].numpy()
        out["action_width"][0, :a], out["action_domain"][0, :a] = cfg.action_dim, int(kw["action_domain_ids"][0])
    if "sound_tokens" in kw:
        payload["sound"] = kw["sound_tokens"][0].numpy().T
    for name, rows in payload.items():
        k, at = len(rows), kw[f"{name}_sequence_indexes"].numpy() - u
        out[f"{name}_x0"][0, :k] = rows
        out[f"{name}_index"][0, :k] = at
        out[f"{name}_segment_ids"][0, :k] = 0
        out[f"{name}_noisy"][0, :k] = np.isin(at, kw[f"{name}_mse_loss_indexes"].numpy() - u)
        out["gen_source"][0, at] = np.arange(k) + offsets[MODALITIES.index(name)]
    T, H, W = x.shape[1:]
    rows, cols = (np.minimum(cfg.patch, d - cfg.patch * np.arange(-(-d // cfg.patch))) for d in (H, W))
    extent = np.stack(np.broadcast_arrays(rows[:, None], cols[None, :]), -1).reshape(1, -1, 2)
    out["vision_extent"][0, : len(payload["vision"])] = np.repeat(extent, T, 0).reshape(-1, 2)
    return out


def timestep(kw: dict) -> float:
    """What the reference is told of its noisy tokens."""
    return float(next(t[0] for t in (kw["vision_timesteps"], kw.get("action_timesteps", ())) if len(t)))


def present(kw: dict) -> list[str]:
    return [n for n in MODALITIES if f"{n}_tokens" in kw]


def to_reference(buffers: dict, kw: dict, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Our buffers (row 0) in the reference's layouts: vision [C,T,H,W], action [rows,A], sound [Ds,T]."""
    out = {n: np.asarray(buffers[n])[0, : len(kw[f"{n}_sequence_indexes"])] for n in present(kw)}
    out["vision"] = unpatchify(out["vision"], tuple(kw["vision_tokens"][0].shape[1:]), cfg.patch)
    if "sound" in out:
        out["sound"] = out["sound"].T
    return out


def to_buffers(latents: dict[str, np.ndarray], like: dict, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The reverse: the reference's latents in buffers shaped like those of the batch `like`."""
    out = {n: np.zeros_like(like[f"{n}_x0"]) for n in MODALITIES}
    for name, x in latents.items():
        rows = patchify(x, cfg.patch) if name == "vision" else x.T if name == "sound" else x
        out[name][0, : len(rows)] = rows
    return out
