"""The recordings of diffusers' pipelines: every case runs, on folders that diffusers itself loads, and runs alike twice."""

import functools

import diffusers
import numpy as np
import pytest
import torch

from conversion import folder
from cosmos_jax.parity import pipeline_cases, pipeline_reference, run, tiny
from data_pipelines.tokenizer import ChatTokenizer

FAMILIES = ("nano", "edge", "distilled")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family → its folder, opened."""
    run.quiet()

    @functools.cache
    def make(family):
        return folder.open_folder(tiny.write(tmp_path_factory.mktemp(family), family)[0])

    return make


@pytest.fixture(scope="module")
def recorded(checkpoint):
    """family → name → what was recorded."""

    @functools.cache
    def make(family):
        cases = pipeline_cases.cases(pipeline_cases.Facts.of(checkpoint(family)))
        found = pipeline_reference.record_all(checkpoint(family), cases)
        return {c.name: r for c, r in zip(cases, found, strict=True)}

    return make


def test_diffusers_and_we_load_the_tiny_folder(checkpoint):
    path = checkpoint("nano").path
    pipe = diffusers.Cosmos3OmniPipeline.from_pretrained(path, enable_safety_checker=False, dtype=torch.float32)
    assert pipe.sound_tokenizer is not None and pipe.transformer.config.action_dim == 64
    ours = ChatTokenizer.load(path / "text_tokenizer")
    for text in ("A small robot. 24 FPS, été", '{"a": [1, "b"]}', ""):
        messages = [{"role": "system", "content": "You are."}, {"role": "user", "content": text}]
        theirs = pipe.text_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert ours.chat([("system", "You are."), ("user", text)]) == theirs.input_ids
    assert (ours.eos, ours.vision_start) == tuple(
        pipe.llm_special_tokens[k] for k in ("eos_token_id", "start_of_generation")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_recorded(family, recorded):
    for name, r in recorded(family).items():
        for t in r.traces:
            steps = len(t.timesteps)
            assert steps == len(t.velocities) == len(t.velocities64) == len(t.latents) - 1 == len(t.sigmas) - 1, name
            assert not t.calls and set(t.half) == set(t.truth) == set(pipeline_reference.sampled(steps))
            assert ("uncond" in t.branches) == (r.guidance != 1), name
            for at in (t.noise, *t.latents, *(v[b] for v in t.velocities for b in t.branches)):
                assert {m: x.shape for m, x in at.items()} == {m: x.shape for m, x in t.latents[0].items()}, name
                assert all(np.isfinite(x).all() for x in at.values()), name
        assert 0 <= r.video.min() < r.video.max() <= 1
