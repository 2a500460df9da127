"""Promises of the command line: mistakes end with code 2 and one sentence before anything compiles; files are written.

A tiny untrained model stands in for a trained one; everything runs in this process.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from cosmos_jax import media
from cosmos_jax import state as states
from cosmos_jax.__main__ import main
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.cli.options import read_config
from cosmos_jax.codecs import toy
from cosmos_jax.pipeline import Pipeline
from data_pipelines.action import ActionStats
from data_pipelines.tokenizer import ChatTokenizer
from data_pipelines.toy_world import codecs
from data_pipelines.toy_world.episodes import make_episode
from data_pipelines.toy_world.samples import ToyAssets

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIDE = toy.CANVAS.height
CONFIG = str(ROOT / "configs" / "toy.py")
TINY = [
    ("model.layers", "1"), ("model.hidden", "32"), ("model.heads", "2"), ("model.kv_heads", "1"),
    ("model.head_dim", "16"), ("model.rope_sections", "(4,2,2)"), ("model.mlp", "32"), ("model.vision.layers", "1"),
    ("model.vision.hidden", "16"), ("model.vision.heads", "1"), ("model.vision.mlp", "16"),
    ("sample.steps", "2"), ("sample.max_new_tokens", "4"), ("data.episodes", "8"), ("train.steps", "2"),
    ("train.log_every", "1"), ("train.checkpoint_every", "2"), ("train.sample_every", "2"),
    ("train.tensorboard", "False"), ("data.bucket.rows", "1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A directory with assets, fitted to a few episodes to save time."""
    where = tmp_path_factory.mktemp("assets") / toy.DIRECTORY
    stats = ActionStats.fit(np.concatenate([make_episode(i).actions for i in range(20)]))
    ToyAssets(*codecs.fit(20), stats, ChatTokenizer()).save(where)
    return where


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, assets):
    """What a training run leaves behind."""
    where = tmp_path_factory.mktemp("run")
    (where / toy.DIRECTORY).symlink_to(assets)
    config = read_config(CONFIG, TINY)
    with Checkpoints(where / "checkpoints") as checkpoints:
        checkpoints.save(1, states.init(config), {}, config, toy.fingerprints(toy.prepare(where)))
    return where


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Media of one episode, as a user has them: enlarged, compressed."""
    where, e = tmp_path_factory.mktemp("media"), make_episode(3)
    media.write_png(where / "image.png", e.video[0], scale=4)
    media.write_mp4(where / "video.mp4", e.video, e.fps, scale=4)
    media.write_mp4(where / "short.mp4", e.video[:3], e.fps)
    media.write_mp4(where / "even.mp4", e.video[:16], e.fps)
    media.write_actions(where / "actions.json", e.actions, e.fps)
    media.write_actions(where / "narrow.json", e.actions[:, :9], e.fps)
    media.write_actions(where / "odd.json", e.actions[:15], e.fps)
    media.write_actions(where / "centimetres.json", 100 * e.actions, e.fps)
    return where


compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
)


def fails(capsys, words, *says):
    """The command ends with code 2 and one line on stderr that says all this; nothing was compiled."""
    before = len(compilations)
    assert main([str(w) for w in words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    for s in says:
        assert s in err, err
    assert len(compilations) == before


def generate(workdir, task, *more):
    return ["generate", f"--checkpoint={workdir}", f"--task={task}", *more]


def test_argument_errors_come_at_once():
    """Before jax is imported, which takes seconds."""
    command = [sys.executable, "-X", "importtime", "-m", "cosmos_jax", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'train'" in done.stderr and "Traceback" not in done.stderr
    assert "argparse" in done.stderr and not re.search(r"\| +(jax|flax)$", done.stderr, re.M)


def test_mistakes_in_the_config(capsys, tmp_path):
    train = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}"]
    fails(capsys, [*train, "--config.modle.layers=3"], "config.modle", "did you mean 'model'")
    fails(capsys, [*train, "--config.data.mixture.resaon=1"], "unknown task 'resaon'", "did you mean 'reason'")
    fails(capsys, [*train, "--config.mesh.tp=3"], "does not fit 1 devices")
    fails(capsys, ["train", f"--config={CONFIG}"], "train needs --workdir")
    assert not list(tmp_path.iterdir())


def test_a_model_the_toy_world_does_not_fit(capsys, tmp_path, assets):
    (tmp_path / toy.DIRECTORY).symlink_to(assets)
    train = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}"]
    fails(capsys, [*train, "--config.model.sound_dim=8"], "model.sound_dim=8", "is 16")
    fails(capsys, [*train, "--config.model.action_dim=4"], "model.action_dim=4", "at least 10")


def test_mistakes_with_checkpoints(capsys, tmp_path, workdir, assets):
    out = f"--out={tmp_path / 'out'}"
    fails(capsys, generate(tmp_path / "nowhere", "text2image", "--prompt=a", out), "no directory", "nowhere")
    fails(capsys, generate(tmp_path, "text2image", "--prompt=a", out), "no checkpoint", str(tmp_path))
    other = [f"--config={CONFIG}", "--config.model.layers=7"]
    fails(capsys, ["evaluate", f"--workdir={workdir}", *other], "model.", "trained with")
    torn = tmp_path / "checkpoints" / "5"
    torn.mkdir(parents=True)
    fails(
        capsys,
        generate(tmp_path, "text2image", "--prompt=a", out),
        "damaged",
        "step 5: _CHECKPOINT_METADATA is missing",
    )


def test_assets_of_another_run(capsys, tmp_path, workdir, assets):
    for f in ("checkpoints",):
        (tmp_path / f).symlink_to(workdir / f)
    (tmp_path / toy.DIRECTORY).mkdir()
    for f in assets.iterdir():
        text = f.read_bytes()
        (tmp_path / toy.DIRECTORY / f.name).write_bytes(text.replace(b'"floor": 0.01', b'"floor": 0.02'))
    fails(capsys, generate(tmp_path, "text2image", "--prompt=a", "--out=x"), "holds actions", "put back the assets")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("text2vidoe", "--prompt=a"), ("unknown task 'text2vidoe'", "did you mean 'text2video'")),
        (("text2video",), ("needs a prompt",)),
        (("text2video", "--prompt=a", "--num_frames=16"), ("num_frames is 16", "1 + 4k", "use 13 or 17")),
        (("text2video", "--prompt=a", "--image={}/image.png"), ("takes no image", "image2video")),
        (("text2video", "--prompt=a", "--sound"), ("makes no sound",)),
        (("text2video", "--prompt=a", "--steps=0"), ("steps=0", "at least 1")),
        (("text2video", "--prompt=a", "--solver=ode"), ("solver='ode'", "unipc")),
        (("text2image", "--prompt=a", "--num_frames=5"), ("makes one frame", "text2video")),
        (("image2video", "--prompt=a"), ("needs an image",)),
        (("image2video", "--prompt=a", "--image={}/nope.png"), ("nope.png does not exist",)),
        (("image2video", "--image={}/actions.json"), ("actions.json is not a picture",)),
        (("video2video", "--prompt=a", "--video={}/short.mp4"), ("conditions on 5 frames", "has 3")),
        (("inverse_dynamics", "--video={}/even.mp4"), ("length of the video is 16", "1 + 4k", "13 or 17")),
        (("inverse_dynamics", "--video={}/video.mp4", "--actions={}/actions.json"), ("takes no actions",)),
        (("forward_dynamics", "--image={}/image.png"), ("needs actions",)),
        (("forward_dynamics", "--image={}/image.png", "--actions={}/narrow.json"), ("9 channels", "10")),
        (("forward_dynamics", "--image={}/image.png", "--actions={}/odd.json"), ("is 16", "13 or 17")),
        (("forward_dynamics", "--image={}/image.png", "--actions={}/centimetres.json"), ("limit 5", "statistics")),
        (("forward_dynamics", "--image={}/image.png", "--actions={}/image.png"), ("image.png is not JSON",)),
        (("policy", "--image={}/image.png"), ("needs a prompt", "instruction")),
        (("reason", "--prompt=a"), ("needs an image or a video",)),
        (("text2video", "--prompt=a", "--precision=bfloat16"), ("--precision goes with --request",)),
        (("text2video", "--prompt=a", "--prompt-convention=framework"), ("--prompt-convention goes with",)),
    ],
)
def test_mistakes_in_a_request(capsys, tmp_path, workdir, files, words, says):
    words = [w.replace("{}", str(files)) for w in words]
    fails(capsys, generate(workdir, *words, f"--out={tmp_path / 'out'}"), *says)
    assert not (tmp_path / "out").exists()


REQUESTS = {
    "reason": (("--prompt=How many pucks are there?", "--video={}/video.mp4"), {"answer.txt"}),
    "text2image": (("--prompt=a red puck",), {"image.png"}),
    "text2video": (("--prompt=a red puck",), {"video.mp4"}),
    "text2video_sound": (("--prompt=a red puck",), {"video.mp4", "sound.wav"}),
    "image2video": (("--prompt=it moves", "--image={}/image.png", "--no-sound"), {"video.mp4"}),
    "video2video": (("--prompt=it moves", "--video={}/video.mp4"), {"video.mp4", "sound.wav"}),
    "forward_dynamics": (("--image={}/image.png", "--actions={}/actions.json"), {"video.mp4"}),
    "inverse_dynamics": (("--video={}/video.mp4",), {"actions.json"}),
    "policy": (("--prompt=push the red puck", "--image={}/image.png"), {"actions.json", "video.mp4"}),
}


@pytest.mark.parametrize("task", REQUESTS)
def test_generate_writes_the_promised_files(tmp_path, workdir, files, task):
    words, expected = REQUESTS[task]
    words = [w.replace("{}", str(files)) for w in words]
    assert main(generate(workdir, task, *words, f"--out={tmp_path}", "--seed=5")) == 0
    assert {p.name for p in tmp_path.iterdir()} == expected | {"run.json"}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["task"] == task and run["seed"] == 5 and "seed" not in run["defaults"]
    assert set(run["files"]) == expected
    if "video.mp4" in expected:
        video, fps = media.read_video(tmp_path / "video.mp4")
        assert video.shape == (17, 4 * SIDE, 4 * SIDE, 3) and fps == 10 and run["num_frames"] == 17
    if "sound.wav" in expected:
        assert media.read_sound(tmp_path / "sound.wav", 8000).shape == (2, 13600)
        assert media.read_sound(tmp_path / "video.mp4", 8000).shape[1] >= 13600
    if "actions.json" in expected:
        assert media.read_actions(tmp_path / "actions.json").shape == (16, 10)
    if "image.png" in expected:
        assert media.read_image(tmp_path / "image.png").shape == (4 * SIDE, 4 * SIDE, 3)


def test_conditions_come_back(workdir, files):
    """The first frame of a continuation is the given picture, up to the codec."""
    pipeline = Pipeline.load(workdir)
    image = media.fit(media.read_image(files / "image.png"), SIDE, SIDE)
    sample = pipeline.request("image2video", "it moves", image=image, sound=False)
    made = pipeline.generate([sample], steps=2)[0]
    codec = pipeline.assets.video
    np.testing.assert_array_equal(made.latents["vision"][:, :1], codec.encode(image[None]))
    np.testing.assert_array_equal(made.video[0], codec.decode(codec.encode(image[None]))[0])


def test_a_sample_is_the_same_alone_and_in_company(workdir):
    pipeline = Pipeline.load(workdir)
    samples = [pipeline.request("text2image", p) for p in ("a red puck", "two blue pucks by the wall", "none")]
    together = pipeline.generate(samples, seeds=[7, 8, 9])
    alone = pipeline.generate(samples[1:2], seeds=[8])[0]
    np.testing.assert_allclose(alone.latents["vision"], together[1].latents["vision"], atol=1e-4)
    other = pipeline.generate(samples[1:2], seeds=[9])[0]
    assert np.abs(other.latents["vision"] - alone.latents["vision"]).max() > 0.1


def test_reason_answers_on_the_console(capsys, workdir, files):
    assert main(["reason", f"--checkpoint={workdir}/checkpoints", f"--image={files}/image.png", "--prompt=What?"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_show_counts_without_allocating(capsys):
    assert main(["show", f"--config={ROOT / 'configs' / 'nano.py'}"]) == 0
    out = capsys.readouterr().out
    assert "15,173,669,120 without the vision encoder" in out
    assert "vision 920 clean + 43,240 noisy | action 188 noisy" in out


def test_train_and_continue(capsys, tmp_path, assets):
    (tmp_path / toy.DIRECTORY).symlink_to(assets)
    words = ["train", f"--config={CONFIG}", f"--workdir={tmp_path}", *(f"--config.{k}={v}" for k, v in TINY)]
    assert main(words) == 0
    assert compilations  # `fails` would have noticed
    assert media.read_image(tmp_path / "samples" / "step_2.png").shape == (2 * 4 * SIDE, 2 * 5 * SIDE, 3)
    assert main([*words, "--config.train.steps=3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    stored = json.loads((tmp_path / "checkpoints" / "3" / "assets" / "data.json").read_text())
    assert stored == toy.fingerprints(toy.prepare(tmp_path))
    assert dataclasses.asdict(Pipeline.load(tmp_path).config)["train"]["steps"] == 3
    fails(capsys, [*words, "--config.model.layers=2"], "model.layers=1", "model.layers=2")
