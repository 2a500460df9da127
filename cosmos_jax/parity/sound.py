"""The sound tokeniser against diffusers' `Cosmos3AVAEAudioTokenizer`: latents, waves before the clip, every stage.

In: a loader of the reference; our params and config. Out: rows. The clip of the wave would hide errors, so it is left
out on both sides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from conversion.avae import entries
from cosmos_jax.codecs import avae
from cosmos_jax.codecs.avae import AVAEConfig
from cosmos_jax.parity import reference, rows
from cosmos_jax.parity.rows import Row
from cosmos_jax.precision import HIGHEST, Precision

NAME = "sound tokeniser"
LATENTS = 25  # a second: length of both inputs; the wave ends inside the last latent
FLOORS = {"encode": 2.7e-7, "decode": 5.4e-7}  # published: torch32 against torch64 (spec reference_parity.md §4.1)
LIMITS = {"encode": rows.ENCODE_SOUND, "decode": rows.DECODE_SOUND}


Golden = reference.Codec  # arrays are [B,T,C]


def config(g: Golden) -> AVAEConfig:
    return avae.from_diffusers({k: v for k, v in g.config.items() if not k.startswith("_")})


def params(model: reference.Model, cfg: AVAEConfig) -> dict:
    return reference.params(model, entries(cfg), avae.abstract(cfg))


def encode(model: reference.Model, wave: np.ndarray) -> np.ndarray:
    """[B,N,2] → the mean of the posterior [B,T,C]."""
    with reference.exact():
        return _last(model.encode(_first(wave, model)).latent_dist.mean)


def decode(model: reference.Model, latents: np.ndarray) -> np.ndarray:
    """[B,T,C] → [B,N,2], not clipped."""
    with reference.exact():
        return _last(model.decoder(_first(latents, model)))


def _first(x: np.ndarray, model) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))).to(model.device, model.dtype)


def _last(x: torch.Tensor) -> np.ndarray:
    return reference.numpy(x).swapaxes(1, 2)


def _modules(model: reference.Model, cfg: AVAEConfig) -> dict[str, dict[str, reference.Model]]:
    """The reference's modules under the names of `avae.encoder_stages` and `decoder_stages`."""
    d = model.decoder
    blocks = {f"block_{i}": m for i, m in enumerate(d.block)}
    found = {"decode": {"conv_in": d.conv1, **blocks, "conv_out": d.conv2}}
    if model.encoder is None:
        return found
    names = [f"stage_{i}.{n}" for i in range(len(cfg.enc_strides)) for n in _stage(cfg)]
    return {"encode": dict(zip(["conv_in", *names, "conv_out"], model.encoder.layers, strict=True))} | found


def _stage(cfg: AVAEConfig) -> list[str]:
    return [*(f"block_{j}" for j in range(cfg.enc_num_blocks)), "down"]


def _run(model: reference.Model, cfg: AVAEConfig, given: dict[str, np.ndarray]) -> tuple[dict, dict]:
    outputs, stages = {}, {}
    for what, modules in _modules(model, cfg).items():
        with reference.taps(modules) as seen:
            outputs[what] = (encode if what == "encode" else decode)(model, given[what])
        stages[what] = {n: calls[0][0].swapaxes(1, 2) for n, calls in seen.items()}
    return outputs, stages


def golden(load: reference.Load) -> Golden:
    """Run the reference: float32, float64 where it fits, bfloat16. Without an encoder there is only `decode`."""
    model = load(torch.float32)
    raw = dict(model.config)
    cfg = config(Golden(raw, {}, {}, {}))
    given = {
        "encode": np.tanh(0.6 * reference.draw("wave", 1, LATENTS * cfg.hop - cfg.hop // 3, 2)),
        "decode": reference.draw("sound latents", 1, LATENTS, cfg.vocoder_input_dim),
    }
    g = Golden(raw, given, *_run(model, cfg, given))
    if reference.fits_float64(sum(p.numel() for p in model.parameters())):
        g.outputs64, g.stages64 = _run(load(torch.float64), cfg, given)
    rough = {n: np.asarray(torch.from_numpy(x).bfloat16().float()) for n, x in given.items()}
    g.half, _ = _run(load(torch.bfloat16), cfg, rough)
    g.truth, _ = _run(reference.rounded(load), cfg, rough)
    del model
    reference.release()
    return g


def check(g: Golden, params: dict, cfg: AVAEConfig) -> list[Row]:
    """All rows."""
    out = []
    for what, want in g.outputs.items():
        ours = np.asarray(jax.jit(_ours(what, HIGHEST), static_argnums=1)(params, cfg, g.inputs[what]))
        own = {"exact64": g.outputs64[what]} if g.outputs64 else {"floor": FLOORS[what]}
        out += stage_rows(g, params, cfg, what)
        name = "latents" if what == "encode" else "wave, not clipped"
        out.append(rows.compare((NAME, what, name), ours, want, LIMITS[what], peaks=False, **own))
    return out + half_rows(g, params, cfg)


def _ours(what: str, precision: Precision):
    f = avae.encode if what == "encode" else avae.decode_raw
    return lambda params, cfg, x: f(params, cfg, x, precision=precision)


def stage_rows(g: Golden, params: dict, cfg: AVAEConfig, what: str) -> list[Row]:
    """Each stage; the encoder's first input is our own spectra, which the first row therefore includes."""
    make, x = avae.decoder_stages, jnp.asarray(g.inputs[what])
    if what == "encode":
        make, x = avae.encoder_stages, avae.spectra(x, cfg, HIGHEST)
    stages = make(params, cfg, HIGHEST)
    return rows.chain(NAME, what, stages, x, g.stages[what], g.stages64.get(what), FLOORS[what], LIMITS[what])


def half_rows(g: Golden, params: dict, cfg: AVAEConfig) -> list[Row]:
    """bfloat16 against float32 on the same rounded weights."""
    params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)), params)
    out = []
    for what in g.outputs:
        x = jnp.asarray(g.inputs[what]).astype(jnp.bfloat16).astype(jnp.float32)
        ours = jax.jit(_ours(what, Precision("bfloat16", "highest")), static_argnums=1)(params, cfg, x)
        name = "latents" if what == "encode" else "wave"
        out.append(rows.half((NAME, rows.BFLOAT16, f"{what}: {name}"), ours, g.half[what], g.truth[what]))
    return out
