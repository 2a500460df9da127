"""The video VAE against diffusers' `AutoencoderKLWan`: latents, pixels, and every stage of both networks.

In: a loader of the reference; our params and config. Out: rows. Latents are normalised as in `Cosmos3OmniPipeline`.
"""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import torch

from conversion.wan import entries
from cosmos_jax.codecs.wan import abstract, network, vae
from cosmos_jax.codecs.wan import layers as L
from cosmos_jax.codecs.wan.config import WanConfig
from cosmos_jax.parity import reference, rows
from cosmos_jax.parity.rows import Row
from cosmos_jax.precision import HIGHEST, Precision

NAME = "video VAE"
FRAMES, HEIGHT, WIDTH = 9, 32, 48  # 2×3 latents of 3 frames: not square, one side odd
FLOORS = {"encode": 5.7e-7, "decode": 7.6e-7}  # published: torch32 against torch64 (spec reference_parity.md §4.1)
LIMITS = {"encode": rows.ENCODE_VIDEO, "decode": rows.DECODE_VIDEO}
PSNR = 45.0  # dB, at least, in bfloat16


Golden = reference.Codec  # arrays are [B,T,H,W,C]


def params(model: reference.Model, cfg: WanConfig) -> dict:
    return reference.params(model, entries(cfg), abstract(cfg))


def _statistics(model: reference.Model) -> tuple[torch.Tensor, torch.Tensor]:
    kind = {"dtype": model.dtype, "device": model.device}
    mean = torch.tensor(model.config.latents_mean, **kind).view(1, -1, 1, 1, 1)
    return mean, (1.0 / torch.tensor(model.config.latents_std, **kind)).view(1, -1, 1, 1, 1)


def _channels_first(x: np.ndarray, model) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).to(model.device, model.dtype)


def _channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def encode(model: reference.Model, video: np.ndarray) -> np.ndarray:
    """[B,T,H,W,3] in −1 … 1 → normalised latents [B,t,h,w,z]."""
    mean, inverse = _statistics(model)
    with reference.exact():
        return _channels_last(
            reference.numpy((model.encode(_channels_first(video, model)).latent_dist.mode() - mean) * inverse)
        )


def decode(model: reference.Model, latents: np.ndarray) -> np.ndarray:
    """Normalised latents [B,t,h,w,z] → [B,T,H,W,3] in −1 … 1."""
    mean, inverse = _statistics(model)
    with reference.exact():
        return _channels_last(reference.numpy(model.decode(_channels_first(latents, model) / inverse + mean).sample))


RUN = {"encode": encode, "decode": decode}


def _modules(model: reference.Model) -> dict[str, dict[str, reference.Model]]:
    """The reference's modules under the names of `network.encoder_stages` and `decoder_stages`."""
    e, d = model.encoder, model.decoder
    down = {f"down_{i}": m for i, m in enumerate(e.down_blocks)}
    up = {f"up_{i}": m for i, m in enumerate(d.up_blocks)}
    return {
        "encode": {"conv_in": e.conv_in, **down, "mid": e.mid_block, "conv_out": e.conv_out},
        "decode": {"conv_in": d.conv_in, "mid": d.mid_block, **up, "conv_out": d.conv_out},
    }


def _run(model: reference.Model, given: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """(outputs, stages): the reference works through the clip in pieces, which are joined again here."""
    outputs, stages = {}, {}
    for what, modules in _modules(model).items():
        with reference.taps(modules) as seen:
            outputs[what] = RUN[what](model, given[what])
        stages[what] = {n: _channels_last(np.concatenate([c[0] for c in calls], 2)) for n, calls in seen.items()}
    return outputs, stages


def golden(load: reference.Load) -> Golden:
    """Run the reference: float32, float64 where it fits, bfloat16."""
    model = load(torch.float32)
    z = model.config.z_dim
    given = {
        "encode": np.tanh(reference.draw("video", 1, FRAMES, HEIGHT, WIDTH, 3)),
        "decode": reference.draw("latents", 1, 1 + FRAMES // 4, HEIGHT // 16, WIDTH // 16, z),
    }
    g = Golden(dict(model.config), given, *_run(model, given))
    if reference.fits_float64(sum(p.numel() for p in model.parameters())):
        g.outputs64, g.stages64 = _run(load(torch.float64), given)
    del model
    reference.release()
    half = load(torch.bfloat16)
    truth = copy.deepcopy(half).float()
    # the float32 copy must have the rounded statistics of the bfloat16 model, not better ones
    mean, inverse = (np.asarray(s, np.float64) for s in vae.statistics(config(g), jnp.bfloat16))
    truth.register_to_config(latents_mean=list(mean), latents_std=list(1 / inverse))
    for what, x in given.items():
        x = np.asarray(torch.from_numpy(x).bfloat16().float())
        g.half[what], g.truth[what] = RUN[what](half, x), RUN[what](truth, x)
    del half, truth
    reference.release()
    return g


def config(g: Golden) -> WanConfig:
    return WanConfig.from_diffusers({k: v for k, v in g.config.items() if not k.startswith("_")})


def check(g: Golden, params: dict, cfg: WanConfig) -> list[Row]:
    """All rows."""
    out = []
    for what, ours in (("encode", vae.encode), ("decode", vae.decode)):
        got, want = np.asarray(ours(params, cfg, g.inputs[what], HIGHEST)), g.outputs[what]
        own = {"exact64": g.outputs64[what]} if g.outputs64 else {"floor": FLOORS[what]}
        out += stage_rows(g, params, cfg, what)
        name = "latents" if what == "encode" else "pixels, clipped to −1 … 1"
        out.append(rows.compare((NAME, what, name), got, want, LIMITS[what], **own))
    return out + half_rows(g, params, cfg)


def stage_rows(g: Golden, params: dict, cfg: WanConfig, what: str) -> list[Row]:
    """The whole clip at once through each stage: what the reference computes in pieces (the two are equal, §2.1)."""
    part = params["encoder" if what == "encode" else "decoder"]
    make = network.encoder_stages if what == "encode" else network.decoder_stages
    stages = {name: lambda x, f=f: f(x, None, HIGHEST)[0] for name, f in make(part).items()}
    x = jnp.asarray(g.inputs[what])
    if what == "encode":
        x = L.patchify(x, cfg.patch_size)
    else:
        x = L.conv(params["post_quant"], vae.denormalise(x, cfg, jnp.float32), HIGHEST)
    return rows.chain(NAME, what, stages, x, g.stages[what], g.stages64.get(what), FLOORS[what], LIMITS[what])


def half_rows(g: Golden, params: dict, cfg: WanConfig) -> list[Row]:
    """bfloat16 against float32 on the same rounded weights; the picture must keep 45 dB."""
    out, precision = [], Precision("bfloat16", "highest")
    for what, step in (("encode", vae.encode_step), ("decode", vae.decode_step)):
        x = np.asarray(jnp.asarray(g.inputs[what]).astype(jnp.bfloat16).astype(jnp.float32))
        ours = np.asarray(jax.jit(step, static_argnums=(1, 4))(params, cfg, x, None, precision)[0])
        name = "latents" if what == "encode" else "pixels"
        out.append(rows.half((NAME, rows.BFLOAT16, f"{what}: {name}"), ours, g.half[what], g.truth[what]))
    error = np.abs(ours - g.truth["decode"]) / 2  # pixels lie in −1 … 1
    rms = float(np.sqrt(np.mean(error**2)))
    where = (NAME, rows.BFLOAT16, "decode: pixels, rms error as a share of the range")
    note = f"PSNR {-20 * np.log10(rms):.1f} dB, at least {PSNR:g}"
    return [*out, Row(*where, rms, float(error.max() / rms), 10 ** (-PSNR / 20), note=note)]
