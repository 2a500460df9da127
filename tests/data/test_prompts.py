"""The texts of a generation: diffusers' convention against diffusers, the framework's against what it writes."""

import hashlib
import itertools
import json
import types

import pytest
from data import diffusers_oracle as oracle

from data_pipelines import action_prompt, prompts
from data_pipelines.action_prompt import Scene
from data_pipelines.prompts import Metadata, build

CLIP = dict(frames=189, fps=24, height=720, width=1280)
LONG = "The video is 7.9 seconds long and is of 24 FPS. This video is of 720x1280 resolution."
PROMPTS = ("", "A red cube slides to the left...", 'Ein Würfel · "赤い"', '{"b": "é", "fps": 3}', " spaces . ")
NEGATIVES = (None, "", "blurry.", '{"x": 1}')
GEOMETRY = ((189, 24.0, 720, 1280), (1, 24.0, 640, 640), (25, 12.5, 192, 320), (121, 29.97, 544, 736))


def framework(prompt, negative=None, task="text2video", **change):
    return build("framework", task, prompt, negative, **{**CLIP, "aspect": "16,9", **change})


# diffusers' convention


def diffusers_cases():
    """(what diffusers tokenises, our texts) for every prompt, negative prompt, size and system setting."""
    pipes = {default: oracle.pipeline(default) for default in (True, False)}
    for prompt, negative, (frames, fps, h, w), default, asked in itertools.product(
        PROMPTS, NEGATIVES, GEOMETRY, (True, False), (None, True, False)
    ):
        geometry = dict(height=h, width=w, fps=fps)
        theirs = pipes[default].tokenize_prompt(
            prompt, negative, num_frames=frames, use_system_prompt=asked, **geometry
        )
        ours = build(
            "diffusers", "text2image" if frames == 1 else "image2video", prompt, negative, frames=frames, aspect="1,1",
            use_system_prompt=asked, default_system_prompt=default, **geometry,
        )  # fmt: skip
        yield theirs, ours


def test_ids_equal_diffusers():
    for theirs, ours in diffusers_cases():
        assert oracle.ids(ours) == theirs, ours


@pytest.mark.parametrize("view", [*action_prompt.FRAMING, None])
def test_action_ids_equal_diffusers(view):
    pipe = oracle.pipeline()
    clips = ((17, 5.0, 480, 832), (61, 10.0, 544, 736), (16, 10.0, 256, 256), (33, 15.0, 720, 1280), (9, 3.0, 320, 192))
    for prompt, negative, (frames, fps, h, w) in itertools.product(PROMPTS, NEGATIVES, clips):
        theirs = pipe.tokenize_prompt(
            prompt, negative, num_frames=frames, height=h, width=w, fps=fps, action_mode="policy",
            action_view_point=view,
        )  # fmt: skip
        ours = build(
            "diffusers", "policy", prompt, negative, frames=frames, fps=fps, height=h, width=w, view_point=view
        )
        assert oracle.ids(ours) == theirs, ours


@pytest.mark.parametrize("asked", [True, False])
def test_transfer_distilled_and_action_steps_equal_diffusers_modular(asked):
    for prompt, negative in itertools.product(PROMPTS, NEGATIVES):
        theirs = oracle.modular(
            "Cosmos3TransferTextStep", prompt=prompt, negative_prompt=negative, use_system_prompt=asked
        )
        ours = build(
            "diffusers", "transfer", prompt, negative, **CLIP, controls=("edge",),
            use_system_prompt=None if asked else False,
            default_system_prompt=False,  # of model_index.json: transfer does not look at it
        )  # fmt: skip
        assert oracle.ids(ours) == theirs
        sizes = dict(fps=24.0, height=720, width=1280, use_system_prompt=asked)
        theirs = oracle.modular("Cosmos3DistilledTextEncoderStep", prompt=prompt, num_frames=189, **sizes)
        ours = build("diffusers", "text2video", prompt, negative, frames=189, distilled=True, **sizes)
        assert oracle.ids(ours) == theirs


@pytest.mark.parametrize(
    "fault",
    ["no system turn", "video system for images", "same for inverse", "period kept", "no duration", "aspect order"],
)
def test_the_comparison_with_diffusers_can_fail(fault, monkeypatch):
    right = prompts._templates
    if fault == "no system turn":
        monkeypatch.setattr(prompts, "_system", lambda *_: None)
    elif fault == "video system for images":
        monkeypatch.setattr(prompts, "SYSTEM_IMAGE", prompts.SYSTEM_VIDEO)
    elif fault == "same for inverse":
        monkeypatch.setattr(prompts, "_templates", lambda *a: (*right(*a)[:2], *right(*a)[:2]))
    elif fault == "period kept":
        monkeypatch.setattr(prompts, "_diffusers", lambda p, n, *a: (f"{p}. {LONG}", f"{n}. {LONG}"))
    elif fault == "no duration":
        monkeypatch.setattr(prompts, "_templates", lambda *a: ("", *right(*a)[1:]))
    else:
        monkeypatch.setattr(action_prompt.canvas, "closest_aspect", lambda *_: "16,9")
        with pytest.raises(AssertionError):
            test_action_ids_equal_diffusers("ego_view")
        return
    with pytest.raises(AssertionError):
        test_ids_equal_diffusers()


# the framework's convention


def test_framework_appends_sentences_to_plain_prompts():
    p = framework("  A cube slides... ", "Grainy. ")
    assert p == (None, f"A cube slides. {LONG}", f"Grainy. {LONG}")
    p = framework("A cube.", "", "text2image", frames=1, height=640, width=640, aspect="1,1")
    assert p == (None, "A cube. This image is of 640x640 resolution.", "This image is of 640x640 resolution.")
    assert framework('["a", 1]').positive.startswith('["a", 1]. The video')  # only objects are captions
    assert framework("x", frames=1).positive == "x. This video is of 720x1280 resolution."  # one frame of a clip task
    assert framework("x", fps=12.5).positive.startswith("x. The video is 15.1 seconds long and is of 12 FPS.")


def test_framework_injects_fields_into_json_prompts():
    given = '\n{"subject": "Würfel", "fps": 3, "aspect_ratio": "1,1", "lens": [1.50, null]} '
    p = framework(given, aspect="16,9")
    assert p.positive == (
        '{"subject": "W\\u00fcrfel", "fps": 24.0, "aspect_ratio": "16,9", "lens": [1.5, null], "duration": "7s", '
        '"resolution": {"H": 720, "W": 1280}}'
    )
    image = framework(given, task="text2image", frames=1, height=960, width=960, aspect=None)
    assert image.positive == (
        '{"subject": "W\\u00fcrfel", "aspect_ratio": "1,1", "lens": [1.5, null], "resolution": {"H": 960, "W": 960}}'
    )


def test_framework_negative_prompts():
    official = json.dumps(json.loads((prompts.OFFICIAL / "neg_prompts.json").read_text()))
    assert framework("x").negative == f"{official}. {LONG}"
    assert framework("x", "").negative == LONG  # an empty one is not the default
    for task in (*prompts.IMAGES, *prompts.ACTIONS):
        assert prompts.default_negative(task) == ""
    denied = "The video is not 7.9 seconds long and is not of 24 FPS. This video is not of 720x1280 resolution."
    assert framework("x", "bad", metadata=Metadata(negative_metadata_mode="inverse")).negative == f"bad. {denied}"
    still = framework("x", "", "text2image", frames=1, metadata=Metadata(negative_metadata_mode="inverse"))
    assert still.negative.startswith("The video is not 0.0 seconds long")  # images are not spared the denied duration
    assert framework("x", "bad", metadata=Metadata(negative_metadata_mode="none")).negative == f"bad. {LONG}"
    plain = Metadata(negative_metadata_mode="none", negative_prompt_keep_metadata=False)
    assert framework("x", " bad. ", metadata=plain).negative == " bad. "
    own = Metadata(duration_template="{duration:.0f}s at {fps}", resolution_template="{width}:{height}")
    assert framework("x.", "y", metadata=own)[1:] == ("x. 8s at 24. 1280:720", "y. 8s at 24. 1280:720")


def test_framework_system_turns():
    assert framework("x").system is None
    for task in ("text2video", "text2image"):  # its inference asks for the image sentence whatever it makes
        assert framework("x", task=task, use_system_prompt=True).system == prompts.SYSTEM_IMAGE
    edit = framework("x", task="image2image", frames=1, aspect=None)
    assert edit.system.endswith("edit images based on the user's instructions.")
    assert framework("x", task="transfer", controls=("seg",)).system.startswith("You are a helpful assistant that gen")
    assert framework("x", task="transfer", controls=("seg",), use_system_prompt=False).system is None


def test_framework_transfer_prompts_name_their_controls():
    p = framework('{"a": 1}', "", "transfer", frames=93, fps=29.97, controls=("edge", "depth"))
    head = '{"a": 1, "duration": "3s", "fps": 30.0, "resolution": {"H": 720, "W": 1280}, "aspect_ratio": "16,9"}'
    assert p.positive.startswith(f"{head} Follow the edge, depth control video precisely: shape, contour,")
    assert p.positive.endswith("must align with the edge, depth signal at every frame.")
    assert p.negative == "The video is 3.1 seconds long and is of 30 FPS. This video is of 720x1280 resolution."
    assert framework('{"a": 1}', task="transfer", frames=93, controls=("edge",), emphasize=False).positive[-1] == "}"


def test_framework_action_captions():
    def say(text, **change):
        scene = dict(frames=17, fps=5, height=544, width=736, view_point="wrist_view") | change
        return build("framework", "policy", text, "ignored", **scene)

    assert say(" Öffne die Tür ") == (
        None,
        '{"cinematography": {"framing": "This video is captured from a wrist-mounted camera."}, "actions": [{"time": '
        '"0:00-0:03", "description": "\\u00d6ffne die T\\u00fcr."}], "duration": "3s", "fps": 5.0, "resolution": '
        '{"H": 544, "W": 736}, "aspect_ratio": "4,3"}',
        "",
    )
    assert say("  ").positive == ""
    assert '"description": "Open?"' in say("Open?").positive
    assert "cinematography" not in say("Go", view_point=None).positive
    assert '"0:00-1:06"' in say("Go", frames=661, fps=10).positive  # 66.1 s
    assert '"0:00-0:02"' in say("Go", frames=25, fps=10).positive  # 2.5 s: half to even
    assert '"aspect_ratio": "2,3"' in say("Go", height=768, width=512).positive
    assert '"aspect_ratio": "25,28"' in say("Go", height=112, width=100).positive
    idle = action_prompt.caption("framework", "Go", Scene(17, 5, 256, 256, "concat_view", "Left is left. ", 3))
    assert json.loads(idle)["actions"] == [{"time": "0:00-0:03", "description": "Go.", "idle_frame": "3 out of 16."}]
    assert json.loads(idle)["cinematography"]["framing"].endswith("perspectives. Left is left.")


@pytest.mark.parametrize("fault", ["not escaped", "keys sorted", "fields first", "float duration"])
def test_the_framework_expectations_can_fail(fault, monkeypatch):
    dumps = {
        "not escaped": lambda x: json.dumps(x, ensure_ascii=False),
        "keys sorted": lambda x: json.dumps(x, sort_keys=True),
        "fields first": lambda x: json.dumps({"fps": 0, "duration": 0, **x}),
        "float duration": lambda x: json.dumps(x | {"duration": "7.9s"}),
    }[fault]
    monkeypatch.setattr(prompts, "json", types.SimpleNamespace(loads=json.loads, dumps=dumps))
    with pytest.raises(AssertionError):
        test_framework_injects_fields_into_json_prompts()


def test_the_official_negative_prompt_is_unchanged_and_licensed():
    digest = {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in prompts.OFFICIAL.iterdir()}
    assert digest["neg_prompts.json"] == "5ef32d9dcedfd509"
    assert "OpenMDW License Agreement, version 1.1" in (prompts.OFFICIAL / "LICENSE").read_text()


# refusals


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(convention="difusers"), "convention 'difusers' is not known"),
        (dict(fps=0), "fps=0 must be positive"),
        (dict(task="image2image", convention="diffusers"), "cannot edit images"),
        (dict(task="transfer"), "needs the names of its controls"),
        (dict(task="policy", view_point="ego_vew"), "did you mean 'ego_view'"),
        (dict(metadata=Metadata(negative_metadata_mode="some")), "'some' is not known"),
        (dict(metadata=Metadata(duration_template="{seconds}")), "cannot be filled"),
        (dict(metadata=Metadata(duration_template="{fps:999999999.0f}")), "cannot be filled"),
        (dict(metadata=Metadata(resolution_template="{height")), "cannot be filled"),
        (dict(prompt="[" * 100_000), "nested too deeply"),
    ],
)
def test_bad_requests_are_one_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        build(**{"convention": "framework", "task": "text2video", "prompt": "x", **CLIP, **change})
