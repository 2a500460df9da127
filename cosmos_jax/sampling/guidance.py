"""Guidance: up to three branches of one sample in one batch of rows, mixed into one velocity.

In: what is asked for (`Guidance`), rows of each branch. Out: which branches each step runs; the guided velocity.

    cond      the caption, everything in sight
    uncond    the negative (or empty) caption, everything in sight
    free      the caption; the controls of a transfer are out of sight: their tokens take no part in attention

Each device stacks its *own* rows of all branches, so guidance moves no data between devices. On a mesh with an axis cfg
each device has the rows of one branch instead, and what is exchanged is the velocity.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax import shard
from cosmos_jax.model.block import KV
from data_pipelines.schema import MODALITIES
from pallas_kernels.flow import guide

BRANCHES = ("cond", "uncond", "free")  # their order in the rows
READS = {"cond": "cond", "uncond": "uncond", "free": "cond"}  # branch → the branch whose caption it reads
Form = tuple[str, ...]  # the branches that a step runs, in the order of BRANCHES
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly a sample is pushed, and when. A scale of 1 is no guidance: its branch does not run.

    text: v_u + text·(v_c − v_u). control: v_n + control·(v_c − v_n), on the caption's branch, before `text`.
    interval, control_interval: timesteps (0 … 1000, as the model is told) between which each acts; None: always.
    closed: whether the ends belong to the intervals (diffusers) or not (cosmos-framework). normalize: where `text`
    acts, shorten a sample's velocity to the length of its caption's (cosmos-framework `normalize_cfg`).
    """

    text: float = 1.0
    control: float = 1.0
    interval: Interval | None = None
    control_interval: Interval | None = None
    closed: bool = False
    normalize: bool = False

    def plan(self, timesteps: np.ndarray) -> tuple[dict[str, np.ndarray], tuple[Form, ...]]:
        """Rows for the steps: {"text", "control" float32 [N], "form" int32 [N]}; and the forms, which "form" counts."""
        text = np.where(self._acts(self.interval, timesteps), self.text, 1.0).astype(np.float32)
        control = np.where(self._acts(self.control_interval, timesteps), self.control, 1.0).astype(np.float32)
        each = [
            tuple(b for b, runs in zip(BRANCHES, (True, s != 1, c != 1), strict=True) if runs)
            for s, c in zip(text, control, strict=True)
        ]
        forms = tuple(sorted(set(each)))
        return {"text": text, "control": control, "form": np.array([forms.index(f) for f in each], np.int32)}, forms

    def _acts(self, interval: Interval | None, t: np.ndarray) -> np.ndarray:
        if interval is None:
            return np.ones(len(t), bool)
        low, high = interval
        return (low <= t) & (t <= high) if self.closed else (low < t) & (t < high)


def union(forms: tuple[Form, ...]) -> Form:
    """Every branch that some step runs."""
    return tuple(b for b in BRANCHES if any(b in form for form in forms))


def captions(form: Form) -> Form:
    """The branches whose captions these branches read."""
    return tuple(b for b in form if READS[b] == b)


def apart(form: Form) -> bool:
    """Do these branches lie on different devices? ValueError when the mesh has room for another number of them."""
    room = shard.size("cfg")
    if room == 1 or len(form) == 1:
        return False
    if len(form) != room:
        raise ValueError(f"mesh.cfg={room} is for {room} guidance branches, not {len(form)}; set cfg to that.")
    return True


def check_mesh(forms: tuple[Form, ...]) -> None:
    """ValueError when the mesh has an axis cfg that these branches do not fill."""
    if shard.size("cfg") > 1 and not any([apart(form) for form in forms]):
        raise ValueError(f"mesh.cfg={shard.size('cfg')} is for guidance branches, but no step is guided; leave it out.")


def stack(*branches):
    """Pytrees of [B, …], one per branch → one of [n·B, …]: per device, its rows of the first branch, of the next, …"""
    if len(branches) == 1:
        return branches[0]
    if apart(tuple(map(str, range(len(branches))))):
        return shard.rowwise(lambda *trees: _own(trees), *branches, gives=("branch",), kernel=True)
    return shard.rowwise(lambda *trees: jax.tree.map(lambda *x: jnp.concatenate(x), *trees), *branches)


def _own(trees):
    """Of pytrees, one per branch, the one of this device's branch."""
    return jax.tree.map(lambda *x: jax.lax.select_n(jax.lax.axis_index("cfg"), *x), *trees)


def pick(cache: KV, have: Form, want: Form) -> KV:
    """The keys and values [L, n·B, …] of the captions `have` → those that the branches `want` read, in their order."""
    places = [have.index(READS[b]) for b in want]
    if places == list(range(len(have))):
        return cache
    before, after = (apart(form) for form in (have, want))

    def take(x):
        x = jax.lax.all_gather(x, "cfg", axis=1, tiled=True) if before else x
        parts = [jnp.split(x, len(have), axis=1)[i] for i in places]
        return _own(parts) if after else jnp.concatenate(parts, axis=1)

    takes, gives = ("branch" if x else "batch" for x in (before, after))
    return shard.rowwise_cache(lambda kv: jax.tree.map(take, kv), cache, takes=takes, gives=gives)


def without(batch: dict, controls: jax.Array) -> dict:
    """The rows of the branch `free`: `controls` [B,V] bool (`packing.context_tokens`) is what nothing attends to.

    Shapes and positions stay, so the target lies where it lies in a pack without controls.
    """

    def hide(segments, source, controls):
        vision = (source >= 0) & (source < controls.shape[1])
        marked = jnp.take_along_axis(controls, jnp.clip(source, 0, controls.shape[1] - 1), axis=1)
        return jnp.where(vision & marked, -1, segments)

    hidden = shard.rowwise(hide, batch["gen_segment_ids"], batch["gen_source"], controls)
    return batch | {"gen_segment_ids": hidden}


def members(batch: dict) -> dict[str, jax.Array]:
    """Modality → [B, tokens, N] bool: which segment a token belongs to."""
    segments = jnp.arange(batch["segment_shift"].shape[1])
    return {n: batch[f"{n}_segment_ids"][..., None] == segments for n in MODALITIES}


def combine(velocity, text, control=1.0, form: Form = ("cond", "uncond"), owners: dict | None = None):
    """Velocities [n·B, …] of a `stack`ed batch → [B, …] float32: u + text·(n + control·(c − n) − u).

    In float32 like diffusers; the framework combines bfloat16 velocities (spec model.md §7.5, DISC-3).
    owners: `members` of the batch; given, each segment is normalised (`Guidance.normalize`).
    """

    across = apart(form)

    def mix(v, owners, text, control):
        if across:
            v = jax.tree.map(lambda x: jax.lax.all_gather(x, "cfg", tiled=True), v)
        parts = {n: dict(zip(form, jnp.split(x.astype(jnp.float32), len(form)), strict=True)) for n, x in v.items()}
        cond = {n: guide(p["cond"], free=p.get("free"), control=control) for n, p in parts.items()}
        if "uncond" not in form:
            return cond
        guided = {n: guide(cond[n], p["uncond"], text=text) for n, p in parts.items()}
        return guided if owners is None else _shorten(guided, cond, owners)

    rows, scales = (velocity, owners), (jnp.float32(text), jnp.float32(control))
    takes = (("branch",) if across else shard.ROWS,)
    return shard.rowwise(mix, *rows, takes=takes, shared=scales, kernel=across)


def _shorten(velocity: dict, cond: dict, owners: dict) -> dict:
    """velocity · min(|cond| / (|velocity| + 1e-8), 1), lengths over all elements of a segment, all modalities."""

    def length(v):  # [B,N]
        return jnp.sqrt(sum(jnp.where(owners[n], jnp.square(x).sum(-1)[..., None], 0.0).sum(1) for n, x in v.items()))

    ratio = jnp.minimum(length(cond) / (length(velocity) + 1e-8), 1.0)
    return {n: x * jnp.where(owners[n], ratio[:, None], 0.0).sum(-1)[..., None] for n, x in velocity.items()}


def check(batch: dict, uncond: dict | None, controls, forms: tuple[Form, ...], guidance: Guidance) -> None:
    """ValueError when a branch that some step runs is missing or packed differently."""
    needed = union(forms)
    if "free" in needed and controls is None:
        raise ValueError(f"control guidance {guidance.control} needs to know the controls; give them or set it to 1.")
    if "uncond" not in needed:
        return
    if uncond is None:
        raise ValueError(
            f"sample.guidance={guidance.text} needs an unconditional batch; give `uncond` or set guidance to 1."
        )
    for name, x in batch.items():
        if x.shape != uncond[name].shape:
            raise ValueError(f"uncond[{name!r}] has shape {uncond[name].shape}, the batch {x.shape}: pack both alike.")
    for name in (f"{m}_{field}" for m in MODALITIES for field in ("segment_ids", "token_ids", "noisy")):
        if isinstance(batch[name], np.ndarray) and not np.array_equal(batch[name], uncond[name]):
            raise ValueError(f"uncond[{name!r}] differs from the batch's: both branches must denoise the same tokens.")
