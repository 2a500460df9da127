"""Positions equal the reference's, bit for bit."""

import numpy as np
import pytest
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_text_tokens, get_3d_mrope_ids_vae_tokens

from data_pipelines import positions
from data_pipelines.schema import SequenceSpec

SPEC = SequenceSpec(latent_channels=48, patch=2, action_dim=64, sound_dim=64)
L = 120
START = positions.start_of_generation(L, SPEC)


def reference(t, h, w, fps, **kw):
    ids, _ = get_3d_mrope_ids_vae_tokens(t, h, w, int(START), True, fps, 24.0, **kw)
    return ids.float().numpy()


def test_text():
    ids, after = get_3d_mrope_ids_text_tokens(L, 0, use_float_positions=True)
    np.testing.assert_array_equal(positions.text(L), ids.numpy())
    assert START == after + 15000


@pytest.mark.parametrize("fps", [5.0, 10.0, 15.0, 24.0, 30.0])
@pytest.mark.parametrize("grid", [(5, 3, 4), (48, 23, 40), (2, 1, 1)])
def test_vision(fps, grid):
    np.testing.assert_array_equal(
        positions.vision(*grid, START, fps, SPEC), reference(*grid, fps, temporal_compression_factor=4)
    )


def test_an_image_sits_at_the_origin():
    x = positions.vision(1, 2, 3, START, 24.0, SPEC)
    assert (x[0] == START).all() and x[1].tolist() == [0, 0, 0, 1, 1, 1] and x[2].tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize("fps", [5.0, 10.0, 15.0, 24.0])
def test_action(fps):
    want = reference(
        16, 1, 1, fps, temporal_compression_factor=1, base_temporal_compression_factor=4, start_frame_offset=1
    )
    np.testing.assert_array_equal(positions.action(16, START, fps, SPEC), want)


def test_action_on_the_float32_grid():
    """At 10 fps the ids are not multiples of 0.6: the order of operations shows (spec model.md §4.4)."""
    x = positions.action(3, START, 10.0, SPEC)[0] - START
    np.testing.assert_allclose(x, [0.5996, 1.2002, 1.7998], atol=1e-4)


def test_the_fourth_action_of_a_group_meets_its_latent_frame():
    a, v = positions.action(16, START, 15.0, SPEC)[0], positions.vision(5, 1, 1, START, 15.0, SPEC)[0]
    np.testing.assert_allclose(a[3::4], v[1:], atol=1e-3)


def test_sound():
    np.testing.assert_array_equal(
        positions.sound(43, START, SPEC), reference(43, 1, 1, 25.0, temporal_compression_factor=1)
    )
    assert positions.sound(2, START, SPEC)[0, 1] - START == pytest.approx(0.96, abs=1e-3)


def test_documented_example():
    """120 text tokens, 189 frames at 24 fps: vision at 15120 … 15167 (spec model.md §4.4)."""
    t = positions.vision(48, 1, 1, START, 24.0, SPEC)[0]
    assert t[0] == 15120 and t[-1] == 15167


@pytest.mark.parametrize(("fps", "seen"), [(23.976, 24.0), (29.97, 30.0), (15.0, 15.0), (10.0, 10.0)])
def test_frame_rates_are_rounded_as_in_training(fps, seen):
    assert positions.conditioning_fps(fps) == seen
    assert positions.conditioning_fps(fps, round_to_bf16=False) == fps


def test_reasoner_positions():
    x = positions.reasoner([3, (2, 4), 2])
    assert x[0].tolist() == [0, 1, 2] + [3] * 8 + [7, 8]
    assert x[1].tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 7, 8]
    assert x[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("bug", ["margin", "offset"])
def test_the_suite_can_fail(bug):
    want = reference(
        16, 1, 1, 10.0, temporal_compression_factor=1, base_temporal_compression_factor=4, start_frame_offset=1
    )
    origin, start = (START - 1, 1) if bug == "margin" else (START, 0)
    assert not np.array_equal(positions.action(16, origin, 10.0, SPEC, start), want)
