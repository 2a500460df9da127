"""The sound tokeniser equals diffusers' on random weights (protocol §4.3), byte for byte on disk; mistakes show."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
from diffusers import Cosmos3AVAEAudioTokenizer
from parity import oracle

from conversion import avae as names
from conversion.check import check, shapes
from conversion.tree import from_torch, to_torch
from cosmos_jax.codecs import avae, avae_params
from cosmos_jax.codecs.avae import AVAECodec, AVAEConfig, from_diffusers
from cosmos_jax.parity import tiny
from cosmos_jax.parity.tiny import SOUND as TINY

NARROW = dict(enc_dim=4, dec_dim=2, vocoder_input_dim=6, enc_latent_dim=12)  # everything else as released
ENCODE, DECODE = 2e-6, 3e-6  # relL2, protocol §4.3
RELEASED_WIDTHS = dict(enc_dim=192, dec_dim=320, vocoder_input_dim=64, enc_latent_dim=128)


@functools.cache
def reference(narrow: bool = False) -> Cosmos3AVAEAudioTokenizer:
    return tiny.sound_tokenizer(NARROW if narrow else TINY)


def state() -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in reference().state_dict().items()}


CFG = from_diffusers(TINY)


@functools.cache
def params() -> dict:
    return from_torch(names.entries(CFG), state())


def clip(samples: int) -> np.ndarray:
    return (0.6 * np.tanh(oracle.rng(f"wave {samples}").standard_normal((2, samples)))).astype(np.float32)


def noise(count: int) -> np.ndarray:
    return oracle.rng(f"latents {count}").standard_normal((6, count)).astype(np.float32)


@torch.no_grad()
def torch_encode(wave, model=None):
    return (model or reference()).encode(torch.from_numpy(wave)[None]).latent_dist.mean[0].numpy()


@torch.no_grad()
def torch_decode(latents, model=None):
    return (model or reference()).decoder(torch.from_numpy(latents)[None])[0].numpy()


def ours_encode(wave, **kw):
    return np.asarray(jax.jit(lambda p, w: avae.encode(p, CFG, w, **kw))(params(), wave.T[None]))[0].T


def ours_decode(latents, **kw):
    return np.asarray(jax.jit(lambda p, z: avae.decode_raw(p, CFG, z, **kw))(params(), latents.T[None]))[0].T


def test_the_released_structure_with_narrow_layers_equals_diffusers():
    """All strides, taps and the 64-sample spectra of the released tokeniser, 2,000 samples = 2 latents."""
    cfg, model = from_diffusers(NARROW), reference(True)
    tree = from_torch(names.entries(cfg), {k: v.numpy() for k, v in model.state_dict().items()})
    codec = AVAECodec(tree, cfg)
    assert cfg.hop == 1920 and dataclasses.replace(cfg, **RELEASED_WIDTHS) == AVAEConfig()
    latents = codec.encode(clip(2000))
    assert latents.shape == (6, 2) and oracle.relative(latents, torch_encode(clip(2000), model))[0] <= ENCODE
    got = np.asarray(avae.decode_raw(tree, cfg, noise(2).T[None]))[0].T
    assert got.shape == (2, 3840) and oracle.relative(got, torch_decode(noise(2), model))[0] <= DECODE


@pytest.mark.parametrize("samples", [1, 12, 13, 300, 295])
def test_encoding_equals_diffusers(samples):
    ours, want = ours_encode(clip(samples)), torch_encode(clip(samples))
    assert ours.shape == want.shape == (6, -(-samples // 12)) and ours.dtype == np.float32
    assert oracle.relative(ours, want)[0] <= ENCODE


@pytest.mark.parametrize("count", [1, 2, 25])
def test_decoding_equals_diffusers_before_the_clip(count):
    ours, want = ours_decode(noise(count)), torch_decode(noise(count))
    assert ours.shape == want.shape == (2, 12 * count) and ours.dtype == np.float32
    assert oracle.relative(ours, want)[0] <= DECODE


def test_a_clip_does_not_depend_on_its_neighbours():
    loud, quiet = clip(300), 0.1 * clip(295)
    quiet = np.pad(quiet, ((0, 0), (0, 5)))
    both = np.asarray(avae.encode(params(), CFG, jnp.stack([loud.T, quiet.T])))
    for row, wave in zip(both, (loud, quiet), strict=True):
        assert oracle.relative(row.T, torch_encode(wave))[0] <= ENCODE


def test_the_codec_keeps_the_protocol():
    codec = AVAECodec(params(), CFG)
    wave = clip(295)
    latents = codec.encode(wave)
    assert codec.channels == 6 and latents.shape == (6, 25) and latents.dtype == np.float32
    assert oracle.relative(latents, torch_encode(wave))[0] <= ENCODE
    with torch.no_grad():
        want = reference().decode(torch.from_numpy(40 * latents)[None])[0].numpy()  # loud enough to be clipped
    out = codec.decode(40 * latents, 295)
    assert out.shape == (2, 295) and out.dtype == np.float32 and np.abs(out).max() == 1.0
    assert oracle.relative(out, want[:, :295])[0] <= DECODE
    assert np.isfinite(codec.encode(np.zeros((2, 24), np.float32))).all()  # silence has no peak to divide by


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda c: c.encode(np.zeros((1, 24), np.float32)), "stereo"),
        (lambda c: c.encode(np.zeros(24, np.float32)), "stereo"),
        (lambda c: c.encode(np.zeros((2, 0), np.float32)), "empty"),
        (lambda c: c.encode(np.zeros((2, 24), np.int16)), "int16"),
        (lambda c: c.encode(np.full((2, 24), np.nan, np.float32)), "finite"),
        (lambda c: c.decode(np.zeros((5, 2), np.float32)), r"\[6, T\]"),
        (lambda c: c.decode(np.zeros((6, 0), np.float32)), "at least one"),
        (lambda c: c.decode(np.zeros((6, 2))), "float64"),
        (lambda c: c.decode(np.full((6, 2), np.inf, np.float32)), "finite"),
        (lambda c: c.decode(np.zeros((6, 2), np.float32), 25), "samples=25"),
        (lambda c: avae.encode(c.params, c.cfg, jnp.zeros((1, 24, 1))), "stereo"),
        (lambda c: avae.encode(c.params, c.cfg, jnp.zeros((1, 24, 2), jnp.int32)), "int32"),
        (lambda c: avae.encode({"decoder": {}}, c.cfg, jnp.zeros((1, 24, 2))), "only decode"),
        (lambda c: avae.decode(c.params, c.cfg, jnp.zeros((1, 6, 2))), r"\[B, T, 6\]"),
    ],
)
def test_what_cannot_be_coded_is_named(call, word):
    with pytest.raises(ValueError, match=word):
        call(AVAECodec(params(), CFG))


def test_the_map_has_every_tensor_of_the_released_tokeniser_and_every_parameter_once():
    cfg, source = AVAEConfig(), published.tensors("audio_avae")
    assert shapes(names.entries(cfg), avae.abstract(cfg)) == source and list(source) == [
        e.source for e in names.entries(cfg)
    ]  # in order
    assert len(source) == 249 and check(names.entries(cfg), source, avae.abstract(cfg)) == {}
    ours = jax.tree.leaves(avae.abstract(cfg))
    assert sum(x.size for x in ours) == 496_287_362 and {x.dtype for x in ours} == {np.dtype(np.float32)}


def test_one_second_of_the_released_tokeniser_is_25_latents():
    """Shapes only: nothing is allocated."""
    cfg = AVAEConfig()
    for samples, count in ((48_000, 25), (48_001, 26)):
        wave = jax.ShapeDtypeStruct((1, samples, 2), jnp.float32)
        assert jax.eval_shape(lambda p, w: avae.encode(p, cfg, w), avae.abstract(cfg), wave).shape == (1, count, 64)
    latents = jax.ShapeDtypeStruct((1, 25, 64), jnp.float32)
    out = jax.eval_shape(lambda p, z: avae.decode(p, cfg, z), avae.abstract(cfg), latents)
    assert out.shape == (1, 48_000, 2) and out.dtype == jnp.float32


def test_a_round_trip_is_byte_identical():
    source = state()
    back = to_torch(names.entries(CFG), jax.tree.map(jnp.asarray, params()))
    assert {k: (v.shape, v.tobytes()) for k, v in back.items()} == {
        k: (v.shape, v.tobytes()) for k, v in source.items()
    }


def test_fresh_parameters_fit_and_weight_norm_changes_nothing_at_first():
    small = dict(enc_num_blocks=1, enc_c_mults=[1], enc_strides=[2], dec_c_mults=[1], dec_strides=[4], hop_size=4)
    cfg = from_diffusers(TINY | small)
    tree = avae.init(cfg, jax.random.key(0))
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, tree, avae.abstract(cfg))
    assert jax.tree.all(same)
    for p, axis in ((tree["decoder"]["block_0"]["up"], 1), (tree["decoder"]["conv_in"], 2)):
        np.testing.assert_allclose(avae._weight(p, axis), p["v"], rtol=1e-6)
    codec = AVAECodec(tree, cfg)
    assert np.isfinite(codec.decode(codec.encode(clip(25)), 25)).all()


def test_the_config_of_a_checkpoint_is_read_or_refused():
    assert from_diffusers(dict(Cosmos3AVAEAudioTokenizer(**TINY).config)) == CFG
    assert AVAEConfig().hop == 1920 and from_diffusers({"hop_size": 1920}).hop == 1920
    with pytest.raises(ValueError, match="decode"):
        AVAECodec({"decoder": params()["decoder"]}, from_diffusers(TINY | {"encoder_enabled": False})).encode(clip(24))
    for change, word in (
        ({"snake_logscale": False}, "snake_logscale=False"), ({"causal": True}, "causal=True"),
        ({"latent_mean": 0.5}, "latent_mean"), ({"bottleneck": {"type": "fsq"}}, "bottleneck"),
        ({"dec_width": 3}, "dec_width"), ({"_class_name": "AutoencoderOobleck"}, "Oobleck"),
        ({"enc_strides": [2, 2]}, "enc_strides"), ({"hop_size": 24}, "hop_size=24"), ({"enc_n_fft": 9}, "enc_n_fft"),
        ({"dec_c_mults": [1, 2]}, "dec_c_mults"), ({"enc_latent_dim": 6}, "enc_latent_dim"),
        ({"dec_dim": 0}, "dec_dim"),
        ({"stereo": False}, "stereo"), ({"normalize_volume": 1}, "normalize_volume"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            from_diffusers(TINY | change)


def plain_snake(p, x):
    alpha = jnp.exp(p["alpha"])
    return x + jnp.sin(alpha * x) ** 2 / alpha


def linear_snake(p, x):
    return x + jnp.sin(p["alpha"] * x) ** 2 / (p["beta"] + 1e-9)


def symmetric_window(n):
    ratio = np.hanning(n)[1:-1] / (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n))[1:-1]
    basis = FOURIER(n)
    basis[1:-1] *= ratio[:, None]
    basis[-1] = 0
    return basis


FOURIER, CONV, SPECTRA, LENGTH = avae._fourier, avae._conv, avae._spectra, avae_params.length
MISTAKES = {  # name: (attribute, replacement, least relL2 when encoding, when decoding; None: not touched)
    "alpha used for beta": ("_snake", plain_snake, 0.05, 0.3),
    "snake without logarithms": ("_snake", linear_snake, 0.3, 1.0),
    "g ignored": ("_weight", lambda p, axis: p["v"], 0.15, 0.15),
    "g over the wrong axis": ("length", lambda v, axis: LENGTH(v, 1 if axis == 2 else 2), 0.3, 0.7),
    "dilations reversed": ("DILATIONS", (9, 3, 1), None, 0.3),
    "LayerNorm eps 1e-6": ("NORM_EPS", 1e-6, 1e-4, None),
    "no volume normalisation": ("config", dict(normalize_volume=False), 0.1, None),
    "peak eps 0": ("PEAK_EPS", 0.0, 1e-5, None),
    "peak 1": ("PEAK", 1.0, 2e-2, None),
    "symmetric window": ("_fourier", symmetric_window, 0.1, None),
    "conjugate spectrum": ("_fourier", lambda n: FOURIER(n) * np.repeat([1, -1], n // 2 + 1), 0.5, None),
    "real and imaginary parts interleaved": (
        "_fourier",
        lambda n: FOURIER(n).reshape(n, 2, -1).swapaxes(1, 2).reshape(n, -1),
        0.5,
        None,
    ),
    "channels interleaved": (
        "_spectra",
        lambda w, c: SPECTRA(w, c).reshape(*w.shape[:1], -1, 2, c.enc_n_fft + 2).swapaxes(2, 3).reshape(1, -1, 20),
        0.5,
        None,
    ),
    "transposed kernel not flipped": (
        "_conv",
        lambda x, k, *a, spread=1, **kw: CONV(x, k[::-1] if spread > 1 else k, *a, spread=spread, **kw),
        None,
        0.4,
    ),
    "transposed convolution cropped one sample too early": (
        "_conv",
        lambda x, k, *a, pad=(0, 0), spread=1, **kw: CONV(
            x, k, *a, pad=(pad[0] + 1, pad[1] - 1) if spread > 1 else pad, spread=spread, **kw
        ),
        None,
        0.4,
    ),
}


def mistaken_order(tree):
    """The dilation is which unit it belongs to; reversed dilations give each unit another one's."""
    return {
        k: v | {f"residual_{d}": v[f"residual_{e}"] for d, e in ((1, 9), (9, 1))} if k.startswith("block") else v
        for k, v in tree.items()
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_plausible_mistakes_exceed_the_thresholds(name, monkeypatch):
    """Each bug of the protocol (§4.2) and more; five times the threshold at least."""
    attribute, replacement, *least = MISTAKES[name]
    tree, cfg = params(), CFG
    if attribute == "DILATIONS":
        tree = tree | {"decoder": mistaken_order(tree["decoder"])}
    elif attribute == "config":
        cfg = dataclasses.replace(CFG, **replacement)
    else:
        monkeypatch.setattr(avae, attribute, replacement)
    wave, latents = clip(300), noise(25)
    for reached, limit, got, want in (
        (least[0], ENCODE, lambda: avae.encode(tree, cfg, wave.T[None]), lambda: torch_encode(wave)),
        (least[1], DECODE, lambda: avae.decode_raw(tree, cfg, latents.T[None]), lambda: torch_decode(latents)),
    ):
        if reached is not None:
            error = oracle.relative(np.asarray(got())[0].T, want())[0]
            print(f"{name}: relL2 {error:.1e}, {error / limit:,.0f} times the threshold")
            assert error >= reached >= 5 * limit


def test_without_output_padding_the_wave_is_too_short(monkeypatch):
    """An odd stride then loses a sample; nothing is left to compare."""

    def narrower(p, x, precision, stride):
        pad = 2 * stride - 1 - math.ceil(stride / 2)
        return avae._biased(p, avae._conv(x, avae._weight(p, 1)[::-1], precision, pad=(pad, pad), spread=stride))

    monkeypatch.setattr(avae, "_wn_conv_up", narrower)
    assert avae.decode_raw(params(), CFG, noise(25).T[None]).shape[1] < torch_decode(noise(25)).shape[1]
