"""Any generation mode as arguments of diffusers' transformer, laid out by its own position functions.

In: a `Sample`, its text ids, and what is clean, said once more by the test. Out: keyword arguments of
`Cosmos3OmniTransformer.forward`, as transfer's `_vision_pack` in diffusers' modular pipeline builds them: every vision
item of one sample, the target last. The packer of the project has no part in it.
"""

import math

import numpy as np
import torch
from diffusers.models.transformers import transformer_cosmos3
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens

from data_pipelines.sample import Sample

T = 437


def reference_inputs(s: Sample, ids, clean: list[int], sound_noisy: bool, action_noisy: list[int], shared: bool):
    """clean: latent frames of the target; action_noisy: rows; shared: all vision items at the same positions."""
    u = len(ids)
    text, start = get_3d_mrope_ids_text_tokens(u, 0, use_float_positions=True)
    start += 15000
    positions, at, item_start = [text], u, start
    shapes, loss, noisy = [], [], []
    items = [*s.context, s.vision_latents]
    for i, x in enumerate(items):
        _, t, h, w = x.shape
        ph, pw = math.ceil(h / 2), math.ceil(w / 2)
        where, after = get_3d_mrope_ids_vae_tokens(t, ph, pw, item_start, True, s.fps, 24.0, 4)
        item_start = start if shared else after
        positions.append(where.float())
        frames = [k for k in range(t) if k not in clean] if i == len(s.context) else []
        loss.append(at + torch.arange(t * ph * pw).view(t, -1)[frames].flatten())
        noisy.append(torch.tensor(frames, dtype=torch.long))
        shapes.append((t, ph, pw))
        at += t * ph * pw
    mse = torch.cat(loss)
    kw = dict(
        input_ids=torch.as_tensor(np.asarray(ids), dtype=torch.long), text_indexes=torch.arange(u), und_len=u,
        vision_tokens=[torch.from_numpy(x)[None] for x in items], vision_token_shapes=shapes,
        vision_sequence_indexes=torch.arange(u, at), vision_mse_loss_indexes=mse,
        vision_timesteps=torch.full((len(mse),), T), vision_noisy_frame_indexes=noisy,
    )  # fmt: skip
    if s.actions is not None:
        n = len(s.actions)
        where, _ = get_3d_mrope_ids_vae_tokens(
            n, 1, 1, start, True, s.fps, 24.0, 1, base_temporal_compression_factor=4, start_frame_offset=s.action_start
        )
        positions.append(where.float())
        rows, index = torch.tensor(action_noisy, dtype=torch.long), torch.arange(at, at + n)
        kw |= dict(
            action_tokens=[torch.from_numpy(s.actions)], action_token_shapes=[(n, 1, 1)], action_sequence_indexes=index,
            action_mse_loss_indexes=index[rows], action_timesteps=torch.full((len(rows),), T),
            action_noisy_frame_indexes=[rows], action_domain_ids=[torch.tensor([s.domain])],
        )  # fmt: skip
        at += n
    if s.sound_latents is not None:
        n = s.sound_latents.shape[1]
        where, _ = get_3d_mrope_ids_vae_tokens(n, 1, 1, start, True, 25.0, 24.0, 1)
        positions.append(where.float())
        index, frames = torch.arange(at, at + n), torch.arange(n if sound_noisy else 0)
        kw |= dict(
            sound_tokens=[torch.from_numpy(s.sound_latents)], sound_token_shapes=[(n, 1, 1)],
            sound_sequence_indexes=index, sound_mse_loss_indexes=index[frames],
            sound_timesteps=torch.full((len(frames),), T), sound_noisy_frame_indexes=[frames],
        )  # fmt: skip
        at += n
    return kw | dict(position_ids=torch.cat(positions, 1), sequence_length=at)


def run(model, kw) -> dict[str, np.ndarray]:
    """Velocity of the target, the action, the sound; what is predicted for a control must be 0."""
    with torch.no_grad():
        out = model(**kw)
    assert not any(x.any() for x in out.sample[:-1])
    found = {"vision": out.sample[-1][0]}
    found |= {"action": out.action[0]} if out.action is not None else {}
    found |= {"sound": out.sound[0]} if out.sound is not None else {}
    return {k: v.numpy() for k, v in found.items()}


def one_attention_per_control(monkeypatch, kw, weights) -> None:
    """Let diffusers' generator attend once per control, over [text, that control, target], and average the target's
    outputs; a control's own output comes from its own pass (cosmos-framework, multi_control_two_way_attention)."""
    whole, u = transformer_cosmos3.dispatch_attention_fn, kw["und_len"]
    edges = np.cumsum([0, *(math.prod(shape) for shape in kw["vision_token_shapes"])])
    controls = [slice(a, b) for a, b in zip(edges[:-2], edges[1:-1], strict=True)]
    target = slice(edges[-2], edges[-1])
    share = [w / sum(weights) for w in weights]

    def attend(q, k, v, is_causal=False, **other):
        if is_causal:
            return whole(q, k, v, is_causal=True, **other)
        out = torch.zeros_like(q)
        for own, w in zip(controls, share, strict=True):
            seen = [torch.cat([x[:, :u], x[:, u:][:, own], x[:, u:][:, target]], 1).transpose(1, 2) for x in (k, v)]
            asked = torch.cat([q[:, own], q[:, target]], 1).transpose(1, 2)
            o = torch.nn.functional.scaled_dot_product_attention(asked, *seen, enable_gqa=True).transpose(1, 2)
            n = own.stop - own.start
            out[:, own] = o[:, :n]
            out[:, target] += w * o[:, n:]
        return out

    monkeypatch.setattr(transformer_cosmos3, "dispatch_attention_fn", attend)
