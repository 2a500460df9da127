"""The task table, and what is refused before it becomes tokens: one sentence that names the fault and the remedy."""

import dataclasses

import numpy as np
import pytest
from data import toy

from data_pipelines.packing import plan
from data_pipelines.sample import validate
from data_pipelines.tasks import ALL, TABLE, describe, task
from data_pipelines.toy_world.codecs import CHANNELS as C
from data_pipelines.toy_world.samples import TASKS

GENERATES = [t.name for t in TASKS if t.generates]


def test_the_table_names_every_task():
    assert [t.name for t in TABLE] == [
        "reason", "text2image", "text2video", "text2video_sound", "image2video", "video2video", "forward_dynamics",
        "inverse_dynamics", "policy", "image2image", "transfer", "sound2video", "video2sound",
    ]  # fmt: skip
    assert all(t.name in describe() for t in TABLE)


def test_an_unknown_task_is_named_with_its_neighbour():
    with pytest.raises(ValueError, match="did you mean 'text2video'"):
        task("text2vidoe")


@pytest.mark.parametrize("name", GENERATES)
def test_clean_and_noisy_follow_the_table(name):
    p = plan(toy.sample(name), toy.assets().tokenizer, toy.spec())
    row = task(name)
    frames = p.sample.vision_latents.shape[1]
    noisy = p.noisy["vision"].reshape(frames, -1)
    clean = frames if row.clean_frames == ALL else row.clean_frames
    assert not noisy[:clean].any() and noisy[clean:].all()
    if row.action != "none":
        assert p.noisy["action"].all() == (row.action == "noisy") and len(p.noisy["action"]) == 16
    assert ("sound" in p.tokens) == row.usually_sounds
    tok = toy.assets().tokenizer
    assert p.ids[-2:].tolist() == [tok.eos, tok.vision_start]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("text2video", dict(fps=0.0), "fps=0.0 must be positive"),
        ("text2video", dict(vision_latents=None), "needs vision latents"),
        ("text2image", dict(vision_latents=np.zeros((C, 5, 6, 6))), "makes one frame"),
        ("video2video", dict(vision_latents=np.zeros((C, 2, 6, 6)), sound_latents=None), "at least 9 frames"),
        ("text2video", dict(vision_latents=np.zeros((8, 5, 6, 6))), f"expected \\({C}, T, h, w\\)"),
        ("text2video", dict(vision_latents=np.full((C, 5, 6, 6), np.nan)), "NaN"),
        ("policy", dict(actions=None), "needs actions"),
        ("policy", dict(actions=np.zeros((15, 10))), "15 action rows, but 17 frames"),
        ("policy", dict(actions=np.zeros((16, 99))), "at most 16"),
        ("policy", dict(actions=np.full((16, 10), 40.0)), "not in normalised units"),
        ("text2video", dict(sound_latents=np.zeros((16, 43))), "takes no sound"),
        ("text2video_sound", dict(sound_latents=None), "needs sound"),
        ("reason", dict(frames=np.zeros((4, 48, 48, 3))), "uint8"),
        ("reason", dict(frame_times=(0.0,)), "need 2 frame_times"),
    ],
)
def test_a_bad_sample_is_one_clear_sentence(name, changes, words):
    good = toy.sample(name)
    validate(good, toy.spec())
    with pytest.raises(ValueError, match=words) as e:
        validate(dataclasses.replace(good, **changes), toy.spec())
    assert str(e.value).count("\n") == 0 and name in str(e.value)
