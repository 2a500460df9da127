"""The network against diffusers' `Cosmos3OmniTransformer`: velocities of every task, both streams layer by layer.

In: a loader of the reference; our params and config. Out: rows. `golden` runs PyTorch and keeps numpy arrays, so that
its model can be released before ours is loaded; `check` runs ours, and may be given a wrong config, wrong parameters or
a wrong batch to see whether the rows notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from conversion import configs, omni
from cosmos_jax.config import ModelConfig
from cosmos_jax.model import cosmos, rope
from cosmos_jax.parity import inputs, reference, rows, walk
from cosmos_jax.parity.rows import Row
from cosmos_jax.precision import HIGHEST, Precision

NAME, FULL = "transformer", "everything"  # the case whose layers are compared
PROBE = "eps probe"
HALF_SAMPLES = 8  # one sample has 48 action numbers: too few for a ratio of errors to mean anything
LATENTS = ("vision_tokens", "sound_tokens", "action_tokens")
SMALL = (  # what the eps probe scales by 1e-2: then the norms' eps decides the result
    "embed_tokens", "proj_in", "linear_2", "modality_embed", "down_proj", "to_q", "to_k", "to_v", "to_out", "add_q",
    "add_k", "add_v", "to_add_out",
)  # fmt: skip
PUBLISHED = ((3, 4.3e-7), (8, 1.1e-6), (36, 1.4e-6))  # layers → torch32 against torch64 (spec reference_parity.md §4.1)
Change = Callable[[dict], dict]


@dataclass
class Run:
    """One forward of the reference."""

    velocity: dict[str, np.ndarray]
    und: list[np.ndarray] = field(default_factory=list)  # [U,D] before each layer, and after the last
    gen: list[np.ndarray] = field(default_factory=list)  # [G,D]


@dataclass
class Golden:
    """All that the reference says: `runs[case]`, the same in float64 where that fits, the probe, bfloat16."""

    config: dict
    cases: dict[str, dict]
    runs: dict[str, Run] = field(default_factory=dict)
    runs64: dict[str, Run] = field(default_factory=dict)
    half: list[tuple[dict, Run, Run]] = field(default_factory=list)  # inputs, bfloat16, float32 on its weights
    tables: tuple[np.ndarray, np.ndarray] | None = None  # cos, sin [S,head_dim]
    time: np.ndarray | None = None  # [D]


def run(model: reference.Model, kw: dict, layers: bool = False) -> Run:
    """The reference on one sample."""
    u = kw["und_len"]
    kw = reference.feed(kw, model)
    stops = {f"{i}": m for i, m in enumerate(model.layers)} | {"und": model.norm, "gen": model.norm_moe_gen}
    with reference.exact(), reference.taps(stops if layers else {}, before=True) as seen:
        out = model(**kw)
    parts = {"vision": out.sample, "sound": out.sound, "action": out.action}
    done = Run({n: reference.numpy(x[0][0] if n == "vision" else x[0]) for n, x in parts.items() if x is not None})
    if layers:
        streams = [seen[f"{i}"][0][:2] for i in range(len(model.layers))] + [(seen["und"][0][0], seen["gen"][0][0])]
        done.und, done.gen = [s[0][:u] for s in streams], [s[1] for s in streams]
    return done


def shrink(model: reference.Model) -> reference.Model:
    """The reference with small activations (in place)."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(s in name for s in SMALL):
                p.mul_(1e-2)
    return model


def cases(config: dict) -> dict[str, dict]:
    """Inputs of every task that the model of this config can do."""
    acts = {n: kw for n, kw in inputs.CASES.items() if "dynamics" not in n or config["action_gen"]}
    return {name: inputs.inputs(config, **kw) for name, kw in acts.items()}


def golden(load: reference.Load) -> Golden:
    """Run the reference: float32, float64 where it fits, the eps probe, bfloat16."""
    model = load(torch.float32)
    g = Golden(dict(model.config), cases(dict(model.config)))
    kw = g.cases[FULL]
    g.runs = {name: run(model, c, layers=name == FULL) for name, c in g.cases.items()}
    g.tables, g.time = _tables(model, kw)
    doubles = reference.fits_float64(sum(p.numel() for p in model.parameters()))
    g.runs[PROBE] = run(shrink(model), kw, layers=True)
    del model
    reference.release()
    if doubles:
        model = load(torch.float64)
        g.runs64 = {name: run(model, c, layers=name == FULL) for name, c in g.cases.items()}
        g.runs64[PROBE] = run(shrink(model), kw, layers=True)
        del model
    reference.release()
    draws = [inputs.inputs(g.config, seed=seed) for seed in range(HALF_SAMPLES)]
    model = load(torch.bfloat16)
    halves = [run(model, c) for c in draws]
    model = model.float()  # the same weights, fed what the bfloat16 model saw
    g.half = [(c, a, run(model, _rounded(c))) for c, a in zip(draws, halves, strict=True)]
    del model
    reference.release()
    return g


def _rounded(kw: dict) -> dict:
    """Latents rounded to bfloat16, as float32."""
    return {k: [x.bfloat16().float() for x in v] if k in LATENTS else v for k, v in kw.items()}


def _tables(model: reference.Model, kw: dict) -> tuple[Any, np.ndarray]:
    """(cos, sin) of every position, and the row of the timestep."""
    kw = reference.feed(kw, model)
    with reference.exact():
        cos, sin = model.rotary_emb(kw["position_ids"].unsqueeze(1), kw["position_ids"].device, torch.float32)
        t = torch.tensor([inputs.TIMESTEP], device=cos.device) * model.config.timestep_scale
        time = model.time_embedder(model.time_proj(t))
    return (reference.numpy(cos)[0], reference.numpy(sin)[0]), reference.numpy(time)[0]


def params(model: reference.Model, cfg: ModelConfig) -> dict:
    return reference.params(model, omni.entries(cfg), omni.part(cosmos.abstract(cfg)))


def model_config(config: dict) -> ModelConfig:
    return configs.diffusers_transformer({k: v for k, v in config.items() if k != "_use_default_values"})


@functools.partial(jax.jit, static_argnames=("cfg", "precision"))
def apply(params: dict, cfg: ModelConfig, batch: dict, timesteps, precision: Precision) -> cosmos.Output:
    """`cosmos.apply` of a batch whose `*_x0` are the noised latents."""
    noised = {n: batch[f"{n}_x0"] for n in ("vision", "action", "sound")}
    return cosmos.apply(params, cfg, batch, noised, timesteps, precision=precision)


def times(kw: dict) -> np.ndarray:
    return np.full((1, inputs.BUCKET.segments), inputs.timestep(kw), np.float32)


def velocity(params, cfg: ModelConfig, kw: dict, precision: Precision = HIGHEST, change: Change = dict) -> dict:
    """Ours, in the reference's layouts."""
    out = apply(params, cfg, change(inputs.batch(kw, cfg)), times(kw), precision)
    return inputs.to_reference(out.velocity, kw, cfg)


def shrunk(params: dict, cfg: ModelConfig) -> dict:
    """`shrink`, on our side."""
    small = {e.path for e in omni.entries(cfg) if any(s in e.source for s in SMALL)}
    scale = lambda path, x: x * np.float32(1e-2) if tuple(k.key for k in path) in small else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(scale, params)


def floor(layers: int) -> float:
    """The published noise floor of a model of so many layers, interpolated like the thresholds."""
    x, y = zip(*PUBLISHED, strict=True)
    return float(np.interp(np.log(layers), np.log(x), y))


def check(g: Golden, params: dict, cfg: ModelConfig, change: Change = dict) -> list[Row]:
    """All rows. `change` is applied to every batch of ours."""
    out = _tables_rows(g, params, cfg, change)
    out += layer_rows(g, params, cfg, FULL, change)
    for name in g.cases:
        out += velocity_rows(g, params, cfg, name, rows.by_depth(cfg.layers), change)
    small = shrunk(params, cfg)
    out += layer_rows(g, small, cfg, PROBE, change) + velocity_rows(g, small, cfg, PROBE, rows.PROBE, change)
    return out + half_rows(g, params, cfg, change)


def _tables_rows(g: Golden, params: dict, cfg: ModelConfig, change: Change) -> list[Row]:
    kw = g.cases[FULL]
    batch, u = change(inputs.batch(kw, cfg)), kw["und_len"]
    n, where = kw["sequence_length"], (NAME, "tables")
    positions = np.concatenate([batch["und_positions"][:, :, :u], batch["gen_positions"][:, :, : n - u]], 2)
    cos, sin = (np.asarray(x)[0] for x in rope.tables(jnp.asarray(positions), cfg.rope_theta, cfg.rope_sections))
    t = np.full((1, 1), inputs.timestep(kw), np.float32)
    ours = jax.jit(lambda p, t: cosmos._model(p, cfg).io.time(t, cfg.timestep_scale))(params, t)
    return [
        rows.compare((*where, "rotary cosines"), cos, g.tables[0], rows.TABLES),
        rows.compare((*where, "rotary sines"), sin, g.tables[1], rows.TABLES),
        rows.compare((*where, "row of the timestep"), np.asarray(ours)[0, 0], g.time, rows.TABLES),
    ]


def velocity_rows(g: Golden, params: dict, cfg: ModelConfig, name: str, limit: float, change: Change = dict):
    """Every modality of one case; what is a condition must come back as exact zeros."""
    kw, want = g.cases.get(name, g.cases[FULL]), g.runs[name].velocity
    ours, out = velocity(params, cfg, kw, change=change), []
    exact64 = g.runs64[name].velocity if name in g.runs64 else {}
    own = None if g.runs64 else floor(cfg.layers)
    for modality, b in want.items():
        where, a = (NAME, name, f"{modality} velocity"), ours[modality]
        if b.any():
            out.append(rows.compare(where, a, b, limit, exact64=exact64.get(modality), floor=own))
        if not b.all():
            still = (NAME, name, f"{modality}: conditions are 0")
            out.append(rows.exact(still, a[b == 0], b[b == 0]))
    return out


def layer_rows(g: Golden, params: dict, cfg: ModelConfig, name: str, change: Change = dict) -> list[Row]:
    """Both streams after each layer: on our own input (errors add up), and on the reference's (each layer alone)."""
    kw, want = g.cases.get(name, g.cases[FULL]), g.runs[name]
    run64, probe = g.runs64.get(name), name == PROBE
    part = "layers" if name == FULL else f"{name}: layers"
    batch = change(inputs.batch(kw, cfg))
    at = walk.start(params, cfg, batch, times(kw), precision=HIGHEST)
    layers = walk.Layers(params, cfg, at, HIGHEST)
    path, out = layers.walk(), []
    u, n = len(want.und[0]), len(want.gen[0])
    golden = [(_pad(a, at.und), _pad(b, at.gen)) for a, b in zip(want.und, want.gen, strict=True)]
    for i, (und, gen) in enumerate(path):
        alone = (und, gen) if i == 0 else layers(i - 1, *golden[i - 1])
        for k, (stream, count) in enumerate((("und", u), ("gen", n))):
            truth = (want.und, want.gen)[k][i]
            kw64 = {"exact64": (run64.und, run64.gen)[k][i]} if run64 else {"floor": floor(max(i, 1))}
            plot = f"{name if probe else 'float32'}: {stream} stream, after so many layers"
            limit = rows.PROBE if probe else max(rows.by_depth(i), rows.LAYER)
            what = f"{stream}: the embedding" if i == 0 else f"{stream}: after layer {i - 1}"
            ours = np.asarray((und, gen)[k])[0, :count]
            out.append(rows.compare(
                (NAME, part, what), ours, truth, limit, peaks=False, plot=plot, index=i, **kw64
            ))  # fmt: skip
            if i:
                out.append(rows.compare(
                    (NAME, part, f"{stream}: layer {i - 1} alone"), np.asarray(alone[k])[0, :count], truth,
                    rows.PROBE if probe else rows.LAYER, peaks=False, plot=plot, index=i, alone=True,
                ))  # fmt: skip
    ends, _ = walk.heads(params, cfg, batch, *path[-1], precision=HIGHEST)
    whole = apply(params, cfg, batch, times(kw), HIGHEST).velocity
    for modality in inputs.present(kw):
        where = (NAME, part, f"{modality}: layer by layer is the whole network")
        out.append(rows.compare(where, ends[modality], whole[modality], rows.TABLES, note="ours against ours"))
    return out


def _pad(x: np.ndarray, like) -> np.ndarray:
    """[n,D] as row 0 of a buffer like [1,N,D]."""
    return np.pad(x, ((0, like.shape[1] - len(x)), (0, 0)))[None].astype(np.float32)


def half_rows(g: Golden, params: dict, cfg: ModelConfig, change: Change = dict) -> list[Row]:
    """bfloat16 against float32 on the same rounded weights, over several samples."""
    ours = [velocity(params, cfg, kw, Precision("bfloat16", "highest"), change) for kw, _, _ in g.half]

    def row(m):
        triples = [(a[m], b.velocity[m], c.velocity[m]) for a, (_, b, c) in zip(ours, g.half, strict=True)]
        return rows.half((NAME, rows.BFLOAT16, f"{m} velocity"), *map(np.stack, zip(*triples, strict=True)))

    return [row(m) for m in ours[0]]
