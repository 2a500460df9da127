"""How fast the devices of a mesh axis talk to each other.

In: the chip, and for one set of axes how its devices are joined. Out: seconds of a collective, at the rates of
`chips.CHIPS`. Imports no jax.

A collective over one dimension of a torus uses both links of every chip if the dimension is a ring, one if it is a
line; over several dimensions, the links of all. Between slices (or machines) every member of a slice sends its share
through its own part of the network, then the slices' own links do the rest: the two times add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cosmos_jax.chips import Chip
from cosmos_jax.plan.hlo import Collective
from pallas_kernels.check.topology import PER_CHIP, Topology

INSIDE = 6  # "die-to-die … six times faster than a 1D ICI link" (TPU7x page), as links


@dataclass(frozen=True)
class Joined:
    """The devices of one group. links: of each device, that they may use; 0 on GPUs, whose switch joins all."""

    local: int  # of one slice or machine
    outer: int = 1  # slices or machines
    links: int = 0

    @property
    def says(self) -> str:
        inside = f"{self.links} ICI link{'s' * (self.links > 1)}" if self.links else "NVLink"
        network = f"the network between {self.outer}"
        return " and ".join([inside] * (self.local > 1) + [network] * (self.outer > 1)) or "nothing"


def seconds(c: Collective, joined: Joined, chip: Chip) -> float:
    """Of all the times it runs."""
    local, outer, group = joined.local, joined.outer, joined.local * joined.outer
    inside = chip.link * (joined.links or 1)
    between = chip.network
    if c.kind == "collective-permute":
        one = c.bytes / (between if outer > 1 else inside)
    elif c.kind == "all-to-all":
        one = c.bytes * ((local - 1) / group / inside + (group - local) / group / between)
    else:
        one = c.bytes * ((local - 1) / local / inside + (outer - 1) / outer / (between * local))
        one *= 2 if c.kind == "all-reduce" else 1
    return c.times * one


def ring(size: int, whole: int, wraps: int) -> int:
    """Links that `size` neighbours in a dimension of `whole` chips may use."""
    return 2 if size == whole and wraps and whole % wraps == 0 else 1


def from_places(places: Sequence[tuple[int, tuple[int, ...]]], shape: tuple[int, ...], chip: Chip) -> Joined:
    """places: (slice or machine, coordinates) of the devices of a group; shape: of one slice."""
    outer = len({s for s, _ in places})
    local = len(places) // outer
    if not chip.wraps:
        return Joined(local, outer)
    links = 0
    for d, whole in enumerate(shape):
        n = len({at[d] for _, at in places})
        links += ring(n, whole, chip.wraps) if n > 1 else 0
    return Joined(local, outer, links or (INSIDE if local > 1 else 0))


def guessed(topology: Topology, sizes: Mapping[str, int], axes: tuple[str, ...], chip: Chip) -> Joined:
    """Without asking jax how it would lay the mesh: the last axes are nearest to each other.

    Devices are numbered slice by slice; an axis that divides the torus takes whole dimensions where it can.
    """
    per_copy = topology.devices // topology.copies
    names = list(sizes)
    stride = {a: math.prod(sizes[b] for b in names[i + 1 :]) for i, a in enumerate(names)}
    group = math.prod(sizes[a] for a in axes)
    outer = 1
    for a in axes:  # the part of this axis that lies beyond one slice
        outer *= max(1, sizes[a] * stride[a] // max(per_copy, stride[a])) if sizes[a] * stride[a] > per_copy else 1
    local = group // outer
    if not chip.wraps:
        return Joined(local, outer)
    left, links = local, 0
    if left % PER_CHIP.get(topology.family, 1) == 0 and left > 1:
        left //= PER_CHIP.get(topology.family, 1)
    for whole in sorted(topology.shape, reverse=True):
        if whole > 1 and left > 1:
            n = math.gcd(left, whole)
            links, left = links + (ring(n, whole, chip.wraps) if n > 1 else 0), left // n
    return Joined(local, outer, links or (INSIDE if local > 1 else 0))
