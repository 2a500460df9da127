"""Shared by the data tests: the toy's config, assets and samples, made once."""

import dataclasses
import functools
import importlib

from cosmos_jax.config import Config, from_dict
from data_pipelines import loader
from data_pipelines.toy_world import codecs
from data_pipelines.toy_world.episodes import make_episode
from data_pipelines.toy_world.samples import ToyAssets, make_sample


@functools.lru_cache
def config() -> Config:
    return from_dict(importlib.import_module("configs.toy").get_config())


@functools.lru_cache
def assets() -> ToyAssets:
    fitted = ToyAssets.fit()
    assert codecs.CHANNELS == config().model.latent_channels
    return fitted


@functools.lru_cache
def encoded(seed: int = 3):
    return assets().encode(make_episode(seed))


def sample(task: str, seed: int = 3, **changes):
    return dataclasses.replace(make_sample(encoded(seed), task), **changes)


def spec():
    return config().model.sequence


def make_loader(episodes: int = 60, rows=None, **changes) -> loader.Prefetch:
    """changes: of the toy's DataConfig."""
    data = dataclasses.replace(config().data, episodes=episodes, **changes)
    return loader.build(data, spec(), assets(), 1.0, 1.0, rows)
