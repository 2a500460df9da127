"""diffusers' denoising step, as its pipeline runs it, to be timed: `bench generate --reference=diffusers`.

In: a config of the transformer, text tokens, a latent size. Out: seconds of single steps, velocities and latents in our
packed layout; and the same random weights for ours.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Cosmos3OmniTransformer, UniPCMultistepScheduler

from conversion import export_configs
from cosmos_jax.config import ModelConfig
from cosmos_jax.parity import inputs, reference, tiny, transformer
from data_pipelines.packing import patchify, unpatchify


class Diffusers:
    """A random transformer, saved and loaded as a checkpoint's folder is, and the loop around it."""

    def __init__(self, cfg: ModelConfig):
        config = {k: v for k, v in export_configs.diffusers_transformer(cfg).items() if not k.startswith("_")}
        with tempfile.TemporaryDirectory() as folder:
            made: reference.Model = tiny.transformer(config)
            made.save_pretrained(folder)
            self.bytes = sum(p.stat().st_size for p in Path(folder).iterdir())
            self.model = reference.pretrained(Cosmos3OmniTransformer, Path(folder))(torch.float32)
        self.cfg, self.threads, self.done = cfg, torch.get_num_threads(), 0

    def params(self) -> dict:
        """Its weights in our tree."""
        return transformer.params(self.model, self.cfg)

    def start(self, ids: list[np.ndarray], latent: tuple[int, int, int], noise: np.ndarray, sigmas: np.ndarray) -> None:
        """ids: text tokens of both branches; noise: [tokens, features], our packed rows; sigmas: [steps], of UniPC."""
        t, h, w = latent
        what: dict[str, Any] = dict(T=t, H=h, W=w, cond=(), sound=0, action=0, fps=24.0)
        ref, shape = dict(self.model.config), (self.cfg.latent_channels, t, h, w)
        self.packs = [
            inputs.inputs(ref, und_len=len(i), **what) | {"input_ids": torch.from_numpy(i.astype(np.int64))}
            for i in ids
        ]
        self.x: Any = torch.from_numpy(unpatchify(noise, shape, self.cfg.patch).copy())[None]
        solver: Any = UniPCMultistepScheduler(**tiny.FLOW)
        solver.set_timesteps(len(sigmas), sigmas=sigmas)
        solver.set_begin_index(0)
        self.solver = solver
        self.done = 0

    def step(self, scale: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Two forwards one after the other, guidance, solver: (seconds, velocities before guidance [2,tokens,features],
        latents [tokens,features])."""
        began, t = time.perf_counter(), self.solver.timesteps[self.done]
        with torch.no_grad():
            cond, uncond = (self._forward(p, t) for p in self.packs)
            v = uncond + scale * (cond - uncond)
            self.x = self.solver.step(v[None], t, self.x[None], return_dict=False)[0][0]
        seconds = time.perf_counter() - began
        self.done += 1
        packed = [patchify(a[0].numpy(), self.cfg.patch) for a in (cond, uncond, self.x)]
        return seconds, np.stack(packed[:2]), packed[2]

    def _forward(self, pack: dict, t: torch.Tensor) -> torch.Tensor:
        told = {"vision_tokens": [self.x], "vision_timesteps": torch.full_like(pack["vision_timesteps"], t.item())}
        return self.model(**(pack | told), return_dict=False)[0][0].float()


def peak(side: int = 2048) -> float:
    """FLOP/s of a square float32 matmul in PyTorch, now: the best of three."""
    x, seconds = torch.ones(side, side), []
    for _ in range(4):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])
