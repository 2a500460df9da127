"""Every mode of the generator beside the toy's own: positions and masks as the reference lays them out."""

import dataclasses

import numpy as np
import pytest
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_vae_tokens

from data_pipelines.packing import check_fits, context_tokens, fill, one_per_row, plan, tight_bucket, unpack
from data_pipelines.sample import Sample, validate
from data_pipelines.schema import MODALITIES, SequenceSpec
from data_pipelines.tokenizer import ChatTokenizer

SPEC = SequenceSpec(latent_channels=3, patch=2, action_dim=6, sound_dim=5)
TOK = ChatTokenizer()
RNG = np.random.RandomState(0)
FPS = 10.0


def latents(t: int, h: int = 5, w: int = 4) -> np.ndarray:
    return RNG.standard_normal((3, t, h, w)).astype(np.float32)


def make(task: str, **fields) -> Sample:
    defaults: dict = dict(prompt="a red puck", sample_id=7, vision_latents=latents(3), fps=FPS)
    return Sample(task, **defaults | fields)


def planned(s: Sample):
    return plan(s, TOK, SPEC)


def reference(origin: float, t: int, h: int, w: int, **kw):
    """Ids of one vision item and where the next one starts."""
    ids, after = get_3d_mrope_ids_vae_tokens(t, -(-h // 2), -(-w // 2), origin, True, FPS, 24.0, **kw)
    return ids.float().numpy(), after


def test_controls_share_the_positions_of_their_target():
    s = make("transfer", context=(latents(3), latents(3)), clean_frames=(0,))
    p = planned(s)
    want, _ = reference(len(p.ids) + 15000, 3, 5, 4, temporal_compression_factor=4)
    np.testing.assert_array_equal(p.gen_positions, np.tile(want, 3))
    noisy = p.noisy["vision"].reshape(3, 3, -1)  # item, frame, patch
    assert not noisy[:2].any() and not noisy[2, 0].any() and noisy[2, 1:].all()
    assert p.items == {"vision": 3} and p.controls == 0


def test_a_source_image_comes_before_the_edited_one():
    s = make("image2image", context=(latents(1, 6, 9),), vision_latents=latents(1, 5, 4), prompt="make it blue")
    p = planned(s)
    first, after = reference(len(p.ids) + 15000, 1, 6, 9, temporal_compression_factor=4)
    second, _ = reference(after, 1, 5, 4, temporal_compression_factor=4)
    np.testing.assert_array_equal(p.gen_positions, np.concatenate([first, second], 1))
    assert p.noisy["vision"].tolist() == [False] * first.shape[1] + [True] * second.shape[1]


@pytest.mark.parametrize(("frames", "clean"), [((0,), 1), ((), 0), ((0, 1, 2, 4), 4), ((4,), 1)])
def test_clean_frames_replace_those_of_the_task(frames, clean):
    p = planned(make("video2video", vision_latents=latents(5), clean_frames=frames))
    noisy = p.noisy["vision"].reshape(5, -1)
    assert [k for k in range(5) if not noisy[k].any()] == list(frames) and (~noisy).all(1).sum() == clean


def test_sound_to_video_and_back():
    sound = RNG.standard_normal((5, 20)).astype(np.float32)
    p = planned(make("sound2video", sound_latents=sound, clean_frames=(0,)))
    assert not p.noisy["sound"].any() and not p.noisy["vision"][:6].any() and p.noisy["vision"][6:].all()
    p = planned(make("sound2video", sound_latents=sound, clean_frames=(), clean_sound=19))
    assert p.noisy["sound"].tolist() == [False] * 19 + [True]
    p = planned(make("video2sound", sound_latents=sound))
    assert p.noisy["sound"].all() and not p.noisy["vision"].any()


@pytest.mark.parametrize(("history", "state"), [(0, False), (0, True), (2, False), (3, True)])
@pytest.mark.parametrize("task", ["policy", "inverse_dynamics", "forward_dynamics"])
def test_action_rows_of_the_past(task, history, state):
    """The plan cases of spec model.md §4.2: A = V − 1 and A = V rows after h of history."""
    steps, clean, start = 8, history + state, 1 - history - state
    rows = RNG.uniform(-1, 1, (steps + clean, 4)).astype(np.float32)
    p = planned(make(task, actions=rows, clean_actions=clean, action_start=start))
    vision = p.size["vision"]
    want, _ = get_3d_mrope_ids_vae_tokens(
        len(rows), 1, 1, len(p.ids) + 15000, True, FPS, 24.0, temporal_compression_factor=1,
        base_temporal_compression_factor=4, start_frame_offset=start,
    )  # fmt: skip
    np.testing.assert_array_equal(p.gen_positions[:, vision:], want.float().numpy())
    noisy = [] if task == "forward_dynamics" else list(range(clean, len(rows)))
    assert np.flatnonzero(p.noisy["action"]).tolist() == noisy


def test_a_system_turn_comes_first():
    with_it, without = TOK.generation_ids("b", "be kind"), TOK.generation_ids("b")
    text = TOK.decode(with_it)
    assert text.startswith("system\nbe kind") and with_it[-len(without) :] == without
    assert planned(make("text2video", system="be kind")).ids.tolist() == TOK.generation_ids("a red puck", "be kind")


def test_the_target_comes_back_and_each_item_has_its_own_weight():
    """Two samples in one row: odd sizes, several items; every real element of an item weighs the same, and they sum
    to one per item."""
    edit = make("image2image", context=(latents(1, 6, 9),), vision_latents=latents(1, 5, 3), prompt="blue")
    samples = [make("transfer", context=(latents(3),)), edit]
    p = [planned(s) for s in samples]
    need = tight_bucket(p, 1)
    bucket = dataclasses.replace(need, segments=2, und=2 * need.und, gen=2 * need.gen, vision=2 * need.vision)
    b = fill([p], bucket, SPEC)
    assert b["segment_items"][0, :, 0].tolist() == [2, 2] and b["control_weight"].shape[1] == 0
    context = context_tokens([p], bucket)[0]
    assert context.tolist() == [True] * 18 + [False] * 18 + [True] * 15 + [False] * (len(context) - 51)
    at = 0
    for n, s in enumerate(samples):
        back = unpack({m: b[f"{m}_x0"] for m in MODALITIES}, b, 0, n, s, SPEC)
        np.testing.assert_array_equal(back["vision"], s.vision_latents)
        for x in (*s.context, s.vision_latents):
            _, t, h, w = x.shape
            tokens = slice(at, at + t * -(-h // 2) * -(-w // 2))
            at = tokens.stop
            np.testing.assert_allclose(b["vision_weight"][0, tokens], 1 / x.size, rtol=1e-6)
            assert b["vision_extent"][0, tokens].prod(-1).sum() * 3 == x.size
        own = b["vision_segment_ids"][0] == n
        assert b["vision_token_ids"][0][own].tolist() == list(range(own.sum()))


def test_weighted_controls_each_have_an_attention():
    c = latents(1, 4, 4)
    s = make("transfer", context=(c, c), vision_latents=c, weights=(1.0, 3.0))
    b = one_per_row([planned(s), planned(make("text2image", vision_latents=c))], SPEC)
    assert b["control_weight"].shape[:2] == (2, 2)
    n = 4
    np.testing.assert_allclose(b["control_weight"][0, 0, : 3 * n], [1] * n + [0] * n + [0.25] * n)
    np.testing.assert_allclose(b["control_weight"][0, 1, : 3 * n], [0] * n + [1] * n + [0.75] * n)
    assert b["control_weight"][1, 0, :n].tolist() == [1] * n and not b["control_weight"][1, 1].any()
    assert not b["control_weight"][:, :, 3 * n :].any()
    assert planned(dataclasses.replace(s, context=(c,), weights=(5.0,))).controls == 0
    with pytest.raises(ValueError, match="data.bucket.controls is 0"):
        room = dataclasses.replace(tight_bucket([planned(s)], 1), controls=0)
        check_fits(planned(s), room)


@pytest.mark.parametrize(
    ("task", "fields", "words"),
    [
        ("text2video", dict(context=(latents(3),)), "takes no context"),
        ("image2image", dict(vision_latents=latents(1)), "edits one image"),
        ("image2image", dict(vision_latents=latents(1), context=(latents(1), latents(1))), "edits one image"),
        ("transfer", dict(), "at least one control"),
        ("transfer", dict(context=(latents(3), latents(2))), "must be the same"),
        ("transfer", dict(context=(latents(3) * np.nan,)), "NaN"),
        ("transfer", dict(context=(latents(3),), weights=(1.0, 2.0)), "2 weights, but 1 controls"),
        ("transfer", dict(context=(latents(3),) * 2, weights=(1.0, -1.0)), "must not be negative"),
        ("transfer", dict(context=(latents(3),) * 2, weights=(0.0, 0.0)), "one of them must be positive"),
        ("text2video", dict(weights=(1.0,)), "1 weights, but 0 controls"),
        ("video2video", dict(clean_frames=(3,)), "latent frames 0 … 2"),
        ("video2video", dict(clean_frames=(1, 0)), "in order"),
        ("video2video", dict(clean_frames=(0, 0)), "each once"),
        ("video2video", dict(clean_frames=(0, 1, 2)), "nothing is left to make"),
        ("sound2video", dict(), "needs sound"),
        ("text2video_sound", dict(clean_sound=1), "clean_sound=1 is for sound2video"),
        ("policy", dict(actions=np.zeros((9, 4))), "9 action rows, but 9 frames have 8 steps"),
        ("policy", dict(actions=np.zeros((8, 4)), action_start=0, clean_actions=1), "action_start=0 puts 1 before"),
        ("policy", dict(actions=np.zeros((9, 4)), action_start=0), "clean_actions=0 of 9 rows; give 1 … 8"),
        ("policy", dict(actions=np.zeros((7, 4)), action_start=2), "leaves the first step without a row"),
        ("policy", dict(actions=np.zeros((8, 4)), clean_actions=8), "give 0 … 7"),
        ("text2video", dict(clean_actions=1), "has no actions"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(task, fields, words):
    with pytest.raises(ValueError, match=words) as e:
        validate(make(task, **fields), SPEC)
    assert "\n" not in str(e.value) and task in str(e.value)


@pytest.mark.parametrize(
    ("fields", "words"), [(dict(system="be kind"), "into `turns`"), (dict(weights=(1.0,)), "nothing")]
)
def test_a_question_takes_nothing_that_is_for_generation(fields, words):
    with pytest.raises(ValueError, match=words):
        validate(Sample("reason", "what is it?", **fields), SPEC)
