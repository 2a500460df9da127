"""From samples to a batch: plan, look ahead, pack. The only packer of the project, for training and inference.

In: `Sample`s. Out: the batch of `schema.py`. A sample is never split, dropped or reordered inside a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipelines import positions
from data_pipelines.patch_grid import MERGE
from data_pipelines.sample import Sample, Turn, clean_frames, validate, vision_items
from data_pipelines.schema import MODALITIES, Bucket, SequenceSpec, empty_batch
from data_pipelines.tasks import INDEX, task
from data_pipelines.video import VitInput, preprocess, vit_input

STREAMS = ("und", "gen", *MODALITIES, "vit")  # capacities a sample uses, besides one segment


def patchify(latents: np.ndarray, p: int) -> np.ndarray:
    """[C,T,H,W] → [T·⌈H/p⌉·⌈W/p⌉, p·p·C]; zero-padded bottom and right; features (row, col, channel)."""
    c, t, h, w = latents.shape
    rows, cols = -(-h // p), -(-w // p)
    x = np.pad(latents, ((0, 0), (0, 0), (0, rows * p - h), (0, cols * p - w)))
    return x.reshape(c, t, rows, p, cols, p).transpose(1, 2, 4, 3, 5, 0).reshape(t * rows * cols, p * p * c)


def unpatchify(tokens: np.ndarray, shape: tuple[int, int, int, int], p: int) -> np.ndarray:
    """Inverse of `patchify`; `shape` is the latents' [C,T,H,W]."""
    c, t, h, w = shape
    rows, cols = -(-h // p), -(-w // p)
    x = tokens.reshape(t, rows, cols, p, p, c).transpose(5, 0, 1, 3, 2, 4)
    return x.reshape(c, t, rows * p, cols * p)[:, :, :h, :w]


@dataclass
class Planned:
    """A sample as token arrays, ready to be copied into a row."""

    sample: Sample
    ids: np.ndarray  # [L]
    targets: np.ndarray  # [L]
    und_positions: np.ndarray  # [3, L]
    gen_positions: np.ndarray  # [3, G]: vision, action, sound
    tokens: dict[str, np.ndarray] = field(default_factory=dict)  # modality → [n, features]
    noisy: dict[str, np.ndarray] = field(default_factory=dict)  # modality → [n] bool
    weight: dict[str, np.ndarray] = field(default_factory=dict)  # modality → [n]: 1 / elements of the token's item
    items: dict[str, int] = field(default_factory=dict)  # modality → number of items
    context: int = 0  # vision tokens before the target
    extent: np.ndarray | None = None  # [V, 2]
    control_weight: np.ndarray | None = None  # [controls, G]; None = one attention over everything
    vit: VitInput | None = None
    pads: np.ndarray | None = None  # [L] bool: tokens that ViT features replace

    @property
    def size(self) -> dict[str, int]:
        """Slots the sample needs in each stream."""
        counts = {m: len(self.tokens.get(m, ())) for m in MODALITIES}
        return {
            "und": len(self.ids), "gen": sum(counts.values()), **counts,
            "vit": len(self.vit.patches) if self.vit else 0,
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        found = [self.ids, self.targets, self.und_positions, self.gen_positions, self.extent, self.control_weight]
        for group in (self.tokens, self.noisy, self.weight):
            found += group.values()
        if self.vit is not None:
            found += [self.vit.patches, *self.vit.places]
        return sum(x.nbytes for x in found if isinstance(x, np.ndarray))

    @property
    def controls(self) -> int:
        """Attention calls that its weighted controls ask for."""
        return 0 if self.control_weight is None else len(self.control_weight)

    def add(self, modality: str, tokens: np.ndarray, noisy: np.ndarray, items: Sequence[tuple[int, int]]) -> None:
        """One stream: its tokens, which of them are noisy, and (tokens, elements) of each of its items."""
        self.tokens[modality], self.noisy[modality], self.items[modality] = tokens, noisy, len(items)
        self.weight[modality] = np.concatenate([np.full(n, 1.0 / elements) for n, elements in items])


def plan(s: Sample, tokenizer, spec: SequenceSpec, round_fps: bool = True) -> Planned:
    """Tokens, targets, positions and the clean/noisy rule of one sample. ValueError as in `sample.validate`.

    tokenizer: a `ChatTokenizer`. Text split: chat(prompt) + [eos, vision_start] if the sample generates (spec §4.1).
    """
    validate(s, spec)
    row = task(s.task)
    if not row.generates:
        return _plan_reason(s, tokenizer, spec)
    ids = np.asarray(tokenizer.generation_ids(s.prompt, s.system), np.int32)
    origin = positions.start_of_generation(len(ids), spec)
    fps = positions.conditioning_fps(s.fps, round_fps)
    out = Planned(s, ids, np.full(len(ids), -1, np.int32), positions.text(len(ids)), np.zeros((3, 0), np.float32))
    places = _plan_vision(out, origin, fps, spec)
    if s.actions is not None:
        n, width = s.actions.shape
        places.append(positions.action(n, origin, fps, spec, s.action_start))
        noisy = (np.arange(n) >= s.clean_actions) & (row.action == "noisy")
        out.add("action", np.pad(s.actions, ((0, 0), (0, spec.action_dim - width))), noisy, [(n, n * width)])
    if s.sound_latents is not None:
        n = s.sound_latents.shape[1]
        places.append(positions.sound(n, origin, spec))
        clean = s.clean_sound if s.clean_sound is not None else n if row.sound == "clean" else 0
        out.add("sound", s.sound_latents.T, np.arange(n) >= clean, [(n, s.sound_latents.size)])
    out.gen_positions = np.concatenate(places, 1)
    if len(s.weights) > 1:  # one control: the same as one attention over everything
        out.control_weight = _control_weight(s.weights, places, out.gen_positions.shape[1])
    return out


def _plan_vision(out: Planned, origin: float, fps: float, spec: SequenceSpec) -> list[np.ndarray]:
    """Every vision item of the sample, the target last; returns the positions of each.

    Controls lie where the target lies; a source image comes before it in time (spec model.md §4.4).
    """
    s, p = out.sample, spec.patch
    places, parts, noisy, extents, items = [], [], [], [], []
    conditions = [*(range(x.shape[1]) for x in s.context), clean_frames(s)]
    for x, clean in zip(vision_items(s), conditions, strict=True):
        _, t, h, w = x.shape
        rows, cols = -(-h // p), -(-w // p)
        places.append(positions.vision(t, rows, cols, origin, fps, spec))
        if task(s.task).context == "source":
            origin = positions.after(places[-1])
        parts.append(patchify(x, p))
        noisy.append(np.repeat(~np.isin(np.arange(t), list(clean)), rows * cols))
        edge = [np.minimum(p, n - p * np.arange(-(-n // p))) for n in (h, w)]
        grid = np.stack(np.meshgrid(*edge, indexing="ij"), -1).reshape(1, -1, 2)
        extents.append(np.repeat(grid, t, 0).reshape(-1, 2))
        items.append((t * rows * cols, x.size))
    out.add("vision", np.concatenate(parts), np.concatenate(noisy), items)
    out.extent, out.context = np.concatenate(extents), sum(n for n, _ in items[:-1])
    return places


def _control_weight(weights: Sequence[float], places: Sequence[np.ndarray], gen: int) -> np.ndarray:
    """[controls, gen] float32: a control takes part in its own attention alone, everything else in all, weighted."""
    share = np.asarray(weights, np.float64) / np.sum(weights)
    out = np.repeat(share[:, None], gen, 1)
    at = 0
    for i in range(len(weights)):
        n = places[i].shape[1]
        out[:, at : at + n] = np.eye(len(weights))[:, i : i + 1]
        at += n
    return out.astype(np.float32)


def _plan_reason(s: Sample, tokenizer, spec: SequenceSpec) -> Planned:
    """A conversation about pictures; the assistant's turns are next-token targets (spec §3.2, §3.5)."""
    turns = s.turns or _turns(s, spec)
    answered = turns[-1].role == "assistant"
    ids, supervised, kinds, pictures = tokenizer.conversation(turns, add_generation_prompt=not answered)
    if answered:  # what follows the last supervised token teaches nothing
        length = int(np.flatnonzero(supervised)[-1]) + 1
        ids, supervised, kinds = ids[:length], supervised[:length], kinds[:length]
    targets = np.full(len(ids), -1, np.int32)
    targets[:-1][supervised[1:]] = ids[1:][supervised[1:]]  # the position before a supervised token predicts it
    where = positions.reasoner(runs(kinds, [p.merged for p in pictures for _ in range(p.spans)]))
    vit = vit_input(pictures, spec) if pictures else None
    return Planned(s, ids, targets, where, np.zeros((3, 0), np.float32), vit=vit, pads=kinds > 0)


def _turns(s: Sample, spec: SequenceSpec) -> tuple[Turn, ...]:
    """The short form of a conversation: a question about frames, and perhaps its answer."""
    shown = () if s.frames is None else (preprocess(s.frames, s.frame_times, spec),)
    question = Turn("user", (*shown, s.prompt))
    return (question,) if s.answer is None else (question, Turn("assistant", (s.answer,)))


def runs(kinds: np.ndarray, grids: Sequence[tuple[int, int]]) -> list[int | tuple[int, int]]:
    """What `positions.reasoner` reads: the lengths of the runs of text, and between them the grid of each span."""
    out: list[int | tuple[int, int]] = []
    at = 0
    for rows, cols in grids:
        first = at + int(np.argmax(kinds[at:] > 0))
        out += [first - at, (rows, cols)] if first > at else [(rows, cols)]
        at = first + rows * cols
    return [*out, len(kinds) - at]


def check_fits(p: Planned, bucket: Bucket) -> None:
    """ValueError naming the capacity when a sample alone exceeds the bucket."""
    for k, n in p.size.items():
        if n > getattr(bucket, k):
            raise ValueError(
                f"sample {p.sample.sample_id} ({p.sample.task}) needs {n} {k} slots, but data.bucket.{k} is "
                f"{getattr(bucket, k)}; raise it or shorten the sample."
            )
    if p.controls > bucket.controls:
        raise ValueError(
            f"sample {p.sample.sample_id} ({p.sample.task}) weighs {p.controls} controls, but data.bucket.controls is "
            f"{bucket.controls}; raise it or leave out `weights`."
        )


@dataclass
class Filled:
    """How full the packed rows are: slots used and offered, by stream."""

    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    offered: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))

    def count(self, rows: Sequence[Sequence[Planned]], bucket: Bucket) -> None:
        for row in rows:
            for k in STREAMS:
                self.used[k] += sum(p.size[k] for p in row)
                self.offered[k] += getattr(bucket, k)

    @property
    def efficiency(self) -> float:
        """Share of the und and gen slots that hold tokens: the cost of a step is paid for all of them."""
        return (self.used["und"] + self.used["gen"]) / max(self.offered["und"] + self.offered["gen"], 1)


def needs(p: Planned) -> list[int]:
    """Slots a sample takes of every capacity: the streams, one segment."""
    return [*p.size.values(), 1]


def capacity(bucket: Bucket) -> np.ndarray:
    """[streams + 1] int: what a row offers, in the order of `needs`."""
    return np.array([getattr(bucket, k) for k in STREAMS] + [bucket.segments])


BEAM = 32


def choose(need: np.ndarray, room: np.ndarray) -> list[int]:
    """The candidates that fill a row best, the first always among them: a beam search. Deterministic.

    need [n, streams+1]: `needs` of each candidate, all of which fit alone; room: `capacity`. Returns ascending indices.
    Each round extends every kept set by every candidate that still fits and keeps the BEAM fullest distinct sums.
    """
    n = len(need)
    used, member = need[:1], np.eye(1, n, dtype=bool)
    best, best_fill = member[0], need[0, :2].sum()
    while True:
        total = used[:, None] + need[None]  # [beam, n, streams+1]
        free = (total <= room).all(-1) & ~member
        if not free.any():
            return np.flatnonzero(best).tolist()
        parent, new = np.nonzero(free)
        sums = total[parent, new]
        order = np.argsort(-(sums[:, 0] + sums[:, 1]), kind="stable")
        _, first = np.unique(sums[order][:, :2], axis=0, return_index=True)
        order = order[np.sort(first)][:BEAM]
        used = sums[order]
        member = member[parent[order]]
        member[np.arange(len(order)), new[order]] = True
        if used[0, 0] + used[0, 1] > best_fill:
            best, best_fill = member[0].copy(), used[0, 0] + used[0, 1]


def fill(rows: Sequence[Sequence[Planned]], bucket: Bucket, spec: SequenceSpec) -> dict[str, np.ndarray]:
    """Write planned samples into the arrays of one batch, row by row, segment by segment."""
    batch = empty_batch(bucket, spec)
    starts = {"vision": 0, "action": batch["vision_x0"].shape[1]}
    starts["sound"] = starts["action"] + batch["action_x0"].shape[1]
    for b, samples in enumerate(rows):
        at = dict.fromkeys(STREAMS, 0)
        frames = 0  # ViT frames are numbered through the row
        for n, p in enumerate(samples):
            _fill_segment(batch, b, n, p, at, starts, frames)
            frames += p.vit.frames if p.vit else 0
    return batch


def _fill_segment(batch, b: int, n: int, p: Planned, at: dict, starts: dict, frames: int) -> None:
    s = p.sample
    und = slice(at["und"], at["und"] + len(p.ids))
    batch["und_ids"][b, und], batch["und_targets"][b, und] = p.ids, p.targets
    batch["und_segment_ids"][b, und] = n
    batch["und_positions"][b, :, und] = p.und_positions
    if p.vit is not None:
        v = slice(at["vit"], at["vit"] + len(p.vit.patches))
        at_grid = p.vit.places
        batch["vit_patches"][b, v], batch["vit_rowcol"][b, v] = p.vit.patches, at_grid.rowcol
        batch["vit_segment_ids"][b, v] = at_grid.frame_ids + frames
        batch["vit_interp_index"][b, v], batch["vit_interp_weight"][b, v] = at_grid.interp_index, at_grid.interp_weight
        first = at["vit"] // MERGE**2
        batch["und_vit_index"][b, und][p.pads] = first + np.arange(int(p.pads.sum()))
        at["vit"] = v.stop
    at["und"] = und.stop

    batch["segment_sample_id"][b, n], batch["segment_task"][b, n] = s.sample_id, INDEX[s.task]
    batch["segment_shift"][b, n] = s.shift
    batch["segment_is_image"][b, n] = task(s.task).vision == "image"
    gen = slice(at["gen"], at["gen"] + p.size["gen"])
    batch["gen_segment_ids"][b, gen] = n
    batch["gen_positions"][b, :, gen] = p.gen_positions
    if p.control_weight is None:
        batch["control_weight"][b, :1, gen] = 1.0  # beside weighted ones: one attention over everything
    else:
        batch["control_weight"][b, : p.controls, gen] = p.control_weight
    place = at["gen"]
    for i, m in enumerate(MODALITIES):
        if m not in p.tokens:
            continue
        count = len(p.tokens[m])
        rows = slice(at[m], at[m] + count)
        batch[f"{m}_x0"][b, rows], batch[f"{m}_noisy"][b, rows] = p.tokens[m], p.noisy[m]
        batch[f"{m}_index"][b, rows] = np.arange(place, place + count)
        batch[f"{m}_segment_ids"][b, rows] = n
        batch[f"{m}_token_ids"][b, rows] = np.arange(count)
        batch["gen_source"][b, place : place + count] = starts[m] + np.arange(rows.start, rows.stop)
        batch["segment_items"][b, n, i] = p.items[m]
        batch[f"{m}_weight"][b, rows] = p.weight[m]
        if m == "vision":
            batch["vision_extent"][b, rows] = p.extent
        elif m == "action":
            batch["action_width"][b, rows], batch["action_domain"][b, rows] = s.actions.shape[1], s.domain
        at[m], place = rows.stop, place + count
    at["gen"] = place


def context_tokens(rows: Sequence[Sequence[Planned]], bucket: Bucket) -> np.ndarray:
    """[B,V] bool, for the rows that `fill` takes: vision tokens before their target, which control guidance hides."""
    out = np.zeros((bucket.rows, bucket.vision), bool)
    for b, samples in enumerate(rows):
        at = 0
        for p in samples:
            out[b, at : at + p.context] = True
            at += p.size["vision"]
    return out


def tight_bucket(planned: Iterable[Planned], rows: int, round_to: int = 32) -> Bucket:
    """The bucket for one sample per row: each capacity is the largest need, rounded up to spare recompilations."""
    need, controls = dict.fromkeys(STREAMS, 0), 0
    for p in planned:
        controls = max(controls, p.controls)
        for k, n in p.size.items():
            need[k] = max(need[k], n)
    need = {k: -(-n // round_to) * round_to for k, n in need.items()}
    return Bucket(rows=rows, segments=1, **need, controls=controls)


def one_per_row(planned: Sequence[Planned], spec: SequenceSpec, rows: int | None = None) -> dict[str, np.ndarray]:
    """Inference batches: sample i alone in row i; `rows` may exceed their number (the rest is padding)."""
    bucket = tight_bucket(planned, rows or len(planned))
    return fill([[p] for p in planned], bucket, spec)


def unpack(buffers: dict[str, np.ndarray], batch: dict, b: int, n: int, s: Sample, spec: SequenceSpec) -> dict:
    """Buffers like `*_x0` → the arrays of segment n in row b: vision [C,T,h,w], action [rows,width], sound [Ds,T].

    Of several vision items, the target. Actions with their clean rows.
    """
    out = {}
    for m, x in buffers.items():
        tokens = np.asarray(x)[b][np.asarray(batch[f"{m}_segment_ids"])[b] == n]
        if not len(tokens):
            continue
        if m == "vision":
            _, t, h, w = s.vision_latents.shape
            target = t * -(-h // spec.patch) * -(-w // spec.patch)
            out[m] = unpatchify(tokens[-target:], s.vision_latents.shape, spec.patch)
        elif m == "action":
            out[m] = tokens[:, : s.actions.shape[1]]
        else:
            out[m] = tokens.T
    return out
