"""Initial noise from a file, and latents back into one. (That of a seed is `generate.framework_buffers`.)

In: an .npz with `vision` [C,T,h,w], `sound` [C,T], `action` [T,C] (any of them; float32). Out: the buffers of
a packed batch. Clean positions are overwritten by the conditions, so what stands there does not matter.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_jax.outputs import appearing
from data_pipelines.packing import patchify
from data_pipelines.sample import Sample
from data_pipelines.schema import MODALITIES, SequenceSpec

Arrays = Mapping[str, np.ndarray]  # modality → [C,T,h,w], [T,C] or [C,T]
FRESH = "_fresh"  # suffix: what a stochastic sampler adds in every step, one more axis in front
STEPS = "_steps"  # suffix: latents after every step


def shapes(s: Sample, spec: SequenceSpec) -> dict[str, tuple[int, ...]]:
    """Of the noise that a sample needs."""
    out: dict[str, tuple[int, ...]] = {"vision": s.vision_latents.shape}
    if s.actions is not None:
        out["action"] = (len(s.actions), spec.action_dim)
    if s.sound_latents is not None:
        out["sound"] = s.sound_latents.shape
    return out


def read(path: str | Path) -> dict[str, np.ndarray]:
    """An .npz of noise. ValueError, one sentence, unless it holds finite floating-point arrays with known names."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--noise={path} does not exist; give an .npz file with vision, sound, action.")
    known = [n + suffix for n in MODALITIES for suffix in ("", FRESH)]
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as f:  # np.load alone takes .npy files too
            arrays = {name: f[name] for name in f.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"--noise={path} is not an .npz file of plain arrays ({type(e).__name__}).") from None
    for name, x in arrays.items():
        if name not in known:
            raise ValueError(f"--noise={path} holds {name!r}; the names are {', '.join(known)}.")
        if not isinstance(x, np.ndarray) or not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"--noise={path}: {name} must be an array of floating-point numbers.")
        with np.errstate(over="ignore"):
            arrays[name] = x.astype(np.float32)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"--noise={path}: {name} holds numbers that are not finite in float32; replace them.")
    return arrays


def check(given: Arrays, s: Sample, spec: SequenceSpec, chunks: int = 1, draws: int = 0) -> None:
    """ValueError when the file's arrays are not those that the sample needs; several chunks: one more axis in front.

    draws: steps that add fresh noise, of a stochastic sampler.
    """
    want = shapes(s, spec)
    if any(n.endswith(FRESH) for n in given):
        if not draws:
            raise ValueError(f"--noise: no step adds fresh noise here; leave out what ends in {FRESH}.")
        want |= {n + FRESH: (draws, *shape) for n, shape in want.items()}
    for name, shape in want.items():
        have = given[name].shape if name in given else None
        shape = shape if chunks == 1 else (chunks, *shape)
        raw = (*shape[:-1], s.actions.shape[1]) if name.startswith("action") else shape
        if have not in (shape, raw):
            said = "absent" if have is None else list(have)
            raise ValueError(f"--noise: {name} is {said}, but the request needs {list(shape)}.")
    for name in given:
        if name not in want:
            raise ValueError(f"--noise: {name} is given, but the request has no such stream; leave it out.")


def buffers(arrays: Arrays, batch: dict, s: Sample, spec: SequenceSpec) -> dict[str, Any]:
    """The arrays of the only sample of row 0, in buffers like `*_x0`; zero elsewhere, in context items too."""
    out = {n: np.zeros(batch[f"{n}_x0"].shape, np.float32) for n in MODALITIES}
    for name in shapes(s, spec):
        place = np.flatnonzero(batch[f"{name}_segment_ids"][0] == 0)
        tokens = _tokens(name, arrays[name], spec)
        out[name][0, place[len(place) - len(tokens) :], : tokens.shape[1]] = tokens  # the target is the last item
    return out


def _tokens(name: str, x: np.ndarray, spec: SequenceSpec) -> np.ndarray:
    return patchify(x, spec.patch) if name == "vision" else x.T if name == "sound" else x


def write(path: str | Path, latents: Arrays, steps: Arrays | None, spec: SequenceSpec) -> None:
    """Final latents and, as `vision_steps` …, those after every step; actions with all the model's channels."""
    table: dict[str, Any] = {n: wide(n, x, spec) for n, x in latents.items()}
    table |= {n + STEPS: wide(n, x, spec) for n, x in (steps or {}).items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as partial, open(partial, "wb") as f:
        np.savez(f, **table)


def wide(name: str, x: np.ndarray, spec: SequenceSpec) -> np.ndarray:
    """Latents of a modality; actions with zeros in the channels that their body has not."""
    missing = spec.action_dim - x.shape[-1] if name == "action" else 0
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]).astype(np.float32)
