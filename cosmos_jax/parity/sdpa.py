"""PyTorch's scaled_dot_product_attention, to be timed: `bench attention`.

In: batches of equal samples as jax arrays. Out: outputs and gradients, and calls that wait for the device.
"""

from __future__ import annotations

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def refusal(platform: str) -> str | None:
    """Why it cannot run where jax does; None if it can."""
    if platform == "cpu":
        return None
    if platform == "gpu" and torch.cuda.is_available():
        return None
    return f"The installed PyTorch does not see the {platform.upper()} that jax runs on."


class Attention:
    """Batches (q [S,T,H,d], k, v [S,Tk,Hkv,d], do) as PyTorch has them, heads before tokens."""

    def __init__(self, batches: list[tuple], causal: bool):
        self.causal = causal
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batches = [tuple(map(self._tensor, b)) for b in batches]
        self.saved = [self._attend(b, train=True) for b in self.batches]

    def _tensor(self, x) -> torch.Tensor:
        made = torch.from_numpy(np.array(x, np.float32)).to(self.device, DTYPES[str(x.dtype)])
        return made.transpose(1, 2).contiguous()

    def _attend(self, batch: tuple, train: bool):
        """(output, what its gradients are of)."""
        q, k, v = inputs = [x.detach().requires_grad_(train) for x in batch[:3]]
        with torch.set_grad_enabled(train):
            grouped = q.shape[1] != k.shape[1]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        return out, inputs

    def forward(self) -> list[torch.Tensor]:
        return [self._attend(b, train=False)[0] for b in self.batches]

    def backward(self) -> list[tuple[torch.Tensor, ...]]:
        pairs = zip(self.saved, self.batches, strict=True)
        return [torch.autograd.grad(out, inputs, b[3], retain_graph=True) for (out, inputs), b in pairs]

    def wait(self, _) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def numpy(x: torch.Tensor) -> np.ndarray:
        return x.detach().float().transpose(1, 2).cpu().numpy()
