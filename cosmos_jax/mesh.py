"""The device mesh: axes ("data", "fsdp", "tp", "cp"), explicit axis types.

In: `MeshConfig`, or words like fsdp=4,tp=2. Out: a `jax.sharding.Mesh` to enter with `jax.set_mesh`.
"""

from __future__ import annotations

import math

import jax

from cosmos_jax.config import Config, ConfigError, MeshConfig, ModelConfig, nearest

AXES = ("data", "fsdp", "tp", "cp")


def parse(words: str) -> MeshConfig:
    """`fsdp=4,tp=2` → the sizes; axes that are not named have size 1. ConfigError, one sentence, for other words."""
    sizes = dict.fromkeys(AXES, 1)
    named = set()
    for word in words.split(","):
        axis, _, size = word.strip().partition("=")
        if axis not in AXES:
            raise ConfigError(f"--mesh={words}: {axis!r} is no axis{nearest(axis, AXES)}; the axes are data, fsdp, tp.")
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
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ConfigError(f"mesh={dict(zip(AXES, sizes, strict=True))}: sizes are positive, and at most one is -1.")
    if config.cp != 1:
        raise ConfigError(f"mesh.cp={config.cp}: context parallelism is not available yet; set mesh.cp=1.")
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ConfigError(
            f"mesh={dict(zip(AXES, sizes, strict=True))} does not fit {len(devices)} devices; "
            "make the product equal to the device count, or set one axis to -1."
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuse, before anything compiles, a mesh whose axes do not divide the model or the batch."""
    size = dict(mesh.shape)
    check_model(config.model, mesh)
    rows = config.data.bucket.rows // config.optim.accumulate
    _divides(rows, size["data"] * size["fsdp"], "data.bucket.rows/optim.accumulate by mesh.data × mesh.fsdp")


def check_model(m: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh whose axes do not divide the model. ConfigError."""
    size = dict(mesh.shape)
    for value, axis, what in (
        (m.kv_heads, "tp", "model.kv_heads"), (m.mlp, "tp", "model.mlp"), (m.vocab, "tp", "model.vocab"),
        (m.hidden, "fsdp", "model.hidden"),
    ):  # fmt: skip
        _divides(value, size[axis], f"{what} by mesh.{axis}")
    if m.vision and (m.vision.heads % size["tp"] or m.vision.hidden % size["fsdp"]):
        raise ConfigError("Cannot divide model.vision by the mesh: heads must be a multiple of tp, hidden of fsdp.")


def _divides(value: int, divisor: int, what: str) -> None:
    if value % divisor:
        raise ConfigError(f"Cannot divide {what}: {value} is not a multiple of {divisor}; change one of the two.")
