"""The device mesh: axes ("data", "fsdp", "tp", "cp"), explicit axis types.

In: `MeshConfig`, or words like fsdp=4,tp=2. Out: a `jax.sharding.Mesh` to enter with `jax.set_mesh`. Imports jax only
to build one: `plan` checks sizes without it.
"""

from __future__ import annotations

import math
import typing

import numpy as np

from cosmos_jax.config import Config, ConfigError, MeshConfig, ModelConfig, nearest

if typing.TYPE_CHECKING:
    import jax

AXES = ("data", "fsdp", "tp", "cp")
NAMED = (*AXES, "cfg")  # what a mesh may have; cfg, guidance branches side by side, only to generate


def parse(words: str) -> MeshConfig:
    """`fsdp=4,tp=2` → the sizes; axes that are not named have size 1. ConfigError, one sentence, for other words."""
    sizes = dict.fromkeys(NAMED, 1)
    named = set()
    for word in words.split(","):
        axis, _, size = word.strip().partition("=")
        if axis not in NAMED:
            raise ConfigError(
                f"--mesh={words}: {axis!r} is no axis{nearest(axis, NAMED)}; the axes are {', '.join(NAMED)}."
            )
        if axis in named:
            raise ConfigError(f"--mesh={words} gives {axis} twice; keep one.")
        if not size.removeprefix("-").isdecimal():
            raise ConfigError(f"--mesh={words}: {axis} needs a whole number, as in {axis}=2.")
        named.add(axis)
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def build(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """Mesh over all devices. One axis may be -1 and takes what the others leave.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    import jax

    devices = jax.devices() if devices is None else devices
    found = sizes(config, len(devices))
    kinds = (jax.sharding.AxisType.Explicit,) * len(found)
    return jax.sharding.Mesh(laid(list(found.values()), devices), tuple(found), axis_types=kinds)


def sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Axis → size on so many devices, in the mesh's order. ConfigError as for `build`."""
    axes = ("cfg", *AXES) if config.cfg != 1 else AXES
    said = {axis: getattr(config, axis) for axis in axes}
    given = list(said.values())
    if given.count(-1) > 1 or any(n == 0 or n < -1 for n in given):
        raise ConfigError(f"mesh={said}: sizes are positive, and at most one is -1.")
    known = math.prod(n for n in given if n != -1)
    if devices % known or (-1 not in given and known != devices):
        raise ConfigError(
            f"mesh={said} does not fit {devices} devices; "
            "make the product equal to the device count, or set one axis to -1."
        )
    return {axis: devices // known if n == -1 else n for axis, n in said.items()}


def laid(sizes: list[int], devices) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours of the network beside each other.

    Slices of TPUs lie along the first axis that they divide (data before fsdp), so that all else stays inside one. An
    axis may take a part of a dimension of the torus: tp=2 on 4×4×4 chips. ConfigError where slices divide no axis.
    """
    from jax.experimental import mesh_utils

    slices = len({getattr(d, "slice_index", None) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    at = next((i for i, n in enumerate(sizes) if n % slices == 0), None)
    if at is None:
        raise ConfigError(
            f"{slices} slices divide no axis of the mesh ({' × '.join(map(str, sizes))}); set mesh.data to a multiple."
        )
    across = [slices if i == at else 1 for i in range(len(sizes))]
    inside = [n // k for n, k in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuse, before anything compiles, a mesh whose axes do not divide the model or the batch."""
    size = dict(mesh.shape)
    if "cfg" in size:
        raise ConfigError(f"mesh.cfg={size['cfg']} is for generating; training has no guidance branches, set it to 1.")
    check_model(config.model, mesh)
    bucket = config.data.bucket
    rows = bucket.rows // config.optim.accumulate
    _divides(rows, size["data"] * size["fsdp"], "data.bucket.rows/optim.accumulate by mesh.data × mesh.fsdp")
    for stream, spread in (("und", config.model.und_tokens == "spread"), ("gen", True)):
        axes = ("cp", "tp") if spread else ("tp",)
        what = f"data.bucket.{stream} by " + " × ".join(f"mesh.{a}" for a in axes)
        _divides(getattr(bucket, stream), math.prod(size[a] for a in axes), what)


def check_model(m: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh whose axes do not divide the model. ConfigError."""
    size = dict(mesh.shape)
    for value, axis, what in (
        (m.kv_heads, "tp", "model.kv_heads"), (m.mlp, "tp", "model.mlp"), (m.vocab, "tp", "model.vocab"),
    ):  # fmt: skip
        _divides(value, size[axis], f"{what} by mesh.{axis}")
    _divides(m.hidden, size["fsdp"] * size["cp"], "model.hidden by mesh.fsdp × mesh.cp")
    if m.context == "ulysses":
        _divides(m.kv_heads, size["tp"] * size["cp"], "model.kv_heads by mesh.tp × mesh.cp (model.context=ulysses)")
    if m.vision and (m.vision.heads % size["tp"] or m.vision.hidden % (size["fsdp"] * size["cp"])):
        raise ConfigError(
            "Cannot divide model.vision by the mesh: heads must be a multiple of tp, hidden of fsdp × cp."
        )


def _divides(value: int, divisor: int, what: str) -> None:
    if value % divisor:
        raise ConfigError(f"Cannot divide {what}: {value} is not a multiple of {divisor}; change one of the two.")
