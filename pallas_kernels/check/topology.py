"""Names of topologies, and the wheels that compile for them.

In: "v5e:2x2", "h200:8", "v5p:4x4x4@2". Out: a `Topology`, or one sentence about what is wrong. Imports nothing heavy.

    family:shape     one slice of TPUs, or one machine of GPUs: v5p:4x4x4, v6e:4x4, h200:8
    family:shape@n   n of them, joined by the network: v5p:4x4x4@2 are two slices, h200:8@4 four machines
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import re

DEFAULT = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h200:1")
INSTALL = "pip install -e '.[aot]'"
FAMILIES = {  # name → (platform, dimensions of its shape)
    "v4": ("tpu", 3),
    "v5e": ("tpu", 2),
    "v5p": ("tpu", 3),
    "v6e": ("tpu", 2),
    "tpu7x": ("tpu", 3),
    "h100": ("gpu", 1),
    "h200": ("gpu", 1),
    "b200": ("gpu", 1),
}
PER_CHIP = {"tpu7x": 2}  # devices that jax sees of one chip, where that is not 1


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are joined: `copies` slices (or machines) of `shape`."""

    name: str
    family: str
    platform: str  # tpu | gpu
    shape: tuple[int, ...]
    copies: int

    @property
    def chips(self) -> int:
        return self.copies * math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * PER_CHIP.get(self.family, 1)


def parse(name: str) -> Topology:
    """ValueError, one sentence, for a name that is no topology."""
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?:@([1-9]\d*))?", name)
    family = found and found[1]
    shape = tuple(map(int, found[2].split("x"))) if found else ()
    if family not in FAMILIES or len(shape) != FAMILIES[family][1]:
        raise ValueError(
            f"--topology={name} is not a topology; write one like {', '.join(DEFAULT)}; families are "
            f"{', '.join(FAMILIES)}, and @2 behind the shape means two of it."
        )
    return Topology(name, family, FAMILIES[family][0], shape, int(found[3] or 1))


def platform(name: str) -> str:
    """ "tpu" or "gpu". ValueError, one sentence, for a name that is no topology."""
    return parse(name).platform


def missing(name: str) -> str | None:
    """Why programs for this topology cannot be compiled here, and what to install; None if they can."""
    jax = importlib.metadata.version("jax")
    if platform(name) == "tpu":
        return None if importlib.util.find_spec("libtpu") else f"{name} needs the wheel libtpu; run: {INSTALL}"
    if tuple(map(int, jax.split(".")[:2])) < (0, 11):
        return f"{name} needs jax ≥ 0.11, which needs Python ≥ 3.12 (here is jax {jax}); there run: {INSTALL}"
    for wheel in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} needs the wheel {wheel}; run: {INSTALL}"
        if found != jax:
            return f"{name} needs {wheel} {jax}, as jax, and {found} is installed; run: {INSTALL}"
    return None
