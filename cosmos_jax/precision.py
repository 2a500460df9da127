"""Which numbers have which width.

In: `PrecisionConfig`. Out: a `Precision` every function of the model takes explicitly; there are no global flags.

fp32 islands, whatever the compute dtype (spec model.md §11): RMSNorm and LayerNorm statistics, RoPE phases and their
cos/sin, attention softmax, the timestep embedder, logits, noise, interpolation, targets, losses, solver state, EMA.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from cosmos_jax.config import ConfigError, PrecisionConfig
from pallas_kernels import platform


@dataclass(frozen=True)
class Precision:
    """`compute`: dtype of activations and of weights at use; `matmul`: XLA precision of the model's matmuls; `reduce`:
    dtype in which gradients of matrices leave their matmul and are added up over devices, or "compute".
    """

    compute: str = "float32"
    matmul: str = "default"
    reduce: str = "float32"

    @property
    def dtype(self):
        return jnp.dtype(self.compute)


HIGHEST = Precision("float32", "highest")  # parity tests


def resolve(config: PrecisionConfig) -> Precision:
    """Turn `auto` into a dtype for the device that is traced for: float32 on CPU, bfloat16 on GPU and TPU.

    That is the device of the mesh which was entered, else this machine's (`platform.device`).
    """
    compute = config.compute
    if compute == "auto":
        compute = "float32" if platform.device().platform == "cpu" else "bfloat16"
    if compute not in ("float32", "bfloat16"):
        raise ConfigError(f"precision.compute={compute!r} is not one of auto, float32, bfloat16.")
    if config.params != "float32":
        raise ConfigError(
            f"precision.params={config.params!r}: master weights are float32; set precision.compute instead."
        )
    if config.matmul not in ("default", "highest"):
        raise ConfigError(f"precision.matmul={config.matmul!r} is not one of default, highest.")
    if config.reduce not in ("float32", "compute"):
        raise ConfigError(f"precision.reduce={config.reduce!r} is not one of float32, compute.")
    return Precision(compute, config.matmul, config.reduce)
