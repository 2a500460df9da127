"""Sound that conditions: resampling against scipy, length and channels by hand."""

import math

import numpy as np
import pytest
from scipy.signal import resample_poly

from data_pipelines import waveform
from data_pipelines.waveform import condition, resample


def noise(channels, n, seed=0):
    return np.random.default_rng(seed).standard_normal((channels, n)).astype(np.float32)


@pytest.mark.parametrize("rate", [44_100, 22_050, 16_000, 96_000, 8_000, 11_025, 47_999])
@pytest.mark.parametrize("n", [1, 37, 5_001])
def test_resampling_equals_scipy(rate, n):
    x, common = noise(2, n), math.gcd(rate, 48_000)
    theirs = resample_poly(x, 48_000 // common, rate // common, axis=-1)
    ours = resample(x, rate, 48_000)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


@pytest.mark.parametrize("fault", ["BETA", "CROSSINGS"])
def test_the_comparison_with_scipy_can_fail(fault, monkeypatch):
    monkeypatch.setattr(waveform, fault, getattr(waveform, fault) + 1)
    with pytest.raises(AssertionError):
        test_resampling_equals_scipy(44_100, 5_001)


def test_length_and_channels():
    same = noise(2, 48_000)
    np.testing.assert_array_equal(condition(same, 48_000, frames=12, fps=24), same[:, :24_000])
    longer = condition(same, 48_000, frames=189, fps=24)
    assert longer.shape == (2, 378_000) and longer.dtype == np.float32
    assert (longer[:, 48_000:] == 0).all() and (longer[:, :48_000] == same).all()
    assert condition(same, 48_000, frames=25, fps=29.97).shape[1] == 40_040  # 40040.04 is cut
    mono = noise(1, 480)
    np.testing.assert_array_equal(condition(mono, 48_000, frames=1, fps=100), np.repeat(mono, 2, 0))
    stereo = condition(same, 48_000, frames=1, fps=100, channels=1)
    np.testing.assert_allclose(stereo[0], same[:, :480].mean(0), atol=1e-7)


@pytest.mark.parametrize("rate", [44_100, 96_000, 8_000])
def test_of_a_long_file_only_what_is_heard_is_resampled(rate):
    x = noise(2, rate)
    np.testing.assert_array_equal(
        condition(x, rate, frames=3, fps=24), condition(x[:, : rate // 4], rate, frames=3, fps=24)
    )
    np.testing.assert_array_equal(condition(x, rate, frames=3, fps=24), resample(x, rate, 48_000)[:, :6_000])


@pytest.mark.parametrize(
    "wave, rate, words",
    [
        (noise(1, 5)[0], 48_000, "must be float32"),
        (noise(2, 0), 48_000, "must be float32"),
        (noise(2, 5).astype(np.float64), 48_000, "must be float32"),
        (noise(2, 5) * np.nan, 48_000, "NaN"),
        (noise(6, 5), 48_000, "6 channels cannot become 2"),
        (noise(2, 5), 0, "0 samples per second"),
        (noise(2, 5), 10**9, "samples per second is not possible"),
    ],
)
def test_bad_sound_is_one_sentence(wave, rate, words):
    with pytest.raises(ValueError, match=words):
        condition(wave, rate, frames=5, fps=24)
