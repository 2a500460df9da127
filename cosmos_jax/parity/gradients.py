"""The gradient of the training loss against torch autograd, parameter by parameter.

In: a loader of diffusers' transformer; our params and config. Out: rows, one for each parameter (of a stacked one: its
worst layer), worst first, and one for what has no gradient. The reference has no training code, so the loss is written
here once more, in PyTorch, on its own outputs: flow matching on the same noised latents, times and weights, and the
cross entropy of `lm_head` on its text hidden states. Two samples: each alone in the reference; in one packed row here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn

from conversion import omni
from conversion.names import Entry
from conversion.tree import from_torch
from cosmos_jax import flow
from cosmos_jax.config import Config, ModelConfig
from cosmos_jax.loss import denominators, loss_fn
from cosmos_jax.parity import inputs, packs, reference, rows
from cosmos_jax.parity.rows import Row
from cosmos_jax.parity.transformer import model_config
from cosmos_jax.precision import HIGHEST
from data_pipelines.schema import MODALITIES, Bucket

NAME, ALONE, PACKED = "gradients", "one sample, no text targets", "two samples in one row"
SEED, VANISHED = 11, 0.1
BUCKET = Bucket(rows=1, und=56, gen=66, vision=44, action=12, sound=9, segments=3)
TABLES = (  # parameters whose rows are selected by the input
    "embed_tokens", "io/action_in/kernel", "io/action_in/bias", "io/action_out/kernel", "io/action_out/bias",
    "vit/positions",
)  # fmt: skip
Gradients = dict[str, np.ndarray]  # name in the checkpoint → gradient
Change = Callable[[dict], dict]


class Sample(NamedTuple):
    kw: dict  # arguments of the reference
    width: int  # channels that an action has; the rest takes no part in the loss
    first: int | None = None  # the text from here on is predicted; None: no text is


@dataclass
class Golden:
    """What torch says of each case."""

    samples: dict[str, list[Sample]]
    want: dict[str, Gradients]
    want64: dict[str, Gradients] = field(default_factory=dict)


def samples(config: dict) -> dict[str, list[Sample]]:
    """Two that differ in everything: text, sizes, frame rate, condition, domain, width of the action."""
    width = config["action_dim"] - 2 if config["action_gen"] else 0
    one = Sample(inputs.inputs(config), width)
    still = dict(und_len=21, T=2, H=4, W=7, cond=(), action=5, action_cond=(0, 2), fps=16.0, domain=3, seed=2)
    two = Sample(inputs.inputs(config, **still, sound=0), width + 1, first=9)  # type: ignore[arg-type]
    return {ALONE: [one], PACKED: [one, two]}


def train_config(cfg: ModelConfig) -> Config:
    """The default weights of the losses."""
    return Config(model=cfg)


def batch(found: Sequence[Sample], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The samples in one row, with what training needs to know of them."""
    return packs.pack([_one(s, n, cfg) for n, s in enumerate(found)], BUCKET, cfg.sequence)


def _one(s: Sample, number: int, cfg: ModelConfig) -> dict[str, np.ndarray]:
    kw = s.kw
    sizes = {n: len(kw[f"{n}_sequence_indexes"]) for n in inputs.present(kw)}
    u = kw["und_len"]
    out = inputs.batch(kw, cfg, packs.tight(u, kw["sequence_length"] - u, **sizes))
    out["segment_sample_id"][:], out["segment_shift"][:] = number + 7, 3.0
    for i, name in enumerate(MODALITIES):
        if name in sizes:
            out[f"{name}_token_ids"][0] = np.arange(sizes[name])
            out[f"{name}_weight"][:] = 1 / elements(name, s)
            out["segment_items"][..., i] = 1
    out["action_width"][:] = s.width
    if s.first is not None:
        out["und_targets"][0, s.first : u - 1] = kw["input_ids"][s.first + 1 :]
    return out


def elements(name: str, s: Sample) -> int:
    """Numbers in an item, its conditions included."""
    x = s.kw[f"{name}_tokens"][0]
    return len(x) * s.width if name == "action" else x.numel()


class Posed(NamedTuple):
    """A sample with its noise: what the reference is asked, and what it should answer."""

    kw: dict  # noised latents and times included
    target: dict[str, np.ndarray]  # velocities, in the reference's layouts
    sample: Sample


def pose(found: Sequence[Sample], cfg: Config) -> list[Posed]:
    """Draw noise and sigma as training does; hand them out in the reference's layouts."""
    b, out = batch(found, cfg.model), []
    draw = jax.jit(lambda b: flow.noise_batch(jax.random.key(SEED), b, cfg.flow, cfg.model.patch))
    noised = jax.tree.map(np.asarray, draw(b))
    times = np.asarray(1000 * noised.sigma, np.float32)
    for n, s in enumerate(found):

        def own(buffers, n=n, kw=s.kw):
            mine = {m: x[b[f"{m}_segment_ids"] == n][None] for m, x in buffers.items()}
            return inputs.to_reference(mine, kw, cfg.model)

        x_t, kw = own(noised.x_t), dict(s.kw)
        x_t["vision"] = x_t["vision"][None]
        for m in inputs.present(kw):
            kw[f"{m}_tokens"] = [torch.from_numpy(np.ascontiguousarray(x_t[m]))]
            kw[f"{m}_timesteps"] = torch.full(kw[f"{m}_timesteps"].shape, float(times[0, n]))
        out.append(Posed(kw, own(noised.velocity), s))
    return out


def loss(model: Any, posed: Posed, n: dict, cfg: Config) -> torch.Tensor:
    """What one sample contributes to the loss of the batch. n: denominators of the whole batch."""
    s, hidden = posed.sample, list[torch.Tensor]()
    hook = model.norm.register_forward_hook(lambda m, args, out: hidden.append(out))
    try:
        out = model(**reference.feed(posed.kw, model))
    finally:
        hook.remove()
    found = {"vision": out.sample, "sound": out.sound, "action": out.action}
    total = hidden[0].new_zeros(())
    for name, target in posed.target.items():
        error = found[name][0] - torch.from_numpy(target).to(total)
        if name == "action":
            error = error[:, : s.width]
        weight = getattr(cfg.flow, f"weight_{name}") / float(n[name])
        total = total + weight * error.square().sum() / elements(name, s)
    if s.first is not None:
        nll = nn.functional.cross_entropy(
            model.lm_head(hidden[0][s.first : -1]), s.kw["input_ids"][s.first + 1 :].to(total.device), reduction="sum"
        )
        total = total + cfg.flow.weight_text * nll / float(n["text"])
    return total


def of(model: nn.Module, total: Callable[[], torch.Tensor]) -> Gradients:
    """Every tensor's gradient of a loss; zeros where torch has none. The model keeps none of them."""
    model.zero_grad(set_to_none=True)
    with reference.exact(), torch.enable_grad():
        total().backward()
    out = {}
    for name, p in model.named_parameters():
        out[name] = reference.numpy(torch.zeros_like(p) if p.grad is None else p.grad)
        p.grad = None
    return out


def fits(parameters: int) -> bool:
    """Whether weights and gradients, on either side, and what a step needs beside them can be held in float32."""
    return reference.fits_float64(parameters)


def golden(load: reference.Load) -> Golden:
    """Run the reference in float32, and in float64 where that fits."""
    model: Any = load(torch.float32)
    config = dict(model.config)
    g = Golden(samples(config), {})
    g.want = _golden(model, g, config)
    doubles = reference.fits_float64(2 * sum(p.numel() for p in model.parameters()))
    del model
    reference.release()
    if doubles:
        model = load(torch.float64)
        g.want64 = _golden(model, g, config)
        del model
        reference.release()
    return g


def _golden(model: Any, g: Golden, config: dict) -> dict[str, Gradients]:
    cfg, out = train_config(model_config(config)), {}
    for name, found in g.samples.items():
        out[name] = of(model, functools.partial(_total, model, found, cfg))
    return out


def _total(model: Any, found: Sequence[Sample], cfg: Config) -> torch.Tensor:
    n = denominators(batch(found, cfg.model))
    return torch.stack([loss(model, p, n, cfg) for p in pose(found, cfg)]).sum()


def gradient(params: dict, cfg: Config, batch: dict) -> dict:
    """What a training step follows; not compiled."""
    return jax.grad(lambda p: loss_fn(p, cfg, batch, jax.random.key(SEED), HIGHEST)[0])(params)


ours = jax.jit(gradient, static_argnums=1)


def check(g: Golden, params: dict, cfg: ModelConfig, change: Change = dict, call=ours) -> list[Row]:
    """All rows. `change` is applied to every batch of ours; call: `ours`, or a version compiled elsewhere."""
    out, train = [], train_config(cfg)
    for name, found in g.samples.items():
        got = call(params, train, change(batch(found, cfg)))
        out += compare((NAME, name), got, omni.entries(cfg), g.want[name], g.want64.get(name), limit(cfg.layers))
    return out


def limit(layers: int) -> float:
    """1e-5 up to 3 layers; it grows with depth as the threshold of the outputs does."""
    return rows.GRADIENT * rows.by_depth(layers) / rows.by_depth(3)


def compare(
    place: tuple[str, str], got: dict, entries: Iterable[Entry], want: Gradients, want64: Gradients | None, limit: float
) -> list[Row]:
    """One row for each parameter, worst first; then one for all that must have no gradient.

    place: (component, part). got: our tree of gradients. entries: the name map; parameters that it does not name must
    have no gradient. Stacked layers are compared one by one, and the worst is shown. Where the reference's gradient is
    0 (a whole layer of a parameter; a word, a domain, a place of a table), ours must be 0 too, not merely small.

    A gradient that the reference's own float32 misses by more than a tenth cancels to nothing (a bias on keys that are
    not rotated moves no softmax). Such an error is a share of the gradient of the whole projection; the row says so.
    """
    entries = list(entries)
    mine, theirs = flatten_dict(got), flatten_dict(from_torch(entries, want))
    exact64 = flatten_dict(from_torch(entries, want64)) if want64 else {}
    stacked = {e.path for e in entries if e.layer is not None}
    out, dead, still, count = [], [], [], 0
    for path, x in mine.items():
        x, label = np.asarray(x), "/".join(path)
        found = []
        for i in range(len(x)) if path in stacked else [...]:
            count += 1
            where = (*place, label if i is ... else f"{label}[{i}]")  # layer i
            if path not in theirs or not theirs[path][i].any():
                dead.append(where[2])
                still.append(np.abs(x[i]).max(initial=0.0))
                continue
            y, known = theirs[path][i], exact64[path][i] if exact64 else None
            row = rows.compare(where, x[i], y, limit, exact64=known)
            found.append(row if (row.floor or 0) < VANISHED else _nothing(row, x[i], y, theirs, path, i))
            if label in TABLES:
                still += [np.abs(a).max() for a, b in zip(x[i], y, strict=True) if not b.any()]
        out += sorted(found, key=_order)[:1]
    out.sort(key=_order)
    what = f"no gradient, as in the reference: {len(dead)} of {count} tensors"
    unused = f"{len(still) - len(dead)} rows of tables that no input selects"
    note = "; ".join([", ".join(dead), unused] if dead else [unused])
    return [*out, rows.exact((*place, what), still, np.zeros(len(still)), note=note)]


def _order(row: Row) -> tuple[bool, float]:
    """Failures first (a NaN is one), then by error."""
    return row.passed, -row.rel


def _nothing(row: Row, x, y, theirs: dict, path: tuple, i) -> Row:
    """The row of a gradient that is rounding on both sides: its error as a share of its projection's gradient."""
    whole = sum(float((v[i].astype(np.float64) ** 2).sum()) for p, v in theirs.items() if p[:-1] == path[:-1]) ** 0.5
    note = f"nothing but rounding: torch's own is {row.floor:.0%} off its float64; error over {'/'.join(path[:-1])}'s"
    share = float(np.linalg.norm(np.subtract(x, y, dtype=np.float64))) / whole
    return dataclasses.replace(row, rel=share, peak_limit=None, floor=None, floor_from="", note=note)
