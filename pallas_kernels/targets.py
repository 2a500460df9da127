"""Chips that are not here, described well enough to compile for them.

In: "h200:1", "v5e:2x2", … Out: a topology, whose devices `jax.sharding.Mesh` takes and whose programs the vendor's own
compiler makes: Mosaic and libtpu for TPUs, ptxas for GPUs. Nothing can be run on them.

The numbers of a GPU are facts of the chip (CUDA programming guide, "compute capability 9.0"; the H200 data sheet), in
the fields that XLA reads. Needs the wheels of the chip: libtpu, or jax-cuda13-plugin and jax-cuda13-pjrt.
"""

from __future__ import annotations

import re

from jax.experimental import topologies

SHARED_MEMORY = 232_448  # bytes that one block of Hopper may have: 227 KiB

H200 = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151000000000
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {SHARED_MEMORY}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""
GPUS = {"h200": H200}


def topology(name: str) -> topologies.TopologyDescription:
    """The chips that `name` means: "h200:8" is eight GPUs of one machine, any other name is one of libtpu's.

    Raises ValueError for a GPU without a number, and whatever the plugin says of a name that it does not know.
    """
    kind, _, count = name.partition(":")
    if kind not in GPUS:
        return topologies.get_topology_desc(name, platform="tpu")
    if not re.fullmatch(r"[1-9]\d*", count):
        raise ValueError(f"topology {name!r}: write how many GPUs one machine has, for example {kind}:1.")
    text = GPUS[kind]
    return topologies.get_topology_desc(platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=text)
