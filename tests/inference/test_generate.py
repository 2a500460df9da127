"""Promises of `generate --request`: which files every mode leaves, what run.json says, whose bits are equal."""

import html.parser
import json

import av
import numpy as np
import pytest
from inference.kit import MODES, STEPS, arrays, said, watched

from cosmos_jax import media, outputs
from cosmos_jax.__main__ import main
from cosmos_jax.sampling import engine

CLIP, CANVAS, SCENE = (48, 80), (192, 320), (96, 144)  # observations are encoded padded, their scene is kept
MADE = {  # mode → frames, size, frames per second of its clip; other files
    "t2v": (9, CLIP, 24), "i2v": (9, CLIP, 24), "v2v": (13, CLIP, 12), "t2v_sound": (9, CLIP, 24, "sound.wav"),
    "s2v": (9, CLIP, 24), "policy": (5, SCENE, 10, "actions.json"), "forward_dynamics": (5, SCENE, 10),
    "transfer": (13, CLIP, 30),
}  # fmt: skip


def clip(path):
    """Frames, frame rate, and of the sound its codec and rate."""
    with av.open(str(path)) as f:
        heard = [(s.codec_context.name, s.sample_rate) for s in f.streams.audio]
        assert f.streams.video[0].codec_context.name == "h264"
    frames, fps = media.read_video(path)
    return frames, fps, heard


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_leaves_its_files(mode, batch):
    out = batch.out / mode
    files = {p.name for p in out.iterdir()} - {"run.json"}
    assert files == set(said(out)["files"])
    if mode in MADE:
        count, size, rate, *more = MADE[mode]
        assert files == {"video.mp4", *more}
        frames, fps, heard = clip(out / "video.mp4")
        assert (frames.shape, fps) == ((count, *size, 3), rate)
        assert heard == ([("aac", 48000)] if "sound.wav" in more else [])
    if mode in ("t2i", "i2i"):
        assert files == {"image.png"} and media.read_image(out / "image.png").shape == (*CLIP, 3)
    if "sound.wav" in files:
        wave, rate = media.read_wave(out / "sound.wav")
        assert wave.shape == (2, 120) and rate == 300  # 9 frames at 24/s are 9.4 latents of 12 samples
    if mode in ("policy", "inverse_dynamics"):
        rows = media.read_actions(out / "actions.json")
        assert rows.shape == (4, 10) and rows.any(0).all() and said(out)["conditions"]["width"] == 10
    others = {"v2s": {"sound.wav"}, "inverse_dynamics": {"actions.json"}, "ask": {"answer.txt"}}
    assert files == others.get(mode, files)


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {v for k, v in attrs if k in ("src", "href") and not v.startswith(("#", "data:"))}


def test_a_batch_has_a_page_that_shows_every_file(batch):
    links = Links((batch.out / "index.html").read_text()).found
    made = {str(p.relative_to(batch.out)) for p in batch.out.rglob("*") if p.is_file()} - {"index.html"}
    assert made <= links and len(made) >= 2 * len(MODES)
    assert all((batch.out / x).is_file() for x in links)


def test_only_the_prefix_that_clean_latents_need_is_encoded(batch):
    small, large = (*CLIP, 3), (*CANVAS, 3)
    want = {
        "i2v": [(1, *small)], "v2v": [(5, *small)], "s2v": [(1, *small)], "v2s": [(9, *small)],
        "policy": [(1, *large)], "forward_dynamics": [(1, *large)], "inverse_dynamics": [(5, *large)],
        "i2i": [(1, *small)], "transfer": [(9, *small), (1, *small), (9, *small)],  # two chunks share a frame
    }  # fmt: skip
    assert sorted(batch.seen.encoded) == sorted(x for shapes in want.values() for x in shapes)
    assert [x[0] for x in batch.seen.heard] == [2]


def test_video_is_decoded_only_where_it_is_made(batch):
    small, scene = (3, 5), (6, 9)
    want = [(1, *small)] * 2 + [(3, *small)] * 6 + [(4, *small)] + [(2, *scene)] * 2  # t2i, i2i; …; v2v; actions
    assert sorted(x[1:] for x in batch.seen.decoded) == sorted(want)


def test_the_text_tower_is_not_there_while_it_denoises(batch):
    """Weights come job by job; nothing of one is alive when the next ones come."""
    assert batch.seen.loaded == [("reasoner", []), ("captions", []), ("generator", [])]


def test_run_json_tells_everything_that_decided_numbers(baseline, checkpoint):
    run = baseline.said
    assert set(run["defaults"]) >= {"aspect_ratio", "shift", "num_outputs", "condition_frame_indexes_vision"}
    assert all(k in run for k in run["defaults"]) and run["shift"] == 10.0 and run["guidance"] == 3.0
    assert run["guidance_applied"]["text"] == 3.0 and run["num_steps"] == run["steps"] == STEPS
    assert run["solver"] == "UniPC of order 2, 2 steps, framework's grid, shift 10"
    assert (run["seed"], run["convention"], run["precision"]) == (7, "framework", "float32")
    assert "numpy RandomState" in run["noise"]
    assert run["texts"]["positive"].startswith("A small robot moves across a table. The video is 0.9 seconds long")
    assert run["texts"]["system"] is None and run["texts"]["negative"].startswith("bad. ")
    assert run["tokens"]["positive"] > run["tokens"]["negative"] > 20
    picture = run["media"]["vision_path"]
    assert picture["path"].endswith("first.png") and len(picture["sha256"]) == 64
    assert set(run["files"]) == {"video.mp4", "sound.wav"} and all(len(h) == 64 for h in run["files"].values())
    assert run["checkpoint"]["path"] == str(checkpoint) and run["checkpoint"]["layout"] == "diffusers"
    assert len(run["checkpoint"]["sha256"]["transformer/config.json"]) == 64
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert run["checkpoint"]["weights"][weights] == (checkpoint / weights).stat().st_size
    assert set(run["versions"]) >= {"python", "jax", "numpy", "av"} and run["machine"]["device"] == "cpu"
    phases = {"compiling", "encoding", "loading captions", "reading captions", "loading generator",
              "denoising i2v_sound_fps10", "decoding"}  # fmt: skip
    assert set(run["phases"]) == phases and 0 < sum(run["phases"].values()) <= run["seconds"] + 0.01
    assert len(run["step_seconds"]) == STEPS and min(run["step_seconds"]) > 0
    assert run["peak_memory"]["host_bytes"] > 1e8 and "GiB" in run["memory"][0]


def test_latents_have_the_contracts_shapes_and_end_where_they_end(baseline, generate, cases, tmp_path):
    assert generate(cases["policy"], "--no-decode_video") == 0
    policy = arrays(tmp_path / "out.npz")
    for found, want in (
        (baseline.arrays, {"vision": (8, 3, 3, 5), "sound": (6, 23)}),
        (policy, {"vision": (8, 2, 6, 9), "action": (4, 64)}),
    ):
        steps = {f"{m}_steps": (STEPS, *shape) for m, shape in want.items()}
        assert {m: x.shape for m, x in found.items()} == want | steps
        assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in found.values())
        assert all(np.array_equal(found[f"{m}_steps"][-1], found[m]) for m in want)
    rows = media.read_actions(tmp_path / "out" / "actions.json")
    assert np.array_equal(rows, policy["action"][:, :10]) and not policy["action"][:, 10:].any()


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_a_seed_gives_the_same_bits_again_and_another_gives_others(baseline, generate, cases, tmp_path):
    assert generate(cases["i2v_sound_fps10"], out="again") == 0
    assert same(arrays(tmp_path / "again.npz"), baseline.arrays)
    assert said(tmp_path / "again")["files"] == baseline.said["files"]
    assert generate(cases["i2v_sound_fps10"], out="other", seed=8) == 0
    assert not same(arrays(tmp_path / "other.npz"), baseline.arrays)


def test_an_imported_checkpoint_gives_the_same_bits(baseline, generate, cases, checkpoint, tmp_path):
    assert main(["convert", f"--from={checkpoint}", f"--to={tmp_path / 'ours'}"]) == 0
    assert generate(cases["i2v_sound_fps10"], where=tmp_path / "ours") == 0
    assert same(arrays(tmp_path / "out.npz"), baseline.arrays)
    hashes = said(tmp_path / "out")["checkpoint"]["sha256"]
    assert any(n.endswith(".safetensors") for n in hashes) and all(len(h) == 64 for h in hashes.values())


def test_the_noise_of_a_seed_is_numpys_and_clean_positions_do_not_matter(baseline, generate, cases, tmp_path):
    def normal(*shape):
        return np.random.RandomState(7).standard_normal(shape).astype(np.float32)

    given = {"vision": normal(8, 3, 3, 5), "sound": normal(6, 23)}
    given["vision"][:, 0] = 1e4  # the picture's latents will stand there
    np.savez(tmp_path / "noise.npz", **given)
    assert generate(cases["i2v_sound_fps10"], f"--noise={tmp_path / 'noise.npz'}") == 0
    assert same(arrays(tmp_path / "out.npz"), baseline.arrays)
    assert said(tmp_path / "out")["noise"] == "from a file"


def test_watched_and_unwatched_steps_agree(baseline, generate, cases, tmp_path):
    assert generate(cases["i2v_sound_fps10"], "--progress=steps") == 0
    for name, x in arrays(tmp_path / "out.npz").items():
        assert np.abs(x - baseline.arrays[name]).max() <= 1e-6 * np.abs(x).max(), name
    times = said(tmp_path / "out")["step_seconds"]
    assert len(times) == STEPS and min(times) > 0


def test_bfloat16_is_as_near_as_bfloat16_is(baseline, generate, cases, tmp_path):
    assert generate(cases["i2v_sound_fps10"], "--precision=bfloat16", "--no-decode_video") == 0
    found = arrays(tmp_path / "out.npz")
    for name in ("vision", "sound"):
        error = np.linalg.norm(found[name] - baseline.arrays[name]) / np.linalg.norm(baseline.arrays[name])
        assert 1e-4 < error < 5e-2, (name, error)
    assert said(tmp_path / "out")["precision"] == "bfloat16"


def test_two_outputs_have_seeds_in_a_row(batch, generate, cases, tmp_path):
    assert generate(cases["t2i"], dump=False, num_outputs=2) == 0
    first, second = (tmp_path / "out" / "t2i" / n for n in "01")
    assert [said(x)["seed"] for x in (first, second)] == [7, 8]
    alone = said(batch.out / "t2i")["files"]["image.png"]
    assert said(first)["files"]["image.png"] == alone != said(second)["files"]["image.png"]
    assert {"t2i/0/image.png", "t2i/1/image.png"} <= Links((tmp_path / "out" / "index.html").read_text()).found


def test_video_is_not_decoded_when_nobody_wants_it(generate, cases, tmp_path):
    with watched() as seen:
        assert generate(cases["policy"], "--no-decode_video") == 0
    assert not seen.decoded and {p.name for p in (tmp_path / "out").iterdir()} == {"actions.json", "run.json"}


def refused(capsys, tmp_path, code, *words):
    """Code 2, one line that says these words, nothing written."""
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("cosmos_jax: ") and err.endswith(".\n") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.npz").exists()


VISION, SOUND = np.zeros((8, 3, 3, 5), np.float32), np.zeros((6, 23), np.float32)
NOISES = {
    "shape": (dict(vision=VISION[:, :2], sound=SOUND), "vision is [8, 2, 3, 5], but the request needs [8, 3, 3, 5]"),
    "missing": (dict(vision=VISION), "sound is absent"),
    "stranger": (dict(vision=VISION, sound=SOUND, action=np.zeros((4, 64))), "no such stream"),
    "name": (dict(video=VISION), "holds 'video'; the names are vision"),
    "NaN": (dict(vision=VISION * np.nan, sound=SOUND), "vision holds numbers that are not finite"),
    "too large": (dict(vision=VISION + np.float64(1e300), sound=SOUND), "vision holds numbers that are not finite"),
    "whole numbers": (dict(vision=VISION.astype(int), sound=SOUND), "vision must be an array of floating-point"),
    "objects": (dict(vision=np.array([{}], object)), "is not an .npz file of plain arrays"),
    "fresh": (dict(vision=VISION, sound=SOUND, vision_fresh=VISION[None]), "no step adds fresh noise here"),
}


@pytest.mark.parametrize("name", NOISES)
def test_wrong_noise_is_a_sentence(name, generate, cases, tmp_path, capsys):
    given, words = NOISES[name]
    np.savez(tmp_path / "noise.npz", **given)
    code = generate(cases["i2v_sound_fps10"], f"--noise={tmp_path / 'noise.npz'}")
    refused(capsys, tmp_path, code, words)


def test_noise_that_is_no_npz_is_a_sentence(generate, cases, tmp_path, capsys):
    np.save(tmp_path / "alone.npy", VISION)
    np.savez(tmp_path / "good.npz", vision=VISION, sound=SOUND)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bits.npz").write_bytes(whole[:200] + bytes(b ^ 255 for b in whole[200:300]) + whole[300:])
    (tmp_path / "words.npz").write_text("vision")
    for name in ("alone.npy", "cut.npz", "bits.npz", "words.npz", "nowhere.npz", "request"):
        (tmp_path / "request").mkdir(exist_ok=True)
        code = generate(cases["i2v_sound_fps10"], f"--noise={tmp_path / name}")
        refused(capsys, tmp_path, code, f"--noise={tmp_path / name}")


def test_what_does_not_go_together_is_a_sentence(generate, cases, tmp_path, capsys):
    t2i = cases["t2i"]
    refused(capsys, tmp_path, generate(t2i, num_outputs=2), "--dump-latents are for one result, but", "asks for 2")
    refused(capsys, tmp_path, generate(cases["ask"]), "answered in words; leave out --noise and --dump-latents")
    refused(capsys, tmp_path, generate(t2i, "--task=text2image"), "--task does not go with --request")
    (tmp_path / "file").write_text("")
    code = generate(t2i, f"--dump-latents={tmp_path / 'file' / 'x.npz'}", dump=False)
    refused(capsys, tmp_path, code, "--dump-latents", "file is a file")
    refused(capsys, tmp_path, generate(t2i, f"--out={tmp_path / 'file' / 'deep'}"), "--out", "file is a file")


def test_one_bad_line_of_a_batch_stops_all(batch, checkpoint, tmp_path, capsys):
    lines = (batch.where / "all.jsonl").read_text().splitlines()
    lines.insert(2, json.dumps(json.loads(lines[0]) | {"name": "bad", "guidance": "high"}))
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(lines))
    code = main(["generate", f"--checkpoint={checkpoint}", f"--request={path}", f"--out={tmp_path / 'out'}"])
    refused(capsys, tmp_path, code, "all.jsonl, line 3: guidance")


def test_what_does_not_fit_is_refused_before_anything_is_read(baseline, generate, cases, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "free_memory", lambda: 100_000)
    with watched() as seen:
        code = generate(cases["i2v_sound_fps10"])
    refused(capsys, tmp_path, code, "needs", "free: use bfloat16 weights, fewer frames")
    assert not (seen.loaded or seen.encoded)


def test_a_write_that_fails_leaves_no_half_of_a_file(generate, cases, tmp_path, monkeypatch):
    def torn(path, *_):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(outputs.media, "write_png", torn)
    with pytest.raises(OSError, match="disk is full"):
        generate(cases["t2i"], dump=False)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
