"""Sizes of generations: the published table, nearest shapes as diffusers chooses, the framework's rules by hand."""

import json

import numpy as np
import pytest
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as released
from diffusers.video_processor import VideoProcessor

from data_pipelines import canvas

SHAPES = [tuple(int(n) for n in s) for s in np.random.default_rng(0).integers(16, 2200, (400, 2))]


def test_sizes_are_the_published_table():
    assert canvas.size("256", "16,9", 189) == (192, 320)
    assert canvas.size("480", "4,3") == (544, 736)
    assert canvas.size("704", "9,16") == (1280, 704)
    assert canvas.size(720, "3,4", 121) == (1104, 832)
    assert canvas.size("768", "16,9") == (768, 1360)
    for tier, aspect in ((t, a) for t in canvas.RESOLUTIONS for a in canvas.ASPECTS):
        h, w = canvas.size(tier, aspect)
        assert h % canvas.SPATIAL == w % canvas.SPATIAL == 0
        assert canvas.size(tier, ",".join(reversed(aspect.split(",")))) == (w, h)
        assert canvas.closest_aspect(h, w) == canvas.named_aspect(h, w) == aspect


@pytest.mark.parametrize(
    "asked, words",
    [
        (("1080", "16,9", 1), "'1080' is not a tier; the tiers are 256, 480, 704, 720, 768"),
        (("480", "16:9", 1), "did you mean '16,9'"),
        (("480", "2,3", 1), "it is width,height"),
        (("480", "1,1", 0), "at least one frame"),
    ],
)
def test_other_sizes_are_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        canvas.size(*asked)


def test_action_canvases_equal_diffusers():
    for tier, bins in released._ACTION_RESOLUTION_BINS.items():
        for h, w in SHAPES:
            assert canvas.action_canvas(h, w, tier, "diffusers") == VideoProcessor.classify_height_width_bin(h, w, bins)
    with pytest.raises(ValueError, match="768 is not a tier"):
        canvas.action_canvas(100, 100, 768, "diffusers")


def test_the_framework_has_one_canvas_more():
    assert canvas.action_canvas(1080, 720, 480) == (768, 512)
    assert canvas.action_canvas(1080, 720, 480, "diffusers") == (736, 544)
    assert canvas.action_canvas(1080, 720, 720) == (1104, 832)
    assert canvas.action_canvas(540, 640, 480) == (544, 736)  # two half-size views under the wrist's: DROID
    assert canvas.action_canvas(1, 1, 768) == (1024, 1024)


def test_closest_aspects_equal_diffusers():
    say = released.Cosmos3OmniPipeline._build_action_json_prompt
    for h, w in SHAPES:
        theirs = json.loads(say("x", view_point=None, num_frames=2, fps=1, height=h, width=w))["aspect_ratio"]
        assert canvas.closest_aspect(h, w) == theirs


def test_frames_round_up_and_edits_round_down():
    assert [canvas.frames_up(n) for n in (1, 2, 5, 6, 189, 190)] == [1, 5, 5, 9, 189, 193]
    assert canvas.edit_size(720, 1280) == (288, 512)
    assert canvas.edit_size(300, 200) == (512, 320)  # 341 → 320
    assert canvas.edit_size(2000, 20) == (512, 32)  # never less than one multiple
    assert canvas.edit_size(100, 100) == (512, 512)  # enlarged too
    assert canvas.latent_crop(185, 320) == (11, 20)
    assert canvas.latent_crop(480, 5) == (30, 1)
