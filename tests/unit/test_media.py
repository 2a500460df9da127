"""Files survive the round trip: pictures, frame counts and rates, the moment of a sound, actions; clear refusals."""

import io

import numpy as np
import pytest

from cosmos_jax import media

RATE, FPS = 8000, 10


def clip(frames=17, size=64):
    """A bright square that moves one pixel a frame over a gradient."""
    y, x = np.mgrid[:size, :size]
    video = np.broadcast_to((np.stack([y, x, 0 * x], -1) * 2).astype(np.uint8), (frames, size, size, 3)).copy()
    for t in range(frames):
        video[t, 20:36, 10 + t : 26 + t] = (220, 40, 40)
    return video


def click(at=0.8, seconds=1.7):
    wave = np.zeros((2, int(seconds * RATE)), np.float32)
    t = np.arange(RATE // 5) / RATE
    wave[:, int(at * RATE) : int(at * RATE) + len(t)] = 0.8 * np.sin(2 * np.pi * 700 * t) * np.exp(-14 * t)
    return wave


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def onset(wave, rate):
    return float(np.argmax(np.abs(wave).max(0) > 0.2)) / rate


def test_png_is_exact_and_enlarged(tmp_path):
    image = clip(1)[0]
    media.write_png(tmp_path / "a.png", image, scale=3)
    back = media.read_image(tmp_path / "a.png")
    assert back.shape == (192, 192, 3)
    np.testing.assert_array_equal(back[::3, ::3], image)


@pytest.mark.parametrize("frames", [1, 17])
def test_mp4_keeps_frames_rate_and_picture(tmp_path, frames):
    video = clip(frames)
    media.write_mp4(tmp_path / "a.mp4", video, FPS, scale=4)
    back, fps = media.read_video(tmp_path / "a.mp4")
    assert back.shape == (frames, 256, 256, 3)
    assert fps == pytest.approx(FPS)
    assert psnr(media.fit(back, 64, 64), video) > 35


def test_mp4_takes_fractional_rates_and_odd_sides(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", clip(5)[:, :63, :61], 23.976)
    back, fps = media.read_video(tmp_path / "a.mp4")
    assert back.shape == (5, 64, 62, 3)
    assert fps == pytest.approx(23.976, abs=1e-3)


def test_sound_is_synchronous_with_the_picture(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", clip(), FPS, click(at=0.8), RATE)
    back = media.read_sound(tmp_path / "a.mp4", RATE)
    assert len(back) == 2
    assert back.shape[1] / RATE == pytest.approx(1.7, abs=0.06)
    assert onset(back, RATE) == pytest.approx(0.8, abs=0.005)
    assert media.read_video(tmp_path / "a.mp4")[0].shape == (17, 64, 64, 3)


def test_wav_keeps_the_waveform(tmp_path):
    wave = click()
    media.write_wav(tmp_path / "a.wav", wave, RATE)
    back = media.read_sound(tmp_path / "a.wav", RATE)
    np.testing.assert_allclose(back, wave, atol=1e-4)


def test_actions_keep_their_digits(tmp_path):
    actions = np.random.default_rng(0).normal(size=(16, 10)).astype(np.float32)
    media.write_actions(tmp_path / "a.json", actions, FPS)
    np.testing.assert_array_equal(media.read_actions(tmp_path / "a.json"), actions)


def test_fit_covers_and_crops_the_centre():
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    np.testing.assert_array_equal(media.fit(wide, 64, 64), np.full((64, 64, 3), 200))
    video = clip(3)
    np.testing.assert_array_equal(media.fit(media.enlarge(video, 4), 64, 64), video)


@pytest.mark.parametrize(
    ("read", "name"),
    [(media.read_image, "a.png"), (media.read_video, "a.mp4"), (lambda p: media.read_sound(p, RATE), "a.wav"),
     (media.read_actions, "a.json")],
)  # fmt: skip
def test_a_missing_or_wrong_file_is_one_sentence_that_names_it(tmp_path, read, name):
    with pytest.raises(media.MediaError, match=rf"{name} does not exist"):
        read(tmp_path / name)
    (tmp_path / name).write_text("not what it says")
    with pytest.raises(media.MediaError, match=f"{name} is not"):
        read(tmp_path / name)


def test_a_file_without_the_stream_is_named(tmp_path):
    media.write_wav(tmp_path / "a.wav", click(), RATE)
    with pytest.raises(media.MediaError, match=r"a\.wav has no video"):
        media.read_video(tmp_path / "a.wav")
    media.write_mp4(tmp_path / "a.mp4", clip(5), FPS)
    with pytest.raises(media.MediaError, match=r"a\.mp4 has no sound"):
        media.read_sound(tmp_path / "a.mp4", RATE)


def test_the_same_clip_is_the_same_file():
    rng = np.random.RandomState(0)
    clip = rng.randint(0, 255, (9, 6, 8, 3)).astype(np.uint8).repeat(8, 1).repeat(10, 2)
    sound = (rng.standard_normal((2, 270)) * 0.1).astype(np.float32)
    made = set()
    for _ in range(12):
        for wave in (sound, None):
            out = io.BytesIO()
            media.write_mp4(out, clip, 10.0, wave, 300)
            made.add(out.getvalue())
    assert len(made) == 2
