"""A request file becomes a request with nothing left open, or one sentence."""

import dataclasses
import hashlib
import json
import pathlib
import re

import pytest

from data_pipelines import request_fuzz
from data_pipelines.request_fields import HINTS, IGNORED, KEYS, REFUSED
from data_pipelines.request_file import read
from data_pipelines.request_resolve import FAMILIES, Facts, resolve
from data_pipelines.request_values import RequestError

NANO, EDGE = FAMILIES["nano"], FAMILIES["edge"]
DISTILLED = Facts("Four", resolution="768", tiers=("768",), sound=False, action_dim=0, steps=4)
T = request_fuzz.TEMPLATES
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """good/ and bad/ media files; requests are written beside them."""
    root = tmp_path_factory.mktemp("requests")
    request_fuzz.write_media(root)
    return root


def ask(folder, said, facts=NANO, media=None, convention="framework", **replace):
    path = folder / "ask.json"
    path.write_text(said if isinstance(said, str) else json.dumps(said))
    (request,) = read(path, media, replace)
    return resolve(request, facts, convention)


def refusal(folder, said, facts=NANO, **kw) -> str:
    with pytest.raises(RequestError) as e:
        ask(folder, said, facts, **kw)
    words = str(e.value)
    assert words.startswith(f"{folder}/ask.json") and words.endswith(".") and "\n" not in words
    return words.removeprefix(f"{folder}/ask.json").removeprefix(": ")


def plain(template: str) -> dict:
    """A template without what it sets beyond what its mode needs."""
    extra = "seed num_steps resolution num_frames aspect_ratio height width guidance fps image_size".split()
    return {k: x for k, x in T[template].items() if k not in extra}


# steps, guidance, shift, frames, fps, height, width of Nano; frames, height, width of Edge (spec training.md §4.2)
DEFAULTS = {
    "t2i": ("text2image", 50, 4.0, 3.0, 1, 24, 960, 960, (1, 640, 640)),
    "t2v": ("text2video", 35, 6.0, 10.0, 189, 24, 720, 1280, (121, 480, 832)),
    "t2vs": ("text2video_sound", 35, 6.0, 10.0, 189, 24, 720, 1280, None),
    "i2v": ("image2video", 35, 6.0, 10.0, 189, 24, 720, 1280, (121, 480, 832)),
    "v2v": ("video2video", 35, 6.0, 10.0, 189, 24, 720, 1280, (121, 480, 832)),
    "s2v": ("sound2video", 35, 6.0, 10.0, 189, 24, 720, 1280, None),
    "v2s": ("video2sound", 35, 6.0, 10.0, 25, 24, 720, 1280, None),
    "i2i": ("image2image", 35, 6.0, 5.0, 1, 24, 384, 512, (1, 384, 512)),
    "fd": ("forward_dynamics", 30, 1.0, 10.0, 17, 24, 256, 320, (17, 256, 320)),
    "id": ("inverse_dynamics", 30, 1.0, 10.0, 17, 24, 256, 320, (17, 256, 320)),
    "wam": ("policy", 30, 1.0, 10.0, 17, 24, 256, 320, (17, 256, 320)),
}


@pytest.mark.parametrize("template", DEFAULTS)
def test_defaults_of_every_mode(folder, template):
    task, steps, guidance, shift, frames, fps, height, width, edge = DEFAULTS[template]
    r = ask(folder, plain(template))
    got = (r.task, r.request.num_steps, r.request.guidance, r.request.shift, r.frames, r.fps, r.height, r.width)
    assert got == (task, steps, guidance, shift, frames, fps, height, width)
    assert {"num_steps", "guidance", "shift", "seed", "fps"} <= set(r.defaults)
    assert r.sound == (template in ("t2vs", "s2v", "v2s"))
    assert r.request.video_save_quality == 10 and r.request.image_save_quality == 95
    assert r.request.normalize_cfg is False and r.seeds == (r.request.seed,) + (r.request.seed + 1,) * (
        template == "t2vs"
    )
    if edge is None:
        assert "Cosmos3-Edge has none" in refusal(folder, plain(template), EDGE)
    else:
        small = ask(folder, plain(template), EDGE)
        assert (small.frames, small.height, small.width) == edge


def test_clean_frames_of_every_mode(folder):
    clean = {t: ask(folder, T[t]).clean_frames for t in ("t2v", "i2v", "v2v", "i2i", "fd", "id", "wam", "s2v", "v2s")}
    assert clean == {
        "t2v": (), "i2v": (0,), "v2v": (0, 1), "i2i": (), "fd": (0,), "id": (0, 1, 2, 3, 4), "wam": (0,), "s2v": (0,),
        "v2s": (0, 1, 2, 3, 4, 5, 6),
    }  # fmt: skip
    assert ask(folder, T["v2v"] | {"condition_frame_indexes_vision": [2, 0]}).clean_frames == (0, 2)


def test_what_is_said_wins_and_is_no_default(folder):
    said = {"num_steps": 7, "guidance": 2, "shift": 4.5, "fps": 12, "num_frames": 29, "seed": 11, "resolution": "256"}
    r = ask(folder, T["i2v"] | said)
    assert {k: getattr(r.request, k) for k in said} == said
    assert not set(said) & set(r.defaults) and (r.height, r.width) == (192, 320)
    r = ask(folder, T["i2v"] | {"height": 64, "width": 48})
    assert (r.height, r.width, r.request.aspect_ratio) == (64, 48, "3,4")


def test_frames_are_rounded_up_and_the_note_says_so(folder):
    r = ask(folder, T["i2v"] | {"num_frames": 30})
    assert r.frames == r.request.num_frames == 33
    assert "num_frames 30 is rounded up to 33 (1 + 4k)" in r.notes
    assert ask(folder, T["i2v"] | {"num_frames": 33}).notes == ()


def test_the_task_is_inferred_as_the_framework_does(folder):
    image, video = {"vision_path": "good/picture.png"}, {"vision_path": "good/clip.mp4"}
    for said, task in (
        ({}, "text2video"), ({"num_frames": 1}, "text2image"), (image, "image2video"), (video, "video2video"),
        (image | {"num_frames": 1}, "image2image"), ({"enable_sound": True}, "text2video_sound"),
        (video | {"edge": {}}, "transfer"), ({"images": ["good/picture.png"]}, "reason"),
        ({"sound_path": "good/sound.wav"}, "sound2video"),
        ({"model_mode": "policy", "domain_name": "av"} | image, "policy"),
    ):  # fmt: skip
        assert ask(folder, {"prompt": "a"} | said).task == task, said
    assert "num_frames is 1" in refusal(folder, {"prompt": "a", "num_frames": 1} | video)


def test_transfer_numbers_per_control(folder):
    want = {"edge": (3, 1.5, 93, 24), "blur": (3, 1.5, 93, 24), "depth": (3, 1.5, 93, 24), "seg": (3, 2, 93, 24)}
    for hint in HINTS:
        r = ask(folder, {"prompt": "a", hint: {"control_path": "good/clip.mp4"}})
        q = r.request
        got = (q.guidance, q.control_guidance, q.num_video_frames_per_chunk, q.fps)
        assert got == want.get(hint, (1, 3, 101, 10)) and r.frames == 25 and (q.num_steps, q.shift) == (35, 10)
        assert (q.num_conditional_frames, q.max_frames, q.emphasize_control_in_prompt) == (1, 5000, True)
    two = ask(folder, T["transfer"])
    assert (two.request.guidance, two.request.control_guidance, two.fps) == (6, 1, 12)  # as fast as vision_path
    assert two.request.hints["edge"].weight == 0.5 and two.request.hints["blur"].preset == "medium"
    assert two.request.prompt == "a street"
    assert ask(folder, T["depth"] | {"max_frames": 10}).frames == 10


def test_reasoner_messages_and_decoding(folder):
    r = ask(folder, T["images"])
    parts = r.messages[0]["content"]
    assert [p["type"] for p in parts] == ["image", "image", "text"] and parts[0]["image"] == folder / "good/picture.png"
    assert r.decoding == {
        "temperature": 1.0, "top_k": 5, "top_p": 1.0, "max_new_tokens": 1024, "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
    }  # fmt: skip
    assert (r.frames, r.height, r.sound, r.request.video_fps) == (0, 0, False, 2.0)
    assert (
        ask(folder, T["ask"]).decoding["temperature"] == 0 and ask(folder, T["ask"]).decoding["presence_penalty"] == 1
    )
    turns = ask(folder, T["turns"]).messages
    assert turns[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert turns[1]["content"][0] == {"type": "image", "image": folder / "good/picture.png"}


def test_distilled_checkpoints_take_their_own_schedule(folder):
    r = ask(folder, T["t2i"] | {"num_steps": 4, "guidance": 1}, DISTILLED)
    assert (r.request.num_steps, r.request.guidance, r.request.shift) == (4, 1.0, None)
    plain = ask(folder, {"prompt": "a", "model_mode": "text2image"}, DISTILLED)
    assert (plain.request.num_steps, plain.request.guidance, plain.height) == (4, 1.0, 1024)
    for key, value in {"num_steps": 35, "guidance": 4, "shift": 3, "guidance_interval": [0, 9]}.items():
        assert "distilled" in refusal(folder, {"prompt": "a", "model_mode": "text2image", key: value}, DISTILLED)


def test_media_beside_the_request_in_the_media_folder_or_from_the_command_line(folder, tmp_path, monkeypatch):
    far = tmp_path / "deep" / "down"
    far.mkdir(parents=True)
    (far / "picture.png").write_bytes((folder / "good/picture.png").read_bytes())
    assert ask(folder, T["url"], media=tmp_path).request.path("vision_path") == far / "picture.png"
    words = refusal(folder, T["url"])
    assert "download picture.png and give its folder as --media, or give --image or --video" in words
    assert "nowhere below" in refusal(folder, T["url"], media=folder / "bad")
    (tmp_path / "picture.png").write_bytes(b"other")
    assert "different files of that name" in refusal(folder, T["url"], media=tmp_path)
    monkeypatch.chdir(tmp_path)
    assert ask(folder, T["url"], vision_path="deep/down/picture.png").request.path("vision_path") == far / "picture.png"
    assert "paths start where you are" in refusal(folder, T["url"], vision_path="gone.png")
    assert ask(folder, T["transfer"], prompt="another street").request.prompt == "another street"


def test_actions_that_are_made_are_not_looked_for(folder):
    assert ask(folder, T["id"]).notes == ("action_path is not read: inverse_dynamics makes the actions",)
    assert "does not exist" in refusal(folder, T["fd"] | {"action_path": "nowhere.json"})


def test_batches_and_names(folder):
    path = folder / "many.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in (T["t2i"], T["t2v"] | {"name": "mine"}, T["ask"])) + "\n\n")
    assert [r.name for r in read(path)] == ["many_0", "mine", "many_2"]
    assert [r.where for r in read(path)] == [f"{path}, line {i}" for i in (1, 2, 3)]
    path.write_text(json.dumps(T["t2i"]) + "\n" + '{"prompt": "a", "seed": -1}')
    with pytest.raises(RequestError, match=re.escape(f"{path}, line 2: seed is -1, not a whole number from 0 to")):
        read(path)
    path.write_text("\n".join([json.dumps(T["t2i"] | {"name": "twin"})] * 2))
    with pytest.raises(RequestError, match='line 2: name "twin" is taken'):
        read(path)
    bom = folder / "bom.json"
    bom.write_bytes(b"\xef\xbb\xbf" + json.dumps(T["t2i"]).encode())
    assert [r.name for r in read(bom)] == ["bom"]


def test_warnings_are_the_frameworks(folder):
    warn = {"fps": 60, "num_frames": 13, "resolution": "720"}
    words = " | ".join(ask(folder, T["t2v"] | warn, EDGE).warnings)
    assert "fps 60: the models know 10 to 30" in words and "num_frames 13: the models know 24 to 200" in words
    assert "resolution 720: Cosmos3-Edge has learnt 256, 480" in words
    assert ask(folder, T["t2v"]).warnings == ()
    assert "runs at 12 frames" in ask(folder, plain("v2v")).warnings[0]
    assert "does nothing at guidance 1" in ask(folder, T["i2vs"] | {"guidance": 1}).warnings[0]


def test_the_record_holds_every_value_and_what_was_not_asked(folder):
    record = json.loads(json.dumps(ask(folder, T["url"], media=folder / "good").record()))
    assert record["guidance"] == 6.0 and "guidance" in record["defaults"] and record["extra"] == {"psnr": 14.0}
    picture = folder / "good/picture.png"
    sha256 = hashlib.sha256(picture.read_bytes()).hexdigest()
    assert record["media"] == {"vision_path": {"path": str(picture), "sha256": sha256}}


SENTENCES = [
    ("t2v", {"guidence": 3}, "\"guidence\" is not a key of a request (did you mean 'guidance'?)"),
    ("t2v", {"num_inference_steps": 3}, "(did you mean 'num_steps'?)"),
    ("t2v", {"guidance": "high"}, 'guidance is "high", not a number from 0 up to 7; change it or leave it out.'),
    ("t2v", {"num_steps": True}, "num_steps is true, not a whole number from 1 to 1000"),
    ("t2v", {"seed": 1e300}, "seed is 1e+300, not a whole number"),
    ("t2v", {"resolution": 480}, 'resolution is 480, not one of "256", "480"'),
    ("t2v", {"aspect_ratio": "16:9"}, "(did you mean '16,9'?)"),
    ("t2v", {"guidance_interval": [900, 100]}, "not [lo, hi] with 0 ≤ lo < hi ≤ 1000"),
    ("i2v", {"height": 256}, "height is given alone"),
    ("i2v", {"height": 100, "width": 96}, "height is 100, but must be a multiple of 16"),
    ("i2v", {"height": 96, "width": 96, "resolution": "256"}, "resolution is given, and height and width too"),
    ("t2v", {"vision_path": "good/picture.png"}, "text2video takes none; use model_mode image2video"),
    ("i2v", {"vision_path": "good/clip.mp4"}, "image2video takes an image; use model_mode video2video"),
    ("i2v", {"vision_path": None}, "vision_path is missing, and image2video needs an image"),
    ("t2v", {"prompt": " "}, "prompt is missing"),
    ("t2v", {"num_frames": 1}, "num_frames is 1, but text2video makes a clip; use text2image"),
    ("t2i", {"num_frames": 25}, "text2image makes one frame"),
    ("i2i", {"enable_sound": True}, "enable_sound is true, but image2image has no sound"),
    ("s2v", {"enable_sound": False}, "enable_sound is false, but audio_image2video is about sound"),
    ("v2v", {"condition_frame_indexes_vision": [0, 7]}, "vision_path has 25 frames, but video2video needs 29"),
    ("i2v", {"num_frames": 5, "condition_frame_indexes_vision": [0, 1]}, "must leave some of the 2 latent frames"),
    ("t2v", {"max_new_tokens": 4}, "max_new_tokens is for the reasoner, not for text2video"),
    ("t2v", {"control_guidance": 2}, "control_guidance is for transfer, not for text2video"),
    ("ask", {"num_steps": 4}, "num_steps is for generation, not for reasoner"),
    ("ask", {"temperature": 0.5}, "temperature is 0.5, which does nothing without do_sample"),
    ("turns", {"prompt": "and?"}, "put everything into turns"),
    ("fd", {"height": 96, "width": 96}, "height is given, but forward_dynamics is sized by image_size"),
    ("transfer", {"share_vision_temporal_positions": False}, "controls that share time with the result; leave it out"),
    ("fd", {"action_chunk_size": 15}, "action_chunk_size is 15, but frames are 1 + 4k; use 12 or 16"),
    ("fd", {"action_chunk_size": 20}, "action_path has 16 rows, but action_chunk_size is 20"),
    ("fd", {"raw_action_dim": 7}, "raw_action_dim is 7, but a row of action_path has 10"),
    ("fd", {"image_size": 300}, "image_size 300 is not a tier"),
    ("fd", {"domain_name": None}, "domain_name is missing"),
    ("fd", {"domain_name": "brigde_orig"}, "domain_name 'brigde_orig' is not known (did you mean 'bridge_orig"),
    ("fd", {"domain_name": "av"}, 'domain_name is "av", but av actions have 9 channels, not 10'),
    ("wam", {"domain_name": "libero"}, "give raw_action_dim or the actions"),
    ("id", {"action_chunk_size": 32}, "vision_path has 25 frames, but inverse_dynamics needs 33"),
    ("depth", {"depth": {}}, "depth has nothing to follow; give its control_path."),
    ("depth", {"depth": {"weight": 0, "control_path": "good/clip.mp4"}}, "depth.weight is 0, and no other control"),
    ("depth", {"depth": {"wieght": 1}}, "depth has no key \"wieght\" (did you mean 'weight'?)"),
    ("depth", {"num_conditional_frames": 93}, "must be less than num_video_frames_per_chunk=93"),
    ("t2v", {"sigma_max": 40}, "sigma_max is 40, but it is for the EDM sampler"),
    ("t2v", {"prompt_upsampling": True}, "prompts are not rewritten here"),
    ("t2v", {"duration_template": "{fps.__class__}"}, "not a template with {duration}, {fps}"),
    ("t2v", {"duration_template": "{fps:999999999}"}, "not a template with {duration}, {fps}"),
    ("t2v", {"name": "../out"}, 'name is "../out", which cannot name a folder'),
    ("transfer", {"prompt": "a"}, "prompt_path is given and prompt too"),
    ("i2v", {"vision_path": "bad/cut.png"}, "cannot be read as an image"),
    ("i2v", {"vision_path": "bad/empty.png"}, "vision_path is empty.png, an empty file"),
    ("i2v", {"vision_path": "bad/bomb.png"}, "unfolds to far too many pixels"),
    ("i2v", {"vision_path": "bad/folder.png"}, "a folder; name a file in it"),
    ("i2v", {"vision_path": "bad/cut.jpg"}, "cannot be read as an image"),
    ("i2v", {"vision_path": "bad/gif.png"}, "cannot be read as an image"),
    ("s2v", {"sound_path": "bad/cut.wav"}, "sound_path is cut.wav, which promises 16044 bytes but holds 10696"),
    ("v2v", {"vision_path": "bad/cut.mp4"}, "vision_path is cut.mp4, which promises 25 frames but holds"),
    ("v2v", {"vision_path": "bad/playlist.mp4"}, "cannot be read as a video"),
    ("s2v", {"sound_path": "bad/noise.wav"}, "cannot be read as a sound"),
    ("fd", {"action_path": "bad/nan.json"}, "action_path is nan.json, which holds a number that is not finite"),
    ("fd", {"action_path": "bad/ragged.json"}, "whose rows 0 and 1 have 2 and 1 numbers"),
]  # fmt: skip


@pytest.mark.parametrize("template, change, words", SENTENCES, ids=lambda x: str(x)[:40])
def test_one_sentence_says_what_is_wrong(folder, template, change, words):
    assert ask(folder, T[template]) and words in refusal(folder, T[template] | change)


def test_words_that_are_not_json(folder):
    assert refusal(folder, '{"prompt": "a", "prompt": "b"}') == ' gives the key "prompt" twice; keep one.'
    assert "holds NaN" in refusal(folder, '{"prompt": "a", "guidance": NaN}')
    assert "line 2, column 1" in refusal(folder, '{"prompt": "a",\n}')
    assert "nested" in refusal(folder, '{"extra": ' + "[" * 60 + "]" * 60 + "}")


def test_inert_values_of_what_we_do_not_have_are_taken(folder):
    inert = {"sigma_max": 80.0, "autoregressive": False, "prompt_upsampling": False, "prompt_upsampler_seed": 3407}
    r = ask(folder, T["t2v"] | inert | {"output_dir": "/elsewhere", "vision_path": None, "control_guidance": 1.0})
    assert "output_dir is ignored: --out decides" in r.notes


def test_a_request_that_was_resolved_resolves_to_itself(folder):
    for name in ("t2v", "i2v", "wam", "depth", "images"):
        once = ask(folder, T[name])
        again = resolve(dataclasses.replace(once.request, media=once.request.media), NANO)
        assert (again.frames, again.height, again.width, again.request.said) == (
            once.frames, once.height, once.width, once.request.said
        ) and not again.defaults  # fmt: skip


def test_the_docs_name_every_key():
    words = (ROOT / "docs/requests.md").read_text()
    for key in (*KEYS, *REFUSED, *(k for k in IGNORED if not k.startswith("prompt_upsampler"))):
        assert f"`{key}`" in words, key
