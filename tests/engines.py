"""Engines that are compiled once, whoever asks for them: a test that runs the same shapes again does not compile."""

import contextlib
from unittest import mock

import jax
import torch

from cosmos_jax.sampling import engine


@contextlib.contextmanager
def shared():
    build, kept = engine.build, {}

    def once(params, cfg, job, **how):
        leaves, tree = jax.tree.flatten((params, job.captions, job.inputs, job.noise, job.rows))
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = tree, shapes, cfg, job.forms, job.guidance.normalize, tuple(how.items()), str(engine.NARROW)
        if key not in kept:
            kept[key] = build(params, cfg, job, **how)
        return kept[key]

    with mock.patch.object(engine, "build", once):
        yield


@contextlib.contextmanager
def beside_torch():
    """`shared`, and one thread for PyTorch: several would only wait for each other, so small are the models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with shared():
        yield
    torch.set_num_threads(before)
