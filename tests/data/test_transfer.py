"""Controls of transfer: chunks and windows against diffusers' modular steps, edges against what OpenCV gave."""

import hashlib
import types

import ml_dtypes
import numpy as np
import PIL.Image
import pytest
import torch
from data import diffusers_oracle as oracle
from diffusers.modular_pipelines.cosmos.before_encoder import Cosmos3TransferSetupStep
from diffusers.modular_pipelines.cosmos.encoders import Cosmos3TransferChunkVaeEncoderStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState

from data_pipelines import canny, transfer
from data_pipelines.conditioning import cover
from data_pipelines.transfer import chunks, compute, pixels, reflect, resize, seed, window

SIZE = (32, 48)
# cv2.Canny of opencv-python-headless 4.12.0 and 5.0.0 (equal): edge pixels, and sha256 of the uint8 map
OPENCV = {
    "very_low": (6315, "f189bd93a0556962"),
    "low": (4839, "cb4463378d468fb1"),
    "medium": (3163, "9451419d9ef452cb"),
    "high": (2610, "ef131963b5440d70"),
    "very_high": (1756, "f67bcd272c1fa6c6"),
}


def clip(frames, seed=0, shape=(40, 60)):
    return np.random.default_rng(seed).integers(0, 256, (frames, *shape, 3), dtype=np.uint8)


def blocks():
    """Flat tiles on a ramp, with noise: strong, weak and tied gradients. uint8 [120,160,3]."""
    rng = np.random.default_rng(0)
    x = np.kron(rng.integers(0, 256, (12, 16, 3)), np.ones((10, 10, 1), int))
    x = x // 2 + np.linspace(0, 100, 160)[:, None].astype(int) + rng.integers(-12, 13, x.shape)
    return np.clip(x, 0, 255).astype(np.uint8)


def diffusers_chunks(controls, total, per_chunk, overlap, first=0, video=None):
    """What its setup and chunk steps make: numbers of the plan, (controls, target, conditional frames) per chunk."""
    seen = []
    components = types.SimpleNamespace(
        _execution_device="cpu",
        transformer=types.SimpleNamespace(dtype=torch.float32),
        vae=oracle.VAE(),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=16,
        video_processor=oracle.pipeline().video_processor,
        _encode_video=lambda x: seen.append(x[0].permute(1, 2, 3, 0).numpy()) or x,
    )
    state = PipelineState()
    for name, value in {
        "control_videos": {k: [PIL.Image.fromarray(f) for f in v] for k, v in controls.items()},
        "height": SIZE[0], "width": SIZE[1], "num_frames": total, "num_video_frames_per_chunk": per_chunk,
        "num_conditional_frames": overlap, "num_first_chunk_conditional_frames": first,
        "video": video if video is None else [PIL.Image.fromarray(f) for f in video],
    }.items():  # fmt: skip
        state.set(name, value)
    Cosmos3TransferSetupStep()(components, state)
    made = []
    for i in range(state.get("num_chunks")):
        state.set("chunk_id", i)
        seen.clear()
        Cosmos3TransferChunkVaeEncoderStep()(components, state)
        made.append((seen[:-1], seen[-1], state.get("current_conditional_frames")))
        state.set("previous_output", torch.from_numpy(decoded(i, state.get("chunk_frames"))).permute(3, 0, 1, 2)[None])
    return [state.get(k) for k in ("total_frames", "chunk_frames", "num_chunks", "stride")], made


def decoded(chunk, frames):
    """What chunk number `chunk` is said to have become: float32 [frames, h, w, 3]."""
    return np.random.default_rng(100 + chunk).uniform(-1, 1, (frames, *SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "total, per_chunk, overlap, lengths",
    [
        (13, 5, 1, (13,)),
        (12, 7, 2, (12, 9)),
        (3, 9, 1, (3, 2)),
        (1, 9, 0, (1,)),
        (21, 9, 5, (21, 40)),
        (2, 17, 1, (2,)),
    ],
)
def test_chunks_equal_diffusers(total, per_chunk, overlap, lengths):
    controls = {hint: clip(n, i) for i, (hint, n) in enumerate(zip(("edge", "seg"), lengths, strict=False))}
    video = clip(overlap + 1, 9)
    numbers, made = diffusers_chunks(dict(reversed(controls.items())), total, per_chunk, overlap, overlap, video)
    plan = chunks(total, per_chunk, overlap)
    assert numbers == [plan.total, plan.frames, len(plan.starts), plan.stride if len(plan.starts) > 1 else plan.frames]
    assert plan.starts == tuple(range(0, numbers[2] * numbers[3], numbers[3]))
    hints = sorted(controls, key=transfer.HINTS.index)
    sized = [resize(controls[h], *SIZE, "diffusers") for h in hints]
    for i, (theirs, target, conditional) in enumerate(made):
        for x, y in zip(sized, theirs, strict=True):
            np.testing.assert_array_equal(pixels(window(x, plan, i), "diffusers"), y)
        if i == 0:
            begin = pixels(seed(resize(video, *SIZE, "diffusers"), min(overlap, plan.frames), "first"), "diffusers")
        else:
            begin = seed(decoded(i - 1, plan.frames), overlap)
        latent_frames = (conditional - 1) // 4 + 1 if conditional else 0
        assert len(begin) == max(0, 4 * (latent_frames - 1) + 1)
        np.testing.assert_array_equal(begin, target[: len(begin)])


def test_controls_in_the_framework_cover_and_are_rounded():
    x = clip(2, shape=(50, 50))
    np.testing.assert_array_equal(resize(x, *SIZE), cover(x, *SIZE))
    assert resize(x, *SIZE).shape == (2, *SIZE, 3)
    assert (resize(x, *SIZE) != resize(x, *SIZE, "diffusers")).mean() > 0.5
    np.testing.assert_array_equal(reflect(np.arange(3), 9), [0, 1, 2, 2, 1, 1, 2, 2, 1])
    np.testing.assert_array_equal(reflect(np.arange(1), 3), [0, 0, 0])


def test_pixels_in_bfloat16_have_torchs_two_roundings():
    grey = np.arange(256, dtype=np.uint8)
    theirs = (torch.from_numpy(grey).to(torch.bfloat16) / 127.5 - 1.0).float().numpy()
    np.testing.assert_array_equal(pixels(grey, dtype=ml_dtypes.bfloat16), theirs)
    assert 0.4 < np.abs(pixels(grey) - theirs).max() * 127.5 < 0.5  # grey levels


@pytest.mark.parametrize("preset", transfer.THRESHOLDS)
def test_edges_equal_opencv(preset):
    edges = compute("edge", blocks()[None], preset)
    assert edges.shape == (1, 120, 160, 3) and (edges == edges[..., :1]).all()
    one = np.ascontiguousarray(edges[0, ..., 0])
    assert set(np.unique(one)) == {0, 255}
    assert ((one > 0).sum(), hashlib.sha256(one.tobytes()).hexdigest()[:16]) == OPENCV[preset]


@pytest.mark.parametrize("fault", ["no hysteresis", "edge of zeros", "tan", "last of equals", "4 neighbours"])
def test_the_comparison_with_opencv_can_fail(fault, monkeypatch):
    if fault == "no hysteresis":
        monkeypatch.setattr(canny, "_grow", lambda seeds, allowed: seeds)
    elif fault == "edge of zeros":
        sobel = canny._sobel
        monkeypatch.setattr(
            canny, "_sobel", lambda x: tuple(d[1:-1, 1:-1] for d in sobel(np.pad(x, ((1, 1), (1, 1), (0, 0)))))
        )
    elif fault == "tan":
        monkeypatch.setattr(canny, "TAN_22", canny.TAN_22 - 60)
    elif fault == "last of equals":
        sobel = canny._sobel
        monkeypatch.setattr(canny, "_sobel", lambda x: sobel(x[..., ::-1]))
    else:
        monkeypatch.setattr(canny, "_grow", lambda s, a: s | (a & (np.roll(s, 1, 0) | np.roll(s, 1, 1))))
    with pytest.raises(AssertionError):
        for preset in transfer.THRESHOLDS:
            test_edges_equal_opencv(preset)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: compute("blur", clip(1)), "the control blur cannot be computed.*give its control_path"),
        (lambda: compute("depth", clip(1)), "the control depth cannot be computed"),
        (lambda: compute("edge", clip(1), "strong"), "'strong' is not known"),
        (lambda: chunks(100, 5, 5), "must be smaller than num_video_frames_per_chunk=5"),
        (lambda: chunks(0), "0 frames"),
        (lambda: reflect(clip(0), 3), "without frames"),
    ],
)
def test_bad_controls_are_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
    np.testing.assert_array_equal(compute("blur", clip(1), "none"), clip(1))
