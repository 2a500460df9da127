"""The toy's tokenisers and everything else that must stay frozen from training to evaluation.

In: a working directory. Out: its assets: video and sound codec, action statistics, tokenizer; fitted once, then read.
A checkpoint remembers their fingerprints, so latents are never read with another codec than they were made with.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cosmos_jax.codecs import SoundCodec, VideoCodec
from cosmos_jax.config import ConfigError, ModelConfig
from data_pipelines.request import Canvas
from data_pipelines.toy_world import codecs, world
from data_pipelines.toy_world.episodes import FRAMES
from data_pipelines.toy_world.render import SIZE
from data_pipelines.toy_world.samples import DOMAIN, REASON_FRAMES, ToyAssets
from data_pipelines.toy_world.sound import RATE

DIRECTORY = "assets"  # inside a working directory
CANVAS = Canvas(
    frames=FRAMES, height=SIZE, width=SIZE, fps=world.FPS, spatial=codecs.SPATIAL, sound_rate=RATE, domain=DOMAIN,
    look=tuple(i / (FRAMES - 1) for i in REASON_FRAMES),
)  # fmt: skip


def prepare(workdir: str | Path) -> ToyAssets:
    """The assets of a working directory; fitted and saved there (a few seconds) if it has none.

    For one process at a time (`dist.lead`). They appear whole or not at all.
    """
    directory = Path(workdir) / DIRECTORY
    if not directory.exists():
        partial = directory.with_name(f"{DIRECTORY}.partial")
        ToyAssets.fit().save(partial)
        partial.rename(directory)
    return ToyAssets.load(directory)


def fingerprints(assets: ToyAssets) -> dict[str, str]:
    """JSON to store with a checkpoint."""
    texts = {"actions": json.dumps([assets.stats.lo, assets.stats.hi, assets.stats.floor])}
    texts["tokenizer"] = assets.tokenizer._tok.to_str()
    return {"codecs": assets.fingerprint} | {k: hashlib.sha256(v.encode()).hexdigest()[:16] for k, v in texts.items()}


def verify(assets: ToyAssets, stored: dict[str, str], where: Path) -> None:
    """ValueError when a checkpoint was trained with other assets than those in `where`."""
    for name, own in fingerprints(assets).items():
        if stored.get(name, own) != own:
            raise ValueError(
                f"{where} holds {name} {own}, but the checkpoint was trained with {stored[name]}; "
                "put back the assets of that run, or train again in an empty directory."
            )


def check(assets: ToyAssets, model: ModelConfig) -> None:
    """ConfigError when the model's sizes are not those of the assets."""
    video: VideoCodec = assets.video
    sound: SoundCodec = assets.sound
    width, vocab = len(assets.stats.lo), assets.tokenizer.vocab_size
    for name, have, want, rule in (
        ("latent_channels", model.latent_channels, video.channels, "is"),
        ("sound_dim", model.sound_dim, sound.channels if model.sound_dim else 0, "is"),
        ("action_dim", model.action_dim, width if model.action_dim else 0, "is at least"),
        ("vocab", model.vocab, vocab, "is at least"),
    ):
        if have < want or (rule == "is" and have != want):
            raise ConfigError(f"model.{name}={have}, but the toy world needs one that {rule} {want}; set it so.")
    if model.vision and SIZE % (2 * model.vision.patch):
        raise ConfigError(f"model.vision.patch={model.vision.patch}: twice of it must divide the toy's {SIZE} pixels.")
