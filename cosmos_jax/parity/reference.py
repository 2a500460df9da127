"""PyTorch, kept honest: named random weights, exact float32, float64 and bfloat16 variants, and taps on modules.

In: `torch.nn.Module`s of diffusers and transformers. Out: numpy arrays. Only `cosmos_jax.parity` imports torch.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from conversion.check import check
from conversion.names import Entry
from conversion.tree import from_torch

Model = Any  # an nn.Module of the references, whose attributes no type checker knows
Load = Callable[[torch.dtype], Model]  # dtype → the reference, its weights in that dtype


def rng(name: str, seed: int = 0) -> np.random.RandomState:
    """The generator of one named array: what it draws does not depend on what else is drawn."""
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) & 0xFFFFFFFF)


def draw(name: str, *shape: int, seed: int = 1) -> np.ndarray:
    """Unit Gaussian noise, float32."""
    return rng(name, seed).standard_normal(shape).astype(np.float32)


def params(model: Model, entries: Sequence[Entry], target: Mapping) -> dict:
    """The reference's weights in our tree, by the project's own name map, which is checked first."""
    state = {k: numpy(v) for k, v in model.state_dict().items()}
    check(entries, {k: v.shape for k, v in state.items()}, target)
    return from_torch(entries, state)


@dataclass
class Codec:
    """name → array: what went into both halves of a codec, and for float32, float64, bfloat16 and its float32 truth
    what came out."""

    config: dict
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    stages: dict[str, dict[str, np.ndarray]]
    outputs64: dict[str, np.ndarray] = field(default_factory=dict)
    stages64: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    half: dict[str, np.ndarray] = field(default_factory=dict)
    truth: dict[str, np.ndarray] = field(default_factory=dict)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """No gradients, and no TF32: it alone is 1.5e-3 off in the VAE and destroys positions (§4.3, rule 8)."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def pretrained(cls: Any, path: os.PathLike) -> Load:
    """A loader of the folder that `cls.save_pretrained` wrote (diffusers). Never looks at the network.

    diffusers refuses to load a class with `_keep_in_fp32_modules` unless accelerate is installed; without it, the same
    class without that list is loaded, and `cast` keeps those modules in float32.
    """
    frugal = importlib.util.find_spec("accelerate") is not None
    made: Any = cls if frugal else type(cls.__name__, (cls,), {"_keep_in_fp32_modules": None})

    def load(dtype: torch.dtype) -> Model:
        model = made.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=frugal)
        return cast(model, dtype, getattr(cls, "_keep_in_fp32_modules", None) or ()).to(device()).eval()

    return load


def transformers_pretrained(cls: Any, path: os.PathLike) -> Load:
    """A loader of a transformers folder. Attention is written out: its kernels differ by machine."""

    def load(dtype: torch.dtype) -> Model:
        how: dict[str, Any] = dict(dtype=torch.float32, local_files_only=True, attn_implementation="eager")
        return cast(cls.from_pretrained(path, **how), dtype).to(device()).eval()

    return load


def cast(model: Model, dtype: torch.dtype, keep: Sequence[str] = ()) -> Model:
    """The weights in `dtype`, as `from_pretrained(torch_dtype=…)` casts them: bfloat16 spares the modules in `keep` and
    every buffer (frequencies); float64 casts all."""
    if dtype == torch.float64:
        return model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not any(part in keep for part in name.split(".")):
                p.data = p.data.to(dtype)
    return model


def rounded(load: Load) -> Model:
    """float32 arithmetic on the weights of the bfloat16 model: what bfloat16 arithmetic is measured against."""
    return load(torch.bfloat16).float()


def fits_float64(parameters: int) -> bool:
    """Whether a model of so many parameters can be held twice over in float64: on a GPU in what is free, else in half
    of the machine's memory."""
    if device().type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 16 * parameters < free


def release() -> None:
    """Give the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def numpy(x: torch.Tensor) -> np.ndarray:
    """A copy on the host: float64 stays, every other float becomes float32."""
    x = x.detach().cpu()
    return np.array(x.float() if x.is_floating_point() and x.dtype != torch.float64 else x)


def feed(x: Any, model: Model) -> Any:
    """Inputs on the model's device; the floats in lists (latents) also in its dtype, positions never."""
    where = next(model.parameters())
    if isinstance(x, dict):
        return {k: feed(v, model) for k, v in x.items()}
    if isinstance(x, list):
        dtype = where.dtype
        return [v.to(where.device, dtype if v.is_floating_point() else v.dtype) if _is(v) else v for v in x]
    return x.to(where.device) if _is(x) else x


def _is(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


@contextlib.contextmanager
def taps(modules: Mapping[str, Model], before: bool = False) -> Iterator[dict[str, list[tuple[np.ndarray, ...]]]]:
    """name → what that module returned (before: its positional inputs), one tuple of arrays per call."""
    seen: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in modules}

    def keep(name: str, x: Any) -> None:
        parts = x if isinstance(x, (tuple, list)) else (x,)
        seen[name].append(tuple(numpy(p) for p in parts if _is(p)))

    hooks = []
    for name, module in modules.items():
        if before:
            hook = lambda m, args, kwargs, name=name: keep(name, args or tuple(kwargs.values()))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(lambda m, args, out, name=name: keep(name, out)))
    try:
        yield seen
    finally:
        for h in hooks:
            h.remove()
