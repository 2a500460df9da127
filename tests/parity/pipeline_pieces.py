"""`parity.pipeline.Ours` out of the pieces of this project, for text and pictures to video, sound included.

It shows that the protocol can be met, and takes every mistake of reference_parity.md §4.2 that is asked of it.
"""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cosmos_jax import media
from cosmos_jax.codecs import avae
from cosmos_jax.codecs.wan import vae
from cosmos_jax.model import cosmos
from cosmos_jax.parity import inputs, pipeline, run
from cosmos_jax.parity.pipeline_trace import Branch
from cosmos_jax.precision import HIGHEST, Precision
from cosmos_jax.sampling import generate, scheduler_config
from data_pipelines.packing import fill, plan, unpatchify
from data_pipelines.sample import Sample
from data_pipelines.schema import MODALITIES, Bucket
from data_pipelines.tokenizer import ChatTokenizer

BUCKET = Bucket(rows=1, und=144, gen=48, vision=24, action=0, sound=24, segments=1)
SYSTEM = "You are a helpful assistant who will generate videos from a give prompt."


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def cache(params, cfg, both, precision):
    return cosmos.und(params, cfg, both, precision=precision).cache


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def velocity(params, cfg, both, kv, x, t, precision):
    return cosmos.gen(params, cfg, both, x, jnp.full_like(both["segment_shift"], t), kv, precision=precision)


step = jax.jit(generate.solver_step)


@dataclasses.dataclass
class Checkpoint:
    """Loaded once for all requests."""

    folder: object
    precision: Precision = HIGHEST

    @functools.cached_property
    def params(self):
        return run.params(self.folder.components["transformer"])

    @functools.cached_property
    def cfg(self):
        return run.alone(self.folder.components["transformer"].config)

    @functools.cached_property
    def tokenizer(self):
        return ChatTokenizer.load(self.folder.path / "text_tokenizer")

    @functools.cached_property
    def vae(self):
        return run.params(self.folder.components["vae"]), self.folder.components["vae"].config

    @functools.cached_property
    def avae(self):
        part = self.folder.components["sound_tokenizer"]
        return avae.AVAECodec(run.params(part), part.config)

    def __call__(self, path, **mistakes):
        return Pieces(self, json.loads(path.read_text()), **mistakes)


class Pieces:
    """A request. The keyword arguments are mistakes."""

    def __init__(
        self, have, request, *, system=True, templates=True, vision_start=True, scheduler=None, native=False,
        float_timestep=False, guidance=None, combine=None, half_latents=False,
    ):  # fmt: skip
        self.have, self.request, self.domain = have, request, None
        self.guidance = request["guidance"] if guidance is None else guidance
        self.combine = combine or (lambda c, u, s: u + np.float32(s) * (c - u))
        self.half_latents = half_latents
        index = have.folder.index | ({"use_native_flow_schedule": True} if native else {})
        config = have.folder.scheduler | (scheduler or {})
        self.schedule = scheduler_config.of_checkpoint(config, index, request["num_steps"])[0]
        if float_timestep:
            self.schedule = self.schedule._replace(timesteps=self.schedule.sigmas[:-1].astype(np.float64) * 1000)
        self.sigmas, self.timesteps = self.schedule.sigmas, self.schedule.timesteps
        texts = request["prompt"], request["negative_prompt"]
        if templates:
            texts = [templated(request, text, negative=i > 0) for i, text in enumerate(texts)]
        turns = [("system", SYSTEM)] if system and have.folder.index.get("default_use_system_prompt", True) else []
        tok = have.tokenizer
        after = [tok.eos, tok.vision_start] if vision_start else [tok.eos]
        planned = [self.plan([*tok.chat([*turns, ("user", text)]), *after]) for text in texts]
        self.batches = [fill([[p]], BUCKET, have.cfg.sequence) for p in planned]
        self.both = jax.tree.map(lambda *x: np.concatenate(x), *self.batches)
        self.branches = {b: branch(p) for b, p in zip(("cond", "uncond"), planned, strict=True)}
        self.noisy = dict(planned[0].noisy)
        self.noisy["vision"] = self.noisy["vision"].reshape(self.clean.shape[1], -1)[:, 0]

    def plan(self, ids):
        r, spec = self.request, self.have.cfg.sequence
        task = "image2video" if "vision_path" in r else "text2video_sound" if r.get("enable_sound") else "text2video"
        sound = None
        if r.get("enable_sound"):
            cfg = self.have.avae.cfg
            samples = int(r["num_frames"] / r["fps"] * cfg.sampling_rate)
            sound = np.zeros((spec.sound_dim, -(-samples // cfg.hop)), np.float32)
        sample = Sample(task, "", vision_latents=self.clean, sound_latents=sound, fps=r["fps"])
        return plan(sample, types.SimpleNamespace(generation_ids=lambda *_: ids), spec)

    @functools.cached_property
    def clean(self):
        """The latents of the picture's clip, or zeros."""
        r, (params, cfg) = self.request, self.have.vae
        if "vision_path" not in r:
            frames = 1 + (r["num_frames"] - 1) // 4
            return np.zeros((cfg.z_dim, frames, r["height"] // 16, r["width"] // 16), np.float32)
        x = torch.from_numpy(media.read_image(r["vision_path"]).transpose(2, 0, 1)[None].astype(np.float32))
        h, w = x.shape[2:]
        scale = max(r["height"] / h, r["width"] / w)
        size = (int(np.ceil(scale * h)), int(np.ceil(scale * w)))
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True).round().clamp(0, 255) / 127.5 - 1
        top, left = (round((a - b) / 2) for a, b in zip(size, (r["height"], r["width"]), strict=True))
        x = x[0, :, top : top + r["height"], left : left + r["width"]].numpy().transpose(1, 2, 0)
        clip = np.repeat(x[None, None], r["num_frames"], 1)
        return np.asarray(vae.encode(params, cfg, clip, chunk=1))[0].transpose(3, 0, 1, 2)

    @functools.cached_property
    def kv(self):
        return cache(self.have.params, self.have.cfg, self.both, self.have.precision)

    def evaluate(self, x, i):
        """(branch → velocities, the guided ones), as buffers."""
        both = jax.tree.map(lambda a: jnp.concatenate([a, a]), x)
        t = np.float32(self.timesteps[i])
        v = jax.device_get(velocity(self.have.params, self.have.cfg, self.both, self.kv, both, t, self.have.precision))
        c, u = ({n: a[k : k + 1].astype(np.float32) for n, a in v.items()} for k in (0, 1))
        whole = {n: self.combine(c[n], u[n], self.guidance) if n in c else jnp.zeros_like(a) for n, a in x.items()}
        return {"cond": c, "uncond": u}, whole

    def after(self, state, v, i):
        state = step(state, v, {k: row[i] for k, row in self.schedule.rows().items()})
        if self.half_latents:
            state = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state)
        return state

    def forced(self, loop, latents, context, fresh):
        state = generate.start(self.buffers(latents[0]))
        for i, x in enumerate(latents):
            state = state._replace(x=self.buffers(x))
            v, whole = self.evaluate(state.x, i)
            state = self.after(state, whole, i)
            yield {b: self.arrays(a) for b, a in v.items()}, self.arrays(state.x)

    def free(self, noise, fresh):
        noisy = self.noisy["vision"][None, :, None, None]
        x = noise[0] | {"vision": np.where(noisy, noise[0]["vision"], self.clean)}
        state, path = generate.start(self.buffers(x)), [x]
        for i in range(len(self.timesteps)):
            state = self.after(state, self.evaluate(state.x, i)[1], i)
            path.append(self.arrays(state.x))
        params, cfg = self.have.vae
        video = vae.decode(params, cfg, path[-1]["vision"].transpose(1, 2, 3, 0)[None], chunk=1)
        wave = self.have.avae.decode(path[-1]["sound"]) if "sound" in self.noisy else None
        return pipeline.Made([path], [[]], np.asarray(video)[0] / 2 + 0.5, wave)

    def buffers(self, latents):
        return jax.tree.map(jnp.asarray, inputs.to_buffers(latents, self.batches[0], self.have.cfg))

    def arrays(self, buffers):
        found = {m: np.asarray(buffers[m])[0][self.batches[0][f"{m}_segment_ids"][0] >= 0] for m in self.noisy}
        out = {"vision": unpatchify(found["vision"], self.clean.shape, self.have.cfg.patch)}
        return out | ({"sound": found["sound"].T} if "sound" in found else {})


def templated(request, text, negative):
    """diffusers' sentences about length and size."""
    no = " not" if negative else ""
    seconds = request["num_frames"] / request["fps"]
    for sentence in (
        f"The video is{no} {seconds:.1f} seconds long and is{no} of {request['fps']:.0f} FPS.",
        f"This video is{no} of {request['height']}x{request['width']} resolution.",
    ):
        text = f"{text.rstrip('.')}. {sentence}" if text.rstrip(".") else sentence
    return text


def branch(planned):
    """Ids and positions, stream by stream, of a planned sample."""
    sizes = [planned.size[m] for m in MODALITIES]
    pieces = np.split(planned.gen_positions, np.cumsum(sizes)[:-1], 1)
    return Branch(
        planned.ids, {"text": planned.und_positions} | {m: p for m, p in zip(MODALITIES, pieces, strict=True) if p.size}
    )


def connect(folder, precision):
    """`parity.pipeline.Connect`."""
    return Checkpoint(folder, precision)
