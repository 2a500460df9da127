"""Pictures, clips, tokens and positions equal those of transformers' processors: bit for bit, every case.

The oracle runs in a process of its own (processor_oracle.py); the cases are in processor_cases.py.
"""

import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys

import av
import numpy as np
import PIL.Image
import pytest
import torch
from parity import processor_cases as cases
from transformers import Qwen2VLImageProcessorPil
from transformers.video_utils import read_video_pyav

from data_pipelines import chat, packing, patch_grid, positions, preprocessor, video, vision
from data_pipelines.reasoner import Frontend, open_clip, open_image
from data_pipelines.resample import bicubic
from data_pipelines.sample import Sample, Turn, validate
from data_pipelines.schema import SequenceSpec
from data_pipelines.tokenizer import ChatTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = SequenceSpec(latent_channels=48, patch=2, action_dim=0, sound_dim=0, vit_patch=16, vit_grid=48)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: cases.write_folder(root, name) for name in cases.FOLDERS}


@pytest.fixture(scope="module")
def reference(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("oracle") / "result.pickle"
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join(map(str, (ROOT, here, *sys.path)))
    root = next(iter(folders.values())).parent
    subprocess.run(
        [sys.executable, str(here / "processor_oracle.py"), str(root), str(out)],
        check=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    return pickle.loads(out.read_bytes())


def see(kind, name, eyes):
    if kind == "image":
        return vision.see_image(cases.images()[name], eyes.image)
    return vision.see_clip(cases.clips()[name], eyes.video)


def wrong(folder, seen, eyes):
    """The media whose pixels, grid or times differ from the reference's."""
    out = []
    for (kind, name), want in seen.items():
        p = see(kind, name, eyes)
        same = p.patches.dtype == np.float32 and np.array_equal(p.patches, want[0]) and p.grid == want[1]
        if not same or (kind == "video" and list(p.times) != want[3]):
            out.append(name)
    return out


@pytest.mark.parametrize("folder", list(cases.FOLDERS))
def test_pictures_and_clips_equal_transformers(folder, folders, reference):
    """Every number of every patch, the grid, and the second of every temporal patch."""
    seen = reference[folder]["seen"]
    assert len(seen) == len(cases.images()) + len(cases.clips())
    assert not wrong(folder, seen, preprocessor.load(folders[folder]))
    print(
        f"{folder}: {sum(v[0].size for v in seen.values()):,} numbers equal (torchvision: {reference['torchvision']})"
    )


def test_sizes_equal_transformers(reference):
    """Height and width for 3,168 shapes, lengths and limits; refused where the reference refuses."""
    families = {"image": vision.QWEN3_VL.image, "qwen": vision.QWEN3_VL.video, "edge": vision.EDGE.video}
    refused = 0
    for (kind, limits, h, w, *frames), want in reference["sizes"].items():
        settings = dataclasses.replace(families[kind], min_pixels=limits[0], max_pixels=limits[1])
        try:
            got = vision.fitted(h, w, settings, *frames)
        except ValueError:
            got, refused = None, refused + 1
        assert got == want, (kind, limits, h, w, frames)
    assert 0 < refused < len(reference["sizes"]) / 2


def test_frames_equal_transformers(reference, folders):
    for folder in cases.FOLDERS:
        settings = preprocessor.load(folders[folder]).video
        for name, clip in cases.clips().items():
            if clip.indices is None:
                want = reference[folder]["seen"]["video", name][2]
                np.testing.assert_array_equal(vision.sample_frames(len(clip.frames), clip.fps, settings), want)


def converse(frontend, messages, **options):
    turns = [frontend._turn(m) for m in cases.with_media(messages)]
    return frontend.tokenizer.conversation(turns, messages[-1]["role"] == "user", **options)


def where(p):
    return positions.reasoner(packing.runs(p.kinds, [x.merged for x in p.pictures for _ in range(x.spans)]))


@pytest.mark.parametrize("name", list(cases.conversations()))
@pytest.mark.parametrize("family", ["qwen", "edge"])
def test_conversations_equal_transformers(family, name, folders, reference):
    """Token ids, mm_token_type_ids and get_rope_index's positions."""
    want = reference[family]["chats"][name]
    p = converse(Frontend.load(folders[family]), cases.conversations()[name], video_wrapper=family == "qwen")
    np.testing.assert_array_equal(p.ids, want["ids"])
    np.testing.assert_array_equal(p.kinds, want["kinds"])
    np.testing.assert_array_equal(where(p), want["positions"])


def test_the_pair_around_a_clip_is_all_that_transformers_5_adds(folders, reference):
    """Without `video_wrapper`, as trained, the ids lack one start and one end per clip, and nothing else."""
    front = Frontend.load(folders["qwen"])
    tok = front.tokenizer
    for name, messages in cases.conversations().items():
        ids = list(reference["qwen"]["chats"][name]["ids"])
        clips = len(cases.names(messages, "video"))
        start, end = tok.vision_start, tok.vision_end
        outer = [i for i, t in enumerate(ids) if t == start and ids[i + 1] not in (tok.image_pad, tok.video_pad)]
        outer += [i for i, t in enumerate(ids) if t == end and ids[i - 1] == end]
        assert len(outer) == 2 * clips
        assert [t for i, t in enumerate(ids) if i not in outer] == converse(front, messages).ids.tolist()


@pytest.mark.parametrize("family", ["qwen", "edge"])
def test_control_tokens_of_users_are_text_as_in_sanitized_transformers(family, folders, reference):
    tok = ChatTokenizer.load(folders[family])
    ids = tok.chat([("user", cases.ATTACK)])
    np.testing.assert_array_equal(ids, reference[family]["chats"]["attack"]["ids"])
    assert tok.video_pad not in ids


def test_our_words_for_qwen_s_template_are_the_template(folders, reference):
    """Without a template in the folder, chat.qwen renders the same ids."""
    path = folders["qwen"] / "tokenizer.json"
    mine = Frontend(ChatTokenizer(path), vision.QWEN3_VL)
    for name, messages in cases.conversations().items():
        p = converse(mine, messages, video_wrapper=True)
        np.testing.assert_array_equal(p.ids, reference["qwen"]["chats"][name]["ids"], err_msg=name)


def test_released_limits_and_class_defaults(folders, reference, tmp_path):
    assert preprocessor.load(folders["qwen"]) == vision.QWEN3_VL
    assert preprocessor.load(folders["edge"]) == vision.EDGE
    for name, want in reference["defaults"].items():
        s = (preprocessor.IMAGE | preprocessor.VIDEO)[name]
        assert ((s.min_pixels, s.max_pixels), s.patch, s.temporal) == tuple(
            want[k] for k in ("size", "patch_size", "temporal_patch_size")
        )
        assert (s.mean, s.std, s.rescale) == (
            tuple(want["image_mean"]), tuple(want["image_std"]), want["rescale_factor"]
        )  # fmt: skip
        if "Video" in name:
            assert (s.fps, s.min_frames, s.max_frames) == (want["fps"], want["min_frames"], want["max_frames"])
            assert s.cap_pixels_per_frame == bool(want["cap_pixels_per_frame"])
            assert s.max_video_tokens == (want["max_video_tokens"] or s.max_video_tokens)


@pytest.mark.parametrize("seed", range(12))
def test_resampling_equals_torch(seed):
    """Integer for integer, growing and shrinking, one side or both, on noise of the extremes."""
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 300, 2)
    new_h, new_w = (int(n) for n in rng.integers(1, 300, 2))
    x = (rng.integers(0, 2, (2, h, w, 3)) * 255).astype(np.uint8) if seed % 2 else cases.noise(seed, 2, h, w, 3)
    t = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    y = torch.nn.functional.interpolate(t, size=(new_h, new_w), mode="bicubic", antialias=True)
    np.testing.assert_array_equal(bicubic(x, new_h, new_w), y.permute(0, 2, 3, 1).numpy())


def test_pillow_s_bicubic_differs_by_a_grey_level(folders):
    """transformers without torchvision resizes with Pillow: not our numbers, but nearly, where both sides shrink."""
    x = cases.noise(1, 700, 1000, 3)
    pil = Qwen2VLImageProcessorPil.from_pretrained(folders["qwen_tight"])(x, return_tensors="np")["pixel_values"]
    mine = vision.see_image(x, preprocessor.load(folders["qwen_tight"]).image).patches
    levels = np.abs(pil - mine) * 127.5
    share = (levels > 0.5).mean()
    print(f"Pillow: {share:.2%} of the numbers differ, by {levels.max():.2f} grey levels at most")
    assert 0 < share < 0.02 and levels.max() < 1.01


def write_clip(path, frames, fps):
    with av.open(str(path), "w") as f:
        stream = f.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for x in frames:
            f.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        f.mux(stream.encode(None))


@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 30), (".mp4", 7), (".avi", 25)])
def test_a_file_s_frames_equal_transformers(suffix, fps, tmp_path):
    settings = vision.QWEN3_VL.video
    path = tmp_path / f"clip{suffix}"
    write_clip(path, cases.noise(3, 50, 48, 64, 3), fps)
    want, metadata = read_video_pyav(
        str(path), lambda metadata: vision.sample_frames(metadata.total_num_frames, metadata.fps, settings)
    )
    got = open_clip(path, settings)
    np.testing.assert_array_equal(got.frames, want)
    assert (got.fps, list(got.indices)) == (metadata.fps, metadata.frames_indices.tolist())
    assert len(got.indices) == max(int(50 / fps * 2), 4)


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_a_container_that_does_not_count_its_frames(suffix, tmp_path):
    path = tmp_path / f"clip{suffix}"
    write_clip(path, cases.noise(3, 21, 48, 64, 3), 10)
    with av.open(str(path)) as f:
        assert f.streams.video[0].frames == 0
    clip = open_clip(path, vision.QWEN3_VL.video)
    assert (clip.indices, clip.fps, len(clip.frames)) == ((0, 7, 13, 20), 10.0, 4)


def test_images_lie_upright(tmp_path):
    image = PIL.Image.fromarray(cases.noise(1, 20, 30, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(vision.to_rgb(open_image(tmp_path / "turned.png")), np.rot90(np.asarray(image), -1))


@pytest.fixture(scope="module")
def batch(folders):
    """Row 0: image, clip, image and clip mixed with text. Row 1: a question with its answer."""
    front = Frontend.load(folders["qwen"])
    talks = [cases.with_media(cases.conversations()[n]) for n in ("mixed", "answered")]
    return front, front.batch(talks, SPEC)


def test_a_batch_holds_each_picture_where_its_tokens_are(batch):
    front, b = batch
    p = converse(front, cases.conversations()["mixed"])
    n = len(p.ids)
    np.testing.assert_array_equal(b["und_ids"][0, :n], p.ids)
    np.testing.assert_array_equal(b["und_positions"][0, :, :n], where(p))
    index = b["und_vit_index"][0]
    assert ((index >= 0) == np.pad(p.kinds > 0, (0, len(index) - n))).all()
    rows = 4 * index[index >= 0][:, None] + np.arange(4)  # the four patches behind each token
    order = [see(kind, name, front.eyes).patches for kind, name in
             (("image", "alpha"), ("video", "three"), ("image", "array"), ("video", "thin"))]  # fmt: skip
    np.testing.assert_array_equal(b["vit_patches"][0][rows.reshape(-1)], np.concatenate(order))
    frames = b["vit_segment_ids"][0]
    spans = sum(x.spans for x in p.pictures)
    assert sorted(set(frames[frames >= 0].tolist())) == list(range(spans)), "no two spans share a frame"
    assert (b["vit_rowcol"][0][frames == 0].max(0) + 1).tolist() == list(p.pictures[0].grid[1:])


def test_an_edge_batch(folders):
    """One frame per patch, no corners of the position table: the same path."""
    front = Frontend.load(folders["edge"])
    spec = dataclasses.replace(SPEC, vit_kind="siglip2", vit_grid=16, vit_temporal=1)
    b = front.batch([cases.with_media(cases.conversations()["turns"])], spec)
    p = converse(front, cases.conversations()["turns"])
    np.testing.assert_array_equal(b["und_ids"][0, : len(p.ids)], p.ids)
    patches = np.concatenate([x.patches for x in p.pictures])
    np.testing.assert_array_equal(b["vit_patches"][0, : len(patches)], patches)
    assert b["vit_segment_ids"].max() + 1 == sum(x.spans for x in p.pictures)


def test_every_answer_is_a_target(batch):
    """Both of the assistant's turns, each with its <|im_end|>, each token predicted by the one before it."""
    front, b = batch
    tok = front.tokenizer
    ids, targets = b["und_ids"][1], b["und_targets"][1]
    taught = np.flatnonzero(targets >= 0)
    np.testing.assert_array_equal(targets[taught], ids[taught + 1])
    said = tok._tok.decode(targets[taught].tolist(), skip_special_tokens=False)
    assert said == "It moves.<|im_end|>\nLeft.<|im_end|>"
    assert (b["und_segment_ids"][1, taught[-1] + 2 :] == -1).all(), "nothing follows the last answer"
    assert (b["und_targets"][0] == -1).all()


def test_conversations_pack_with_others(batch, folders):
    """Two conversations in one row: pictures and frames of the second come after those of the first."""
    front, single = batch
    talks = [cases.with_media(cases.conversations()[n]) for n in ("image", "video")]
    planned = [packing.plan(front.sample(t, SPEC, i), front.tokenizer, SPEC) for i, t in enumerate(talks)]
    bucket = dataclasses.replace(packing.tight_bucket(planned, 1), und=256, vit=512, segments=2)
    row = packing.fill([planned], bucket, SPEC)
    first = planned[0].size
    second = row["und_vit_index"][0, first["und"] :]
    assert second[second >= 0].min() == first["vit"] // 4
    frames = row["vit_segment_ids"][0]
    assert frames[first["vit"]] == 1 and frames.max() == planned[1].vit.frames


def other_resize(mode, antialias):
    def resize(x, h, w):
        t = torch.from_numpy(x.reshape(-1, *x.shape[-3:]).copy()).permute(0, 3, 1, 2).contiguous()
        y = torch.nn.functional.interpolate(t, size=(h, w), mode=mode, antialias=antialias)
        return y.permute(0, 2, 3, 1).numpy().reshape(*x.shape[:-3], h, w, 3)

    return resize


def raster(frames, ps, ts, kind):
    p = video.patchify(frames, ps, ts, kind)
    t, rows, cols = p.grid
    order = np.argsort(patch_grid.merge_order(np.arange(rows * cols).reshape(rows, cols)))
    return p._replace(patches=p.patches.reshape(t, rows * cols, -1)[:, order].reshape(p.patches.shape))


MUTATIONS = {
    "raster order": lambda m: m.setattr(vision, "patchify", raster),
    "frames inside rows": lambda m: m.setitem(video.FEATURES, "qwen3vl", (8, 4, 1, 7)),
    "frames first": lambda m: m.setitem(video.FEATURES, "qwen3vl", (1, 8, 4, 7)),
    "channels last": lambda m: m.setitem(video.FEATURES, "qwen3vl", (4, 7, 8, 1)),
    "bilinear": lambda m: m.setattr(vision, "bicubic", other_resize("bilinear", True)),
    "no antialias": lambda m: m.setattr(vision, "bicubic", other_resize("bicubic", False)),
    "rows before columns": lambda m: m.setattr(
        vision, "bicubic", lambda x, h, w: np.moveaxis(bicubic(np.moveaxis(x, -2, -3), w, h), -2, -3)
    ),
    "scaled in two steps": lambda m: m.setattr(
        vision, "_cut", lambda x, s: video.patchify((np.float32(x) / 255 - np.float32(0.5)) * 2, 16, 2, s.kind)
    ),
    "time of the first frame": lambda m: m.setattr(
        vision, "timestamps", lambda i, fps, n: tuple(float(x) / fps for x in i[::n])
    ),
    "no white under alpha": lambda m: m.setattr(
        vision, "to_rgb", lambda x: np.asarray(x.convert("RGB") if isinstance(x, PIL.Image.Image) else x)
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", MUTATIONS)
def test_the_suite_can_fail(bug, folders, reference, monkeypatch):
    MUTATIONS[bug](monkeypatch)
    assert wrong("qwen_tight", reference["qwen_tight"]["seen"], preprocessor.load(folders["qwen_tight"]))


@pytest.mark.parametrize("change", [dict(fps=2.0), dict(min_frames=4), dict(max_frames=7), dict(max_pixels=90000)])
def test_the_suite_can_fail_on_settings(change, folders, reference):
    eyes = preprocessor.load(folders["qwen_tight"])
    eyes = dataclasses.replace(eyes, video=dataclasses.replace(eyes.video, **change))
    assert wrong("qwen_tight", reference["qwen_tight"]["seen"], eyes)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", {"resample": 2}, "resample = 2 is not supported; only 3"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize = False"),
        ("preprocessor_config.json", {"sharpen": 1}, "unknown field 'sharpen'"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "only Qwen2VLImageProcessor or"),
        ("preprocessor_config.json", {"size": {"height": 4}}, "must give shortest_edge and longest_edge"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "image_mean has 2 numbers"),
        ("video_preprocessor_config.json", {"merge_size": 4}, "merge_size = 4 is not supported"),
        ("video_preprocessor_config.json", {"do_sample_frames": False}, "do_sample_frames = False"),
    ],
)
def test_settings_that_are_not_understood_are_refused(file, change, message, tmp_path):
    folder = cases.write_folder(tmp_path, "qwen")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(ValueError, match=message):
        preprocessor.load(folder)


def test_settings_may_share_a_file_and_be_absent(tmp_path):
    folder = cases.write_folder(tmp_path, "edge_tight")
    want = preprocessor.load(folder)
    image, clip = folder / "preprocessor_config.json", folder / "video_preprocessor_config.json"
    parts = {"image_processor": json.loads(image.read_text()), "video_processor": json.loads(clip.read_text())}
    nulls = dict.fromkeys(["fps", "do_pad", "num_frames", "rescale_factor", "size"])
    parts["video_processor"] = nulls | parts["video_processor"]
    image.unlink(), clip.unlink()
    (folder / "processor_config.json").write_text(json.dumps(parts))
    assert preprocessor.load(folder) == want
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": parts["image_processor"]}))
    with pytest.raises(ValueError, match="lacks video_preprocessor_config.json"):
        preprocessor.load(folder)


def test_control_tokens_that_swallow_spaces_are_refused(folders, tmp_path):
    table = json.loads((folders["qwen"] / "tokenizer.json").read_text())
    table["added_tokens"][0]["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="endoftext.* depends on the text around it"):
        ChatTokenizer(tmp_path / "tokenizer.json")


def test_a_template_is_found_wherever_it_was_kept(tmp_path):
    folder = cases.write_folder(tmp_path, "edge")
    want = ChatTokenizer.load(folder).chat([("user", "hello")])
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for kept in (template, [{"name": "default", "template": template}]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": kept}))
        assert ChatTokenizer.load(folder).chat([("user", "hello")]) == want
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert ChatTokenizer.load(folder).chat([("user", "hello")]) == want


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "cannot be read"),
        ("{{ raise_exception('no system turns') }}", "refuses this conversation .no system turns"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("nothing", "shows 0 of the conversation's 1 pictures"),
        ("<|image_pad|><|image_pad|>", "room for more images than"),
    ],
)
def test_templates_that_cannot_serve_are_refused(template, message, folders):
    image = vision.see_image(cases.images()["tiny"], vision.QWEN3_VL.image)
    with pytest.raises(ValueError, match=message):
        tok = ChatTokenizer(folders["qwen"] / "tokenizer.json", chat.jinja(template, {}, "here"))
        tok.conversation([Turn("user", (image, "what?"))])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": np.zeros((4, 4), np.uint8)}], "pass grey or transparent pictures as PIL"),
        ([{"type": "image", "image": np.zeros((4, 4, 3))}], "got float64"),
        ([{"type": "image", "image": np.zeros((4, 900, 3), np.uint8)}], "200 times as long as wide"),
        ([{"type": "image", "image": __file__}], "cannot be read as an image"),
        ([{"type": "video", "video": __file__}], "cannot be read as a video"),
        ([{"type": "video", "video": vision.Clip(np.zeros((1, 40, 40, 3), np.uint8), 2.0)}], "1 frame is too short"),
        ([{"type": "video", "video": vision.Clip(np.zeros((4, 40, 40, 3), np.uint8), 0.0)}], "cannot be sampled"),
        ([{"type": "video", "video": vision.Clip(np.zeros((2, 40, 40, 3), np.uint8), 2.0, (1,))}], "has 1 indices"),
        ([{"type": "sound"}], "a part of type 'sound'"),
    ],
)
def test_media_that_cannot_be_seen_are_refused(content, message, folders):
    front = Frontend.load(folders["qwen"])
    with pytest.raises(ValueError, match=message):
        front.sample([{"role": "user", "content": content}], SPEC)


def test_samples_that_do_not_fit_are_refused(folders):
    image = vision.see_image(cases.images()["tiny"], vision.QWEN3_VL.image)
    turns = (Turn("user", (image, "what?")),)
    for sample, spec, message in (
        (Sample("reason", "and this?", turns=turns), SPEC, "put everything into the turns"),
        (Sample("reason", "", turns=(Turn("robot", ("hi",)),)), SPEC, "unknown role 'robot'"),
        (Sample("reason", "", turns=turns), dataclasses.replace(SPEC, vit_patch=0), "no vision encoder"),
        (Sample("reason", "", turns=turns), dataclasses.replace(SPEC, vit_temporal=1), "1536 numbers, but .* have 768"),
        (Sample("text2video", "", turns=turns), SPEC, "takes a prompt, not a conversation"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(sample, spec)
    with pytest.raises(ValueError, match="without messages"):
        Frontend.load(folders["qwen"]).sample([], SPEC)
