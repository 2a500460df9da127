"""The reasoners against transformers: vision encoder and text tower layer by layer, logits, an answer of 32 tokens.

In: a loader of `Qwen3VL…`, `Cosmos3Omni…` or `Cosmos3EdgeForConditionalGeneration`; our params and config. Out: rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion.reasoner import entries
from cosmos_jax.config import ModelConfig, SampleConfig
from cosmos_jax.model import cosmos
from cosmos_jax.parity import prompts, reference, rows, walk
from cosmos_jax.parity.prompts import Prompt
from cosmos_jax.parity.rows import Row
from cosmos_jax.precision import HIGHEST, Precision
from cosmos_jax.sampling import text

NAME, SEEN = "reasoner", "images"  # the case whose layers are compared
PROBE, NEW, NO_END = "eps probe", 32, (10**9,)
HALF_SAMPLES = 3  # of every case with pictures: a ratio of errors over few numbers means little
FLOORS = {True: 7.5e-7, False: 5.4e-7}  # published, with and without pictures (spec reference_parity.md §4.1)
SMALL = ("embed_tokens", "pos_embed", "position_embedding", "patch_embed", "attn.", "linear_fc2", "fc2", "down_proj")
Outputs = dict[str, np.ndarray]
Change = Callable[[dict], dict]


@dataclass
class Run:
    """One forward: "logits" [L,vocab], "features" [tokens,D], "tap 0" …; the streams before and after each layer."""

    outputs: Outputs
    text: list[np.ndarray] = field(default_factory=list)  # [L,D]
    sight: list[np.ndarray] = field(default_factory=list)  # [P,D]


@dataclass
class Golden:
    """All that the reference says."""

    cases: dict[str, Prompt]
    runs: dict[str, Run]
    positions: dict[str, np.ndarray]  # [3,L]
    answer: np.ndarray  # [32]
    tied: bool  # embed_tokens and lm_head are one tensor
    runs64: dict[str, Run] = field(default_factory=dict)
    probe: Run | None = None
    probe64: Run | None = None
    half: list[tuple[Prompt, Outputs, Outputs]] = field(default_factory=list)  # bfloat16; float32 on its weights


def run(model: reference.Model, p: Prompt, layers: bool = False) -> Run:
    """The reference on one prompt."""
    where = next(model.parameters())
    kw = prompts.torch_inputs(p, where.dtype, where.device)
    stops = _stops(model) if layers else {}
    out: dict[str, list[torch.Tensor]] = {}
    with reference.exact():
        with reference.taps(stops, before=True) as seen:
            out["logits"] = [model(**kw).logits[0]]
        for see, pixels, grid in (
            (model.model.get_image_features, "pixel_values", "image_grid_thw"),
            (model.model.get_video_features, "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels in kw:
                found = see(kw[pixels], kw[grid], return_dict=True)
                out.setdefault("features", []).extend(found.pooler_output)
                for i, tap in enumerate(getattr(found, "deepstack_features", None) or ()):
                    out.setdefault(f"tap {i}", []).extend([tap] if isinstance(tap, torch.Tensor) else tap)
    done = Run({k: reference.numpy(torch.cat(v)) for k, v in out.items()})
    if layers:
        done.text = [calls[0][0][0] for name, calls in seen.items() if name.startswith("text")]
        done.sight = [calls[0][0] for name, calls in seen.items() if name.startswith("sight")]
    return done


def _stops(model: reference.Model) -> dict[str, reference.Model]:
    """The reference's layers, and what follows the last, in order."""
    tower, eye = model.model.language_model, model.model.visual
    blocks, after = (eye.blocks, eye.merger) if hasattr(eye, "blocks") else (eye.encoder.layers, eye.post_layernorm)
    return {f"text {i}": m for i, m in enumerate([*tower.layers, tower.norm])} | {
        f"sight {i}": m for i, m in enumerate([*blocks, after])
    }


def shrink(model: reference.Model) -> reference.Model:
    """The eps probe: what is written into the two residual streams made small, so that the norms' eps decides."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(s in name for s in SMALL) and "norm" not in name:
                p.mul_(3e-3 if "visual" in name and "merger" not in name else 1e-2)
    return model


def golden(load: reference.Load, cfg: ModelConfig) -> Golden:
    """Run the reference: float32, float64 where it fits, the eps probe, bfloat16, greedy decoding."""
    model = load(torch.float32)
    marks = prompts.Marks.of(model.config)
    cases = {name: prompts.prompt(name, cfg, marks) for name in prompts.CASES}
    g = Golden(
        cases,
        {name: run(model, p, layers=name == SEEN) for name, p in cases.items()},
        {name: _positions(model, p) for name, p in cases.items() if p.pictures},
        _answer(model, cases[SEEN]),
        model.lm_head.weight is model.get_input_embeddings().weight,
    )
    doubles = reference.fits_float64(sum(p.numel() for p in model.parameters()))
    g.probe = run(shrink(model), cases[SEEN], layers=True)
    del model
    reference.release()
    if doubles:
        model = load(torch.float64)
        g.runs64 = {name: run(model, p, layers=name == SEEN) for name, p in cases.items()}
        g.probe64 = run(shrink(model), cases[SEEN], layers=True)
        del model
        reference.release()
    seen = [name for name, p in cases.items() if p.pictures]
    rough = [prompts.rounded(prompts.prompt(n, cfg, marks, seed)) for n in seen for seed in range(HALF_SAMPLES)]
    model = load(torch.bfloat16)
    halves = [run(model, p).outputs for p in rough]
    model = model.float()
    g.half = [(p, theirs, run(model, p).outputs) for p, theirs in zip(rough, halves, strict=True)]
    del model
    reference.release()
    return g


def _positions(model: reference.Model, p: Prompt) -> np.ndarray:
    known = {k: v for k, v in prompts.torch_inputs(p).items() if not k.startswith("pixel")}
    return reference.numpy(model.model.get_rope_index(**known)[0][:, 0])


def _answer(model: reference.Model, p: Prompt) -> np.ndarray:
    """32 greedy tokens by transformers' own `generate` and its cache."""
    kw = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    with reference.exact():
        made = model.generate(**prompts.torch_inputs(p, device=next(model.parameters()).device), **kw)
    return made[0, len(p.ids) :].cpu().numpy()


def whole(params: dict, cfg: ModelConfig) -> dict:
    """The reasoner's parameters as the tree that the model's functions take: the generator, which has no part in this,
    is a number in each place."""
    have = flatten_dict(params)
    lacking = {path: np.zeros((cfg.layers,) if path[0] == "layers" else (), np.float32)
               for path in flatten_dict(cosmos.abstract(cfg)) if path not in have}  # fmt: skip
    return unflatten_dict(have | lacking)


def compute(params: dict, cfg: ModelConfig, batch: dict, precision: Precision):
    """(logits, features, taps) of a batch, not compiled."""
    features, taps = cosmos.see(params, cfg, batch, precision=precision)
    hidden = cosmos.und(params, cfg, batch, precision=precision).hidden
    return cosmos.logits(params, cfg, hidden, precision=precision), features, taps


forward = jax.jit(compute, static_argnums=(1, 3))


def outputs(params, cfg: ModelConfig, batch: dict, p: Prompt, call=None, precision: Precision = HIGHEST) -> Outputs:
    """Ours, in the form of `Run.outputs`. call: `forward`, or a version of it that was compiled elsewhere."""
    logits, features, taps = (call or forward)(params, cfg, batch, precision)
    n = prompts.patches(p) // 4
    out = {"logits": np.asarray(logits)[0, : len(p.ids)]}
    if n:
        out["features"] = np.asarray(features)[0, :n]
        out |= {f"tap {i}": np.asarray(x)[0, :n] for i, x in enumerate(() if taps is None else taps)}
    return out


def check(g: Golden, params: dict, cfg: ModelConfig, change: Change = dict) -> list[Row]:
    """All rows. params: whole (see `whole`), float32. `change` is applied to every batch of ours."""
    out: list[Row] = []
    for name, want in g.positions.items():
        ours = change(prompts.batch(g.cases[name], cfg))["und_positions"][0, :, : want.shape[1]]
        out.append(rows.exact((NAME, "positions", name), ours, want))
    limit = max(rows.REASONER, rows.by_depth(cfg.layers))
    out += _layers(g.cases[SEEN], g.runs[SEEN], g.runs64.get(SEEN), params, cfg, "layers", limit, change)
    for name, p in g.cases.items():
        out += _output_rows(name, p, g.runs[name], g.runs64.get(name), params, cfg, limit, change)
    small = shrunk(params, cfg, g.tied)
    seen = g.cases[SEEN]
    out += _layers(seen, g.probe, g.probe64, small, cfg, f"{PROBE}: layers", rows.PROBE, change)
    out += _output_rows(PROBE, seen, g.probe, g.probe64, small, cfg, rows.PROBE, change)
    sample = SampleConfig(max_new_tokens=NEW)
    batch = change(prompts.batch(seen, cfg))
    made = text.generate_text(params, cfg, batch, sample, eos=NO_END, precision=HIGHEST)
    distinct = len(set(g.answer.tolist()))
    note = f"{distinct} different tokens"
    out.append(
        rows.exact((NAME, "answer", f"{NEW} greedy tokens about two images"), np.asarray(made)[0], g.answer, note)
    )
    return out + half_rows(g, params, cfg, change)


def shrunk(params: dict, cfg: ModelConfig, tied: bool = False) -> dict:
    """`shrink`, on our side: the same tensors under our names. tied: the scaled embedding is lm_head too."""
    small = {}
    for e in entries(cfg):
        if any(s in e.source for s in SMALL) and "norm" not in e.source:
            small[e.path] = 3e-3 if "visual" in e.source and "merger" not in e.source else 1e-2
    if tied:
        small[("lm_head",)] = 1e-2
    return unflatten_dict({path: x * np.float32(small.get(path, 1.0)) for path, x in flatten_dict(params).items()})


def _output_rows(part: str, p: Prompt, want: Run, want64: Run | None, params, cfg, limit, change: Change) -> list[Row]:
    ours = outputs(params, cfg, change(prompts.batch(p, cfg)), p)
    out = []
    for name, b in want.outputs.items():
        own: dict[str, Any] = {"exact64": want64.outputs[name]} if want64 else {"floor": FLOORS[bool(p.pictures)]}
        out.append(rows.compare((NAME, part, name), ours[name], b, limit, **own))
    return out


def _layers(p: Prompt, want: Run, want64: Run | None, params, cfg, part: str, limit, change: Change) -> list[Row]:
    """Vision encoder, then text tower: on our own input, and each layer on the reference's."""
    batch, probe = change(prompts.batch(p, cfg)), part.startswith(PROBE)
    blocks = walk.Blocks(params, cfg, batch, HIGHEST)
    at = walk.start(params, cfg, batch, None, precision=HIGHEST, alone=True)
    layers = walk.Layers(params, cfg, at, HIGHEST)
    out: list[Row] = []
    for stream, first, count, step, truth, truth64 in (
        ("vision", blocks.start, blocks.count, blocks, want.sight, want64 and want64.sight),
        ("text", at.und, cfg.layers, lambda i, x: layers(i, x)[0], want.text, want64 and want64.text),
    ):
        plot = f"{PROBE if probe else 'float32'}: {stream} stream, after so many layers"
        mine = alone = first
        for i in range(count + 1):
            if i:
                mine, alone = step(i - 1, mine), step(i - 1, _pad(truth[i - 1], first))
            n = len(truth[i])
            own: dict[str, Any] = {"exact64": truth64[i]} if truth64 else {"floor": FLOORS[True]}
            what = f"{stream}: the embedding" if not i else f"{stream}: after layer {i - 1}"
            out.append(rows.compare((NAME, part, what), np.asarray(mine)[0, :n], truth[i], limit, peaks=False,
                                    plot=plot, index=i, **own))  # fmt: skip
            if i:
                out.append(rows.compare(
                    (NAME, part, f"{stream}: layer {i - 1} alone"), np.asarray(alone)[0, :n], truth[i],
                    rows.PROBE if probe else rows.REASONER, peaks=False, plot=plot, index=i, alone=True,
                ))  # fmt: skip
    hidden = walk.heads(params, cfg, batch, mine, None, precision=HIGHEST)[1]
    same = functools.partial(cosmos.und, cfg=cfg, precision=HIGHEST)
    together = jax.jit(lambda params, batch: same(params, batch=batch).hidden)(params, batch)
    n = len(p.ids)
    where = (NAME, part, "text: layer by layer is the whole tower")
    return [*out, rows.compare(where, hidden[:, :n], together[:, :n], rows.TABLES, note="ours against ours")]


def _pad(x: np.ndarray, like) -> np.ndarray:
    return np.pad(x, ((0, like.shape[1] - len(x)), (0, 0)))[None].astype(np.float32)


def half_rows(g: Golden, params: dict, cfg: ModelConfig, change: Change = dict) -> list[Row]:
    """bfloat16 against float32 on the same rounded weights and patches, over several prompts with pictures."""
    triples = []
    for p, theirs, truth in g.half:
        batch = change(prompts.batch(p, cfg))
        ours = outputs(params, cfg, batch, p, precision=Precision("bfloat16", "highest"))
        triples.append((ours, theirs, truth))

    def row(n):
        return rows.half((NAME, rows.BFLOAT16, n), *(np.concatenate([t[k][n] for t in triples]) for k in range(3)))

    return [row(n) for n in triples[0][2]]
