"""Packing loses nothing and invents nothing. How full the rows are: test_loader.py."""

import dataclasses

import numpy as np
import pytest
from data import toy

from data_pipelines.packing import (
    capacity,
    check_fits,
    choose,
    fill,
    needs,
    patchify,
    plan,
    tight_bucket,
    unpack,
    unpatchify,
)
from data_pipelines.schema import MODALITIES, PAD, Bucket
from data_pipelines.toy_world.codecs import CHANNELS
from data_pipelines.toy_world.samples import TASKS


def planned(n: int, seed: int = 0):
    rng = np.random.RandomState(seed)
    names = [t.name for t in TASKS]
    return [
        plan(
            toy.sample(names[rng.randint(len(names))], int(rng.randint(8)), sample_id=i),
            toy.assets().tokenizer,
            toy.spec(),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_lies_in_one_piece_in_exactly_one_row(seed):
    waiting, bucket, rows = planned(60, seed), toy.config().data.bucket, []
    while waiting:
        chosen = choose(np.array([needs(p) for p in waiting[:16]]), capacity(bucket))
        assert chosen[0] == 0  # the oldest opens the row
        rows.append([waiting[k] for k in chosen])
        waiting = [p for k, p in enumerate(waiting) if k not in chosen]
    b, seen = fill(rows, dataclasses.replace(bucket, rows=len(rows)), toy.spec()), []
    for r in range(len(rows)):
        ids = b["segment_sample_id"][r]
        seen += ids[ids != PAD].tolist()
        for name in ("und_segment_ids", "gen_segment_ids"):
            s = b[name][r]
            real = s[s != PAD]
            assert (np.diff(real) >= 0).all() and (s[: len(real)] != PAD).all()  # contiguous, padding last
        source = b["gen_source"][r]
        used = source[b["gen_segment_ids"][r] != PAD]
        assert len(set(used.tolist())) == len(used) and (source[b["gen_segment_ids"][r] == PAD] == PAD).all()
        where = np.concatenate([b[f"{m}_index"][r] for m in MODALITIES])
        np.testing.assert_array_equal(where[used], np.flatnonzero(source != PAD))  # inverse of each other
        for m in MODALITIES:
            i = b[f"{m}_index"][r]
            np.testing.assert_array_equal(b["gen_segment_ids"][r][i[i != PAD]], b[f"{m}_segment_ids"][r][i != PAD])
    assert sorted(seen) == list(range(60))


def test_a_sample_larger_than_the_bucket_is_named():
    small = dataclasses.replace(toy.config().data.bucket, gen=32)
    with pytest.raises(ValueError, match="data.bucket.gen is 32"):
        check_fits(next(p for p in planned(30) if p.size["gen"] > 32), small)


@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (3, 2, 5, 7), (3, 1, 1, 1)])
def test_patchify_has_an_inverse(shape):
    x = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(unpatchify(patchify(x, 2), shape, 2), x)


def test_patch_features_are_row_column_channel():
    x = np.arange(2 * 1 * 2 * 2, dtype=np.float32).reshape(2, 1, 2, 2)  # [C,T,H,W]
    assert patchify(x, 2)[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_packed_latents_come_back_whole():
    """Odd sizes included: edges are padded for the patch and cropped again, and their weights count real elements."""
    odd = np.random.RandomState(1).standard_normal((CHANNELS, 5, 5, 7)).astype(np.float32)
    samples = [toy.sample("policy", vision_latents=odd), toy.sample("text2video_sound")]
    p = [plan(s, toy.assets().tokenizer, toy.spec()) for s in samples]
    need = tight_bucket(p, 1)
    bucket = Bucket(1, 2 * need.und, 2 * need.gen, 2 * need.vision, need.action, need.sound, 2, 0)
    b = fill([p], bucket, toy.spec())
    for n, s in enumerate(samples):
        back = unpack({m: b[f"{m}_x0"] for m in MODALITIES}, b, 0, n, s, toy.spec())
        np.testing.assert_array_equal(back["vision"], s.vision_latents)
        if s.actions is not None:
            np.testing.assert_array_equal(back["action"], s.actions)
        if s.sound_latents is not None:
            np.testing.assert_array_equal(back["sound"], s.sound_latents)
    elements = b["vision_extent"].prod(-1) * CHANNELS
    mine = b["vision_segment_ids"] == 0
    assert (elements * b["vision_weight"])[mine].sum() == pytest.approx(1.0, rel=1e-5)
