"""Pixels that condition: against diffusers and against torch's resampling as the framework calls it."""

import math
import types

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from data import diffusers_oracle as oracle
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _preprocess_conditioning_image

from data_pipelines import conditioning
from data_pipelines.conditioning import clip, edit_source, image, observation
from data_pipelines.resample import smooth

GREY = 1 / 127.5  # one grey level
FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # torch's sums round as ours
# sides that shrink at most twofold or grow: torch's own bits. Beyond, float32 sums differ in their last place.
EXACT = [
    ((120, 200), (96, 160)),
    ((48, 80), (160, 96)),
    ((90, 91), (64, 64)),
    ((96, 160), (96, 160)),
    ((33, 70), (48, 80)),
]
STRONG = [((300, 500), (64, 96)), ((200, 64), (48, 48))]


def picture(shape, frames=None, seed=0):
    """Noise over a ramp: ties and edges of every kind. uint8 [(T,) H, W, 3]."""
    shape = (*shape, 3) if frames is None else (frames, *shape, 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape)
    return ((noise + np.linspace(0, 255, shape[-2])[:, None]) / 2).astype(np.uint8)


def planes(x):
    """[T,H,W,3] → torch [T,3,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)


def pixels(x):
    """torch [1,3,T,H,W] → [T,H,W,3]."""
    return x[0].permute(1, 2, 3, 0).numpy()


def resized(x, size, mode):
    """torchvision's `resize` of a tensor: antialiased, in float32; 8 bits are rounded back."""
    y = F.interpolate(planes(x).float(), size=size, mode=mode, align_corners=False, antialias=True)
    return y.clamp(0, 255).round() if x.dtype == np.uint8 else y


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("old, new", EXACT + STRONG)
def test_smooth_equals_torch(old, new, kernel):
    x = picture(old).astype(np.float32)
    y = F.interpolate(planes(x[None]), size=new, mode=kernel, align_corners=False, antialias=True)
    ours, theirs = smooth(x, *new, kernel), y[0].permute(1, 2, 0).numpy()
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-4)  # of 255
    tie = np.abs(theirs % 1 - 0.5) < 3e-4
    assert (ours.round() == theirs.round())[~tie].all()


@pytest.mark.parametrize("source, size", EXACT + STRONG)
def test_image_equals_diffusers(source, size):
    x = picture(source)
    theirs = _preprocess_conditioning_image(PIL.Image.fromarray(x), *size)[0].permute(1, 2, 0).numpy()
    off = np.abs(image(x, *size)[0] - theirs)
    if FUSED and (source, size) in EXACT:
        assert off.max() == 0
    else:  # ties may be rounded the other way
        assert off.max() <= 1.01 * GREY and (off > 0).mean() < 1e-2


@pytest.mark.parametrize("keep, latents, frames", [("first", (0, 1), 9), ("last", (0, 2), 12), ("first", (1,), 3)])
@pytest.mark.parametrize("source, size", EXACT[:3])
def test_clip_equals_diffusers(source, size, keep, latents, frames):
    x = picture(source, frames)
    theirs = oracle.pipeline().video_processor.preprocess_video([PIL.Image.fromarray(f) for f in x], *size)
    need = 4 * max(latents) + 1
    theirs = pixels(theirs[:, :, :need] if keep == "first" else theirs[:, :, -need:])
    theirs = np.concatenate([theirs, np.repeat(theirs[-1:], need - len(theirs), 0)])
    ours = clip(x, *size, latents, keep=keep, convention="diffusers")
    np.testing.assert_array_equal(ours, theirs)
    assert len(ours) == need and ours.dtype == np.float32


@pytest.mark.parametrize("source, size", EXACT)
def test_clip_in_the_framework_covers_without_rounding(source, size):
    x = picture(source, 6)
    scale = max(size[0] / source[0], size[1] / source[1])
    big = [math.ceil(scale * n) for n in source]
    top, left = (round((b - n) / 2) for b, n in zip(big, size, strict=True))
    y = F.interpolate(planes(x).float(), size=big, mode="bilinear", align_corners=False, antialias=True)
    theirs = y[:5, :, top : top + size[0], left : left + size[1]].permute(0, 2, 3, 1).numpy() / 127.5 - 1
    np.testing.assert_allclose(clip(x, *size), theirs, rtol=0, atol=1e-6)
    if source != size and source[0] / source[1] != size[0] / size[1]:  # a stretch would differ
        assert np.abs(clip(x, *size) - clip(x, *size, convention="diffusers")).max() > 10 * GREY


SCENES = [
    ((96, 160), 256),
    ((200, 320), 256),
    ((380, 420), 256),
    ((250, 256), 256),
    ((30, 300), 256),
    ((640, 500), 480),
]


@pytest.mark.parametrize("source, tier", SCENES)
@pytest.mark.parametrize("frames, need", [(1, 1), (3, 5), (6, 5)])
def test_observation_equals_diffusers(source, tier, frames, need):
    x = picture(source, frames)
    theirs, size, *_ = oracle.pipeline()._prepare_action_video_conditioning(
        [PIL.Image.fromarray(f) for f in x], tier, need, device="cpu", dtype=torch.float32
    )
    ours = observation(x, tier, need, convention="diffusers")
    assert [*ours.canvas, *ours.content] == size.int().tolist()
    np.testing.assert_allclose(ours.pixels, pixels(theirs), rtol=0, atol=3e-6)
    cropped = oracle.pipeline()._remove_action_video_padding_from_latent(
        torch.zeros(1, 1, 1, ours.canvas[0] // 16, ours.canvas[1] // 16), size
    )
    assert cropped.shape[-2:] == ours.latents


@pytest.mark.parametrize("source, tier", SCENES)
def test_observation_in_the_framework_stays_in_8_bits(source, tier):
    """Its steps written out in torch: nearest shape of the tier, shrink only, round, continue right and below."""
    x = picture(source, 2)
    h, w = source
    ours = observation(x, tier, 3)
    th, tw = ours.canvas
    scale = min(tw / w, th / h, 1.0)
    content = int(scale * h + 0.5), int(scale * w + 0.5)
    assert ours.content == content
    y = resized(x, content, "bicubic") if content != source else planes(x).float()
    small = tw - content[1] >= content[1] or th - content[0] >= content[0]
    y = F.pad(y, (0, tw - content[1], 0, th - content[0]), mode="replicate" if small else "reflect")
    theirs = (y / 127.5 - 1).permute(0, 2, 3, 1).numpy()
    off = np.abs(ours.pixels - theirs[[0, 1, 1]])
    assert off.max() <= 1.01 * GREY and (off > 0).mean() < 1e-3  # ties
    levels = (ours.pixels + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)


def test_edit_source_keeps_the_shape_of_its_picture():
    x = picture((90, 200))
    theirs = np.asarray(PIL.Image.fromarray(x).resize((512, 224), PIL.Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(edit_source(x)[0], theirs / np.float32(127.5) - np.float32(1))
    np.testing.assert_array_equal(edit_source(x, (64, 64)), image(x, 64, 64))


@pytest.mark.parametrize("fault", ["floor", "offset up", "no antialias", "not rounded", "stretched"])
def test_the_comparison_of_images_can_fail(fault, monkeypatch):
    if fault == "floor":
        monkeypatch.setattr(conditioning, "math", types.SimpleNamespace(ceil=math.floor))
    elif fault == "offset up":
        monkeypatch.setattr(conditioning, "round", lambda x: math.ceil(x), raising=False)
    elif fault == "not rounded":
        monkeypatch.setattr(conditioning, "_grey", lambda x: x)
    elif fault == "no antialias":
        flat = lambda x, h, w, _: F.interpolate(planes(x[None]), (h, w), mode="bilinear")[0].permute(1, 2, 0).numpy()  # noqa: E731
        monkeypatch.setattr(conditioning, "smooth", flat)
    else:
        monkeypatch.setattr(conditioning, "_covering", lambda x, h, w: smooth(x.astype(np.float32), h, w, "bilinear"))
    with pytest.raises((AssertionError, ValueError)):
        for case in EXACT:
            test_image_equals_diffusers(*case)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: image(np.zeros((4, 4)), 16, 16), "uint8"),
        (lambda: image(np.zeros((0, 4, 3), np.uint8), 16, 16), "uint8"),
        (lambda: clip(picture((16, 16), 5), 16, 16, keep="middle"), "'middle' is not known"),
        (lambda: clip(picture((16, 16), 5), 16, 16, ()), "must name latent frames"),
        (lambda: clip(picture((16, 16), 5), 16, 16, (-1,)), "must name latent frames"),
        (lambda: observation(picture((16, 16), 5), 300, 1), "300 is not a tier"),
        (lambda: observation(picture((16, 15), 5), 256, 1, convention="diffusers"), "smaller than one latent"),
    ],
)
def test_bad_pictures_are_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
