"""The device mesh: axes ("data", "fsdp", "tp", "cp"), explicit axis types.

In: `MeshConfig`. Out: a `jax.sharding.Mesh` to enter with `jax.set_mesh`.
"""

from __future__ import annotations

import math

import jax

from cosmos_jax.config import Config, ConfigError, MeshConfig

AXES = ("data", "fsdp", "tp", "cp")


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
    m, rows = config.model, config.data.bucket.rows // config.optim.accumulate
    batch = size["data"] * size["fsdp"]
    for value, divisor, what in (
        (m.kv_heads, size["tp"], "model.kv_heads by mesh.tp"),
        (m.mlp, size["tp"], "model.mlp by mesh.tp"),
        (m.vocab, size["tp"], "model.vocab by mesh.tp"),
        (m.hidden, size["fsdp"], "model.hidden by mesh.fsdp"),
        (rows, batch, "data.bucket.rows/optim.accumulate by mesh.data × mesh.fsdp"),
    ):
        if value % divisor:
            raise ConfigError(f"Cannot divide {what}: {value} is not a multiple of {divisor}; change one of the two.")
    if m.vision and (m.vision.heads % size["tp"] or m.vision.hidden % size["fsdp"]):
        raise ConfigError("Cannot divide model.vision by the mesh: heads must be a multiple of tp, hidden of fsdp.")
