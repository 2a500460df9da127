"""`show`: what a config is, by abstract evaluation. Nothing is allocated, whatever its size.

In: a `Config`. Out: lines of text.
"""

from __future__ import annotations

import math

import jax

from cosmos_jax import mesh as meshes
from cosmos_jax.config import Config, ConfigError, to_dict
from cosmos_jax.model import cosmos
from cosmos_jax.pipeline import CANVAS
from data_pipelines.tasks import ALL, TABLE, Task, describe


def show(config: Config) -> None:
    """Print settings, parameters, mesh, the table of tasks, and the tokens of one sample of each."""
    print("settings")
    for group, settings in to_dict(config).items():
        print(f"  {group}: " + ", ".join(f"{k}={v}" for k, v in settings.items()))
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in cosmos.abstract(config.model).items()}
    total = sum(sizes.values())
    print(
        f"\nparameters of {config.model.name}: {total:,} ({total - sizes.get('vit', 0):,} without the vision encoder)"
    )
    for name, n in sizes.items():
        print(f"  {name:14} {n:>15,}")
    try:
        mesh = meshes.build(config.mesh)
        meshes.check(config, mesh)
        print("\nmesh: " + " × ".join(f"{a} {n}" for a, n in mesh.shape.items()) + f" on {mesh.devices.size} device(s)")
    except ConfigError as e:
        print(f"\nmesh: {e}")
    c = CANVAS
    toy = f"{c.frames} frames of {c.width}×{c.height} at {c.fps:g} fps"
    clip = toy if _toy(config) else "189 frames of 1280×720 at 24 fps"
    print(f"\n{describe()}\n\ntokens of one sample, {clip} (L = text tokens)")
    for t in TABLE:
        print(f"  {t.name:18} {tokens(t, config)}")


def _toy(config: Config) -> bool:
    return config.data.source.startswith("toy") and config.model.name.startswith("toy")


def tokens(t: Task, config: Config) -> str:
    """The streams of a task and how many tokens each has, in the order of the sequence."""
    spec = config.model.sequence
    if not t.generates:
        return "und: L with visual tokens, the answer supervised" if spec.vit_patch else "und: L, the answer supervised"
    side = (CANVAS.height // CANVAS.spatial, CANVAS.width // CANVAS.spatial)
    frames, fps, (h, w) = (CANVAS.frames, CANVAS.fps, side) if _toy(config) else (189, 24.0, (45, 80))
    per_frame = math.ceil(h / spec.patch) * math.ceil(w / spec.patch)
    latent_frames = 1 if t.vision == "image" else 1 + (frames - 1) // spec.temporal_factor
    clean = latent_frames if t.clean_frames == ALL else t.clean_frames
    counts = {"clean": clean * per_frame, "noisy": (latent_frames - clean) * per_frame}
    parts = ["vision " + " + ".join(f"{n:,} {k}" for k, n in counts.items() if n)]
    if t.context != "none":
        item = f"vision {latent_frames * per_frame:,} clean"
        parts.insert(0, f"{item} (the source)" if t.context == "source" else f"{item} for each control")
    if t.action != "none" and spec.action_dim:
        parts.append(f"action {frames - 1} {t.action}")
    if t.sound != "none" and spec.sound_dim:
        n = math.ceil(frames / fps * spec.sound_latent_fps - 1e-6)
        parts.append(
            f"sound {n} {'clean' if t.sound == 'clean' else 'noisy'}" + (", if wanted" if t.sound == "optional" else "")
        )
    return "und: L    gen: " + " | ".join(parts)
