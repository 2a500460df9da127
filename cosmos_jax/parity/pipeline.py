"""Our pipeline against diffusers', request by request: tokens, positions, every step, and what comes out.

In: what `pipeline_reference` recorded; ours, behind the protocol `Ours`. Out: rows. Teacher-forced: every step starts
from the reference's latents, so each is judged alone. Free: from the request's files to pixels on our own, given the
noise. Thresholds: spec reference_parity.md §4.3.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conversion.folder import Folder
from cosmos_jax.parity import denoise, reference, rows
from cosmos_jax.parity.pipeline_trace import AXIS, Branch, Latents, Recorded, Trace
from cosmos_jax.parity.rows import Row
from cosmos_jax.precision import HIGHEST, Precision

NAME = "pipeline"
WAVE_FLOOR = 7.7e-5  # published, after 35 steps (spec reference_parity.md §4.1)
CHARTED = 10  # runs of more steps than this have a chart


@dataclass
class Made:
    """What our pipeline made of a request."""

    latents: list[list[Latents]]  # per loop: what enters step 0, then what comes out of every step
    context: list[list[np.ndarray]]  # per loop: the clean vision items before the target, encoded by us
    video: np.ndarray | None  # [T,H,W,3] float32 0 … 1, before it is rounded to 8 bits; None: no frame was made
    wave: np.ndarray | None = None  # [2,N]; None: no sound was made
    actions: np.ndarray | None = None  # [rows, width of the embodiment], in the model's units


class Ours(Protocol):
    """One request, prepared by our pipeline. A loop is one denoising run; only `transfer` has several (its chunks).

    Latents and noise: modality → vision [C,T,h,w], sound [Ds,T], action [T,A], float32. Names of branches: "cond";
    "uncond" where the guidance is not 1; "cond_no_control" where the guidance of controls is not 1.
    """

    branches: Mapping[str, Branch]  # ids; positions of "text" and of every modality: vision is controls, then target
    noisy: Mapping[str, np.ndarray]  # modality → bool per latent frame of the target, sound latent, action row
    domain: int | None  # of the embodiment
    sigmas: np.ndarray  # [N+1] float32, the last is 0
    timesteps: np.ndarray  # [N], as the model is told

    def forced(
        self, loop: int, latents: Sequence[Latents], context: Sequence[np.ndarray], fresh: Sequence[Latents]
    ) -> Iterator[tuple[dict[str, Latents], Latents]]:
        """For i = 0 … N−1: (branch → velocities of latents[i], before guidance and 0 where clean; the state after the
        step). The solver's history is our own; context: the reference's clean items; fresh: the noise of each step of a
        stochastic solver, [] otherwise."""

    def free(self, noise: Sequence[Latents], fresh: Sequence[Sequence[Latents]]) -> Made:
        """Everything on our own, from the noise of every loop."""


Factory = Callable[[Path], Ours]  # request.json → ours
Connect = Callable[[Folder, Precision], Factory]  # loads the checkpoint's parameters once for all requests


def compare(found: Sequence[Recorded], connect: Connect, folder: Folder) -> list[Row]:
    """All rows of all requests: ours in float32, then in bfloat16. Media files are written, and gone afterwards."""
    depth = folder.components["transformer"].config.layers
    with tempfile.TemporaryDirectory() as place:
        paths = [r.case.write(Path(place) / r.case.name) for r in found]
        ours = connect(folder, HIGHEST)
        out = [row for r, path in zip(found, paths, strict=True) for row in check(r, ours(path), depth)]
        del ours
        reference.release()
        half = connect(folder, Precision("bfloat16", "highest"))
        return out + half_rows(found, map(half, paths))


def check(r: Recorded, ours: Ours, depth: int) -> list[Row]:
    """All float32 rows of one request. depth: layers of the model, which set the threshold of a velocity."""
    out = plan_rows(r, ours)
    if any(len(t.timesteps) != len(ours.timesteps) for t in r.traces):
        return out  # the row of the timesteps failed: there are no steps to compare one by one
    for k, t in enumerate(r.traces):
        out += brief(forced_rows(r, k, ours, depth), t)
    made = ours.free([t.noise for t in r.traces], [t.fresh for t in r.traces])
    for k, t in enumerate(r.traces):
        out += start_rows(r, k, made) + brief(free_rows(r, k, made), t)
    return out + media_rows(r, made)


def brief(found: list[Row], t: Trace) -> list[Row]:
    """Of a short run not every step, but of each thing that is compared the first that fails, or the worst."""
    if len(t.timesteps) > CHARTED:
        return found
    things: dict[str, list[Row]] = {}
    for row in found:
        things.setdefault(row.what.split(": ", 1)[1], []).append(row)
    return [next(iter(rows.failures(own)), max(own, key=lambda r: r.share)) for own in things.values()]


def plan_rows(r: Recorded, ours: Ours) -> list[Row]:
    """What has to be equal bit for bit. Depends on nothing that is computed, so a mistake is in it, not before."""
    t, none = r.traces[0], Branch(np.zeros(0), {})
    pairs: list[tuple[str, Any, Any]] = []
    for b in sorted(set(t.branches) | set(ours.branches)):
        mine, theirs = ours.branches.get(b, none), t.branches.get(b, none)
        pairs.append((f"{b}: token ids", mine.ids, theirs.ids))
        for m in sorted(set(mine.positions) | set(theirs.positions)):
            a, z = (x.positions.get(m, np.zeros((3, 0))) for x in (mine, theirs))
            pairs.append((f"{b}: positions of {m}", a, z))
    for m in sorted(set(t.noisy) | set(ours.noisy)):
        a, z = (x.get(m, np.zeros(0, bool)) for x in (ours.noisy, t.noisy))
        pairs.append((f"{m}: what is noisy", a, z))
    if t.domain is not None:
        pairs.append(("embodiment", -1 if ours.domain is None else ours.domain, t.domain))
    pairs += [("sigmas", ours.sigmas, t.sigmas), ("timesteps", ours.timesteps, t.timesteps)]
    found = [rows.exact((NAME, r.case.name, what), a, z) for what, a, z in pairs]
    return [dataclasses.replace(row, alone=True) for row in found]


def forced_rows(r: Recorded, k: int, ours: Ours, depth: int) -> list[Row]:
    """Each step alone: the velocities of all branches, and the next latents."""
    t, out = r.traces[k], []
    steps = ours.forced(k, t.latents[:-1], t.context, t.fresh)
    for i, (v, after) in zip(range(len(t.timesteps)), steps, strict=True):
        for m in t.latents[0]:
            want, mine = _stack(t.velocities[i], m, t.branches), _stack(v, m, t.branches)
            at: dict[str, Any] = dict(index=i, alone=True, peaks=False)
            here = rows.compare(_at(r, k, i, f"{m}: next latents"), after[m], t.latents[i + 1][m],
                                rows.NEXT_LATENTS, plot=_plot(r, k, m, "latents"), **at)  # fmt: skip
            if want.any():
                at["exact64"] = _stack(t.velocities64[i], m, t.branches) if t.velocities64 else None
                out.append(rows.compare(_at(r, k, i, f"{m} velocity"), mine, want, rows.by_depth(depth),
                                        plot=_plot(r, k, m, "velocity"), **at))  # fmt: skip
            else:
                out.append(rows.exact(_at(r, k, i, f"{m} velocity is 0"), mine, want))
            out.append(here)
    return out


def start_rows(r: Recorded, k: int, made: Made) -> list[Row]:
    """What a loop starts from: the conditions, encoded by us, and the noise."""
    t, out = r.traces[k], []
    limit = rows.ENCODE_VIDEO if k == 0 else rows.FREE_LATENTS  # later chunks begin with pixels that were generated
    for j, (a, z) in enumerate(zip(made.context[k], t.context, strict=True)):
        out.append(rows.compare((NAME, r.case.name, f"{_loop(r, k)}clean item {j}"), a, z, rows.ENCODE_VIDEO))
    for m, z in t.latents[0].items():
        a, clean, axis = made.latents[k][0][m], ~t.noisy[m], AXIS[m]
        for what, chosen in (("conditions", clean), ("noise", ~clean)):
            mine, theirs = (np.compress(chosen, x, axis) for x in (a, z))
            where = (NAME, r.case.name, f"{_loop(r, k)}{m}: {what}")
            if theirs.size:
                given = what == "noise"
                out.append(rows.exact(where, mine, theirs) if given else rows.compare(where, mine, theirs, limit))
    return out


def free_rows(r: Recorded, k: int, made: Made) -> list[Row]:
    """On our own: the latents after every step."""
    return [
        rows.compare(
            _at(r, k, i, f"{m}, all on our own"), made.latents[k][i + 1][m], z, rows.FREE_LATENTS, peaks=False,
            floor=denoise.free_floor(i + 1), plot=_plot(r, k, m, "latents"), index=i,
        )
        for i, after in enumerate(r.traces[k].latents[1:]) for m, z in after.items()
    ]  # fmt: skip


def media_rows(r: Recorded, made: Made) -> list[Row]:
    """What comes out. Of a clip that is all conditions the reference decodes what it encoded; no row asks for that."""
    where, out = (NAME, r.case.name), []
    if any(t.noisy["vision"].any() for t in r.traces):
        rel, peak = rows.relative(np.zeros(0) if made.video is None else made.video, r.video)
        level = 1 / 255 / (np.sqrt(np.mean(r.video.astype(np.float64) ** 2)) + 1e-300)
        out.append(Row(*where, "pixels", rel, peak, level, level, note="every pixel within 1/255"))
    for name, a, z, limit, floor in (
        ("wave", made.wave, r.wave, rows.WAVE, WAVE_FLOOR),
        ("actions", made.actions, r.actions, rows.FREE_LATENTS, None),
    ):
        if a is not None or z is not None:
            a, z = (np.zeros(0) if x is None else x for x in (a, z))
            out.append(rows.compare((*where, name), a, z, limit, floor=floor, peaks=False))
    return out


def half_rows(found: Sequence[Recorded], ours: Iterable[Ours]) -> list[Row]:
    """bfloat16 velocities of the same latents, pooled over requests, steps and branches: one row per modality.

    ours: in bfloat16, in the order of `found`.
    """
    pool: dict[str, list[list[np.ndarray]]] = {}
    for r, mine in zip(found, ours, strict=True):
        for k, t in enumerate(r.traces):
            for i, (v, _) in enumerate(mine.forced(k, t.latents[:-1], t.context, t.fresh)):
                for m in t.latents[0] if i in t.half else ():
                    triple = [_stack(x, m, t.branches).ravel() for x in (v, t.half[i], t.truth[i])]
                    pool.setdefault(m, []).append(triple)
    out = []
    for m, triples in pool.items():
        a, b, truth = (np.concatenate(x) for x in zip(*triples, strict=True))
        out.append(rows.half((NAME, rows.BFLOAT16, f"{m} velocity"), a, b, truth))
    return out


def _stack(v: Mapping[str, Latents], modality: str, branches: Mapping[str, Branch]) -> np.ndarray:
    """One modality of every branch; a branch that ours lacks is 0."""
    like = next(iter(v.values()))[modality]
    return np.stack([v[b][modality] if b in v else np.zeros_like(like) for b in branches])


def _loop(r: Recorded, k: int) -> str:
    return f"chunk {k}, " if len(r.traces) > 1 else ""


def _at(r: Recorded, k: int, step: int, what: str) -> tuple[str, str, str]:
    return NAME, r.case.name, f"{_loop(r, k)}step {step}: {what}"


def _plot(r: Recorded, k: int, modality: str, what: str) -> str | None:
    """The chart of a long run."""
    long = len(r.traces[k].timesteps) > CHARTED
    return f"{r.case.name}: {modality} {what} at each step" if long else None
