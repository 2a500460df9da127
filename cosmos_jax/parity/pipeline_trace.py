"""What is kept of a run of PyTorch's pipelines, and the probe that sees it pass by.

In: a transformer, and whatever drives it. Out: `Recorded` and its `Trace`s, numpy arrays in the layouts of `generate`'s
.npz files.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers.modular_pipelines.cosmos import before_denoise
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as task
from diffusers.schedulers import scheduling_flow_match_euler_discrete as euler

from cosmos_jax.parity import reference
from cosmos_jax.parity.pipeline_cases import Case

Latents = dict[str, np.ndarray]  # vision [C,T,h,w], sound [Ds,T], action [T,A]
STATE = {"vision": "latents", "sound": "sound_latents", "action": "action_latents"}  # modality → name in a pipeline
AXIS = {"vision": 1, "sound": 1, "action": 0}  # of frames, latents, rows


@dataclass
class Branch:
    """One of the forward passes of a step: what is constant over the steps."""

    ids: np.ndarray  # [L]
    positions: dict[str, np.ndarray]  # text and modality → [3, tokens]; vision: controls, then the target


@dataclass
class Trace:
    """One denoising loop. latents[i] enter step i, the last are the result; velocities[i] were predicted from
    latents[i], before guidance, 0 for what is clean."""

    branches: dict[str, Branch] = field(default_factory=dict)  # cond, uncond, cond_no_control
    noisy: dict[str, np.ndarray] = field(default_factory=dict)  # modality → bool per frame, row, latent
    context: list[np.ndarray] = field(default_factory=list)  # clean vision items before the target, [C,T,h,w]
    weights: tuple[float, ...] = ()  # of the controls, where each has an attention of its own
    domain: int | None = None  # of the embodiment
    width: int | None = None  # channels of its actions
    noise: Latents = field(default_factory=dict)  # unit noise, where it is overwritten by conditions too
    fresh: list[Latents] = field(default_factory=list)  # what a stochastic scheduler drew in each step
    sigmas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    timesteps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    latents: list[Latents] = field(default_factory=list)
    velocities: list[dict[str, Latents]] = field(default_factory=list)  # branch → …
    velocities64: list[dict[str, Latents]] = field(default_factory=list)
    half: dict[int, dict[str, Latents]] = field(default_factory=dict)  # step → in bfloat16
    truth: dict[int, dict[str, Latents]] = field(default_factory=dict)  # … in float32, of the same rounded weights
    calls: list[dict[str, dict]] = field(default_factory=list, repr=False)  # branch → arguments of the transformer


@dataclass
class Recorded:
    case: Case
    traces: list[Trace]  # one; of `transfer`: one per chunk
    video: np.ndarray  # [T,H,W,3] float32, 0 … 1
    wave: np.ndarray | None = None  # [2,N], where sound was made
    actions: np.ndarray | None = None  # [rows, width of the embodiment]


class Probe:
    """Everything that passes by while a pipeline runs."""

    def __init__(self, case: Case):
        self.case, self.branch = case, ""
        self.draws: list[np.ndarray] = []  # before a loop
        self.fresh: list[np.ndarray] = []  # inside
        self.states: list[list[Latents]] = []  # per loop
        self.calls: list[list[dict[str, tuple[dict, Any]]]] = []  # per loop and step: branch → (arguments, result)

    def draw(self, shape, generator=None, device=None, dtype=None, layout=None, *, into: list[np.ndarray]):
        """In place of diffusers' `randn_tensor`."""
        x = reference.draw(f"{self.case.name} {len(self.draws)} {len(self.fresh)}", *shape)
        into.append(x)
        return torch.from_numpy(x).to(device, dtype)

    def state(self, named: dict[str, Any], first: bool = False) -> None:
        """The latents between two steps."""
        if first or not self.states:
            self.states.append([])
            self.calls.append([])
        found = {m: named.get(n) for m, n in STATE.items()}
        self.states[-1].append({m: bare(m, reference.numpy(x)) for m, x in found.items() if x is not None})

    def call(self, kw: dict, out: Any) -> None:
        """A forward pass of the transformer."""
        steps = self.calls[-1]
        if len(steps) < len(self.states[-1]):
            steps.append({})
        steps[-1][self.branch] = kw, out

    def traces(self, scheduler: Any, weights: tuple[float, ...]) -> list[Trace]:
        """The loops in order."""
        names = self.states[0][0]
        out = []
        for k, (states, calls) in enumerate(zip(self.states, self.calls, strict=True)):
            t = Trace(latents=states, weights=weights)
            t.sigmas, t.timesteps = (reference.numpy(x) for x in (scheduler.sigmas, scheduler.timesteps))
            t.noise = {m: bare(m, x) for m, x in zip(names, self.draws[k * len(names) :], strict=False)}
            t.fresh = [{"vision": x[0, 0]} for x in self.fresh]
            t.calls = [{b: kw for b, (kw, _) in step.items()} for step in calls]
            for b, kw in t.calls[0].items():
                t.branches[b] = _branch(kw)
            kw = t.calls[0]["cond"]
            t.context = [reference.numpy(x)[0] for x in kw["vision_tokens"][:-1]]
            t.noisy = _noisy(kw, states[0])
            if kw.get("action_domain_ids") is not None:
                t.domain = int(kw["action_domain_ids"][0])
                t.width = task._EMBODIMENT_TO_RAW_ACTION_DIM[self.case.request["domain_name"]]
            t.velocities = [{b: masked(r, t) for b, (_, r) in step.items()} for step in calls]
            out.append(t)
        return out


@contextlib.contextmanager
def watch(transformer: Any, case: Case) -> Iterator[Probe]:
    probe = Probe(case)
    forward, context = transformer.forward, transformer.cache_context

    @functools.wraps(forward)  # the modular pipeline asks for its signature
    def called(*args, **kw):
        out = forward(*args, **kw)
        probe.call(kw, out)
        return out

    def named(name, **kw):
        probe.branch = name
        return context(name, **kw)

    def randn(into):
        return lambda *args, **kw: probe.draw(*args, **kw, into=into)

    with contextlib.ExitStack() as stack:
        for where, name, by in (
            (transformer, "forward", called), (transformer, "cache_context", named),
            (task, "randn_tensor", randn(probe.draws)), (before_denoise, "randn_tensor", randn(probe.draws)),
            (euler, "randn_tensor", randn(probe.fresh)),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(where, name, by))
        yield probe


def bare(modality: str, x: np.ndarray) -> np.ndarray:
    """Without the batch axis, which only vision has."""
    return x[0] if modality == "vision" else x


def _branch(kw: dict) -> Branch:
    where = {"text": kw["text_indexes"]} | {m: kw.get(f"{m}_sequence_indexes") for m in STATE}
    positions = reference.numpy(kw["position_ids"])
    return Branch(
        reference.numpy(kw["input_ids"]),
        {m: positions[:, reference.numpy(i)] for m, i in where.items() if i is not None},
    )


def _noisy(kw: dict, latents: Latents) -> dict[str, np.ndarray]:
    """modality → whether that frame, row or latent is to be made."""
    out = {}
    for m, x in latents.items():
        out[m] = np.isin(np.arange(x.shape[AXIS[m]]), reference.numpy(kw[f"{m}_noisy_frame_indexes"][-1]))
    return out


def masked(result: Any, t: Trace) -> Latents:
    """The velocities of the target, 0 for what is clean and for channels that the embodiment does not have."""
    found = dict(zip(("vision", "sound", "action"), result, strict=True))
    out = {m: bare(m, reference.numpy(found[m][-1])) for m in t.noisy}
    for m, noisy in t.noisy.items():
        out[m] = out[m] * np.expand_dims(noisy, tuple(i for i in range(out[m].ndim) if i != AXIS[m]))
    if "action" in out:
        out["action"][:, t.width :] = 0
    return out
