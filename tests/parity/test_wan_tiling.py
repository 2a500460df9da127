"""The Wan 2.2 video VAE tile by tile is the VAE of whole frames, in less memory."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import wan_oracle as oracle
from parity.oracle import relative, rng

from cosmos_jax.codecs.wan import WanCodec, WanConfig, bench, decode, encode, memory, network, vae
from cosmos_jax.codecs.wan.tiling import strips
from cosmos_jax.precision import HIGHEST

CFG = WanConfig.from_diffusers(oracle.TINY)
SAME = 1e-6  # relL2 against whole frames: another order of summation, nothing more
FRAMES = 9
# Latents per side. The decoder sees 13 latents far, so only a long frame has windows that no border shortens.
WIDE, TALL, ODD = (1, 40), (37, 2), (7, 11)


@pytest.fixture(scope="module")
def world():
    ref = oracle.reference()
    return types.SimpleNamespace(ref=ref, params=oracle.params(ref, CFG))


@functools.cache
def inputs(size):
    """Video and latents for frames of that many latents."""
    h, w = size
    video = np.tanh(rng("video").standard_normal((1, FRAMES, 16 * h, 16 * w, 3))).astype(np.float32)
    return {"encode": video, "decode": rng("latents").standard_normal((1, 3, h, w, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def run(world):
    """run(what, size, tile, chunk): what we make of `inputs(size)`. Kept."""

    @functools.cache
    def run(what, size, tile, chunk=1):
        ours = {"encode": encode, "decode": decode}[what]
        return np.asarray(ours(world.params, CFG, inputs(size)[what], HIGHEST, chunk, tile))

    return run


@pytest.mark.parametrize("what", ("encode", "decode"))
@pytest.mark.parametrize("size, tile", [(WIDE, 4), (TALL, 5), (ODD, 3)])
def test_tiles_make_what_whole_frames_and_the_reference_make(world, run, what, size, tile):
    tiled, whole, x = run(what, size, tile), run(what, size, None), inputs(size)[what]
    theirs, limit = {"encode": (oracle.encode, oracle.ENCODE), "decode": (oracle.decode, oracle.DECODE)}[what]
    own, (error, peak) = relative(tiled, whole)[0], relative(tiled, theirs(world.ref, x))
    print(f"{what} {size} tile {tile}: whole frames {own:.1e} (≤ {SAME:.0e}), diffusers {error:.1e}, peak {peak:.1e}")
    assert tiled.shape == whole.shape and own <= SAME
    assert error <= limit and peak <= oracle.PEAK


@pytest.mark.parametrize("what", ("encode", "decode"))
def test_a_tile_as_large_as_the_frame_changes_no_bit(run, what):
    np.testing.assert_array_equal(run(what, ODD, 11), run(what, ODD, None))


@pytest.mark.parametrize("what", ("encode", "decode"))
def test_pieces_and_prefixes_of_a_tiled_clip_change_no_bit(world, run, what):
    tiled, x = run(what, ODD, 4), inputs(ODD)[what]
    np.testing.assert_array_equal(run(what, ODD, 4, None), tiled)
    ours, some = (encode, 5) if what == "encode" else (decode, 2)
    first = np.asarray(ours(world.params, CFG, x[:, :some], HIGHEST, 1, 4))
    np.testing.assert_array_equal(first, tiled[:, : first.shape[1]])


def test_all_tiles_share_one_program(world):
    x = inputs(WIDE)["decode"]
    before = vae.compiled_piece._cache_size()
    decode(world.params, CFG, x, HIGHEST, 1, 3)  # 14 tiles
    assert vae.compiled_piece._cache_size() - before <= 4  # two halves, the first frame and the others


# ---------------------------------------------------------------------------------------- how far a stage sees


def seen(f, x, near, far=8):
    """How many pixels beside the one it stands on an output of f depends on: NaN in one pixel shows who looks there."""
    worst, n = 0, x.shape[3]
    for at in range(near, near + far):
        y = np.isnan(np.asarray(f(jnp.asarray(x).at[:, :, :, at].set(jnp.nan))))
        scale = y.shape[3] / n
        for out in np.flatnonzero(y.any((0, 1, 2, 4))):
            first, last = int(out // scale), int(-(-(out + 1) // scale)) - 1  # the input pixels below it
            worst = max(worst, first - at, at - last)
    return worst


@pytest.mark.parametrize("what", ("encoder", "decoder"))
def test_a_stage_sees_as_far_as_it_says_and_no_farther(world, what):
    p = world.params[what]
    halves, sights = {
        "encoder": (network.encoder_halves, network.encoder_sights),
        "decoder": (network.decoder_halves, network.decoder_sights),
    }[what]
    local = halves(p)[what == "decoder"]
    x = np.ones((1, 1, 2, 48, CFG.channels if what == "encoder" else CFG.decoder_dims[0]), np.float32)
    for (name, stage), sight in zip(local.items(), sights(p), strict=True):
        y = stage(jnp.asarray(x), None, HIGHEST)[0]
        distance = seen(lambda x, f=stage: f(x, None, HIGHEST)[0], x, 20, 2)
        print(f"{what} {name}: sees {distance} pixels of its input; {sight}")
        assert distance == sight.before + sight.after and y.shape[3] == 48 * sight.scale
        x = np.ones((1, 1, 2, 48, y.shape[-1]), np.float32)


def test_the_halos_of_all_stages_are_what_the_whole_half_sees(world):
    for what, halves, sights, unit in (
        ("encoder", network.encoder_halves(world.params["encoder"])[0], network.encoder_sights, 8),
        ("decoder", network.decoder_halves(world.params["decoder"])[1], network.decoder_sights, 1),
    ):
        channels = CFG.channels if what == "encoder" else CFG.decoder_dims[0]
        x = np.ones((1, 1, unit, 30 * unit, channels), np.float32)
        half = jax.jit(lambda x, s=halves: network.chain(s, x, None, HIGHEST)[0])
        distance = seen(half, x, 14 * unit, unit)
        strip = strips(1000, 1, sights(world.params[what]))[500]
        halo = (strip.sizes[0] - unit) / 2
        print(f"{what}: sees {distance} pixels = {distance / unit:.1f} latents; halo {halo}")
        assert distance == halo


# ---------------------------------------------------------------------------------------- the suite can fail


@pytest.mark.parametrize("what, stage", [("encode", 3), ("encode", 4), ("decode", 2), ("decode", 3), ("decode", 4)])
def test_too_small_a_halo_exceeds_the_threshold(world, run, monkeypatch, what, stage):
    """One stage that claims to see half as far."""
    name = f"{what}r_sights"
    true = getattr(network, name)

    def blind(p):
        sights = true(p)
        sights[stage] = sights[stage]._replace(before=sights[stage].before // 2)
        return sights

    monkeypatch.setattr(network, name, blind)
    ours = {"encode": encode, "decode": decode}[what]
    error = relative(ours(world.params, CFG, inputs(WIDE)[what], HIGHEST, 1, 4), run(what, WIDE, None))[0]
    print(f"{what}: stage {stage} sees too little: relL2 {error:.1e}")
    assert error > SAME


# ---------------------------------------------------------------------------------------- use


def test_the_codec_takes_a_tile(world, run):
    tiled, whole = (WanCodec(CFG, world.params, HIGHEST, tile=tile) for tile in (3, None))
    video = np.round((inputs(ODD)["encode"][0, :5] / 2 + 0.5) * 255).astype(np.uint8)
    latents = whole.encode(video)
    assert relative(tiled.encode(video), latents)[0] <= SAME
    wrong = np.abs(tiled.decode(latents).astype(int) - whole.decode(latents))
    assert wrong.max() <= 1 and (wrong > 0).mean() < 1e-3  # only where rounding was a tie


@pytest.mark.parametrize("tile", (0, -3, 2.5))
def test_a_tile_that_is_none_is_refused(world, tile):
    with pytest.raises(ValueError, match="latents per side is not possible; give at least 1, or None"):
        decode(world.params, CFG, inputs(ODD)["decode"], tile=tile)
    with pytest.raises(ValueError, match="latents per side"):
        encode(world.params, CFG, inputs(ODD)["encode"], tile=tile)
    with pytest.raises(ValueError, match="latents per side"):
        WanCodec(CFG, {}, HIGHEST, tile=tile)


def test_tiles_need_less_memory(capsys):
    bench.main(["--height", "480", "--width", "832", "--tile", "8"], CFG)
    print(capsys.readouterr().out)
    for what, less in (("encode", 2), ("decode", 5)):
        whole, tiled = (memory.measure(CFG, what, (30, 52), tile, HIGHEST) for tile in (None, 8))
        assert whole.temporary > less * tiled.temporary and whole.cache > 2 * tiled.cache
        assert tiled.work > whole.work  # the price
