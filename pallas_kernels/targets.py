"""Chips that are not here, described well enough to compile for them.

In: "h200:8", "v5e:2x2", "v5p:4x4x4@2", … (check/topology.py). Out: a topology, whose devices `jax.sharding.Mesh` takes
and whose programs the vendor's own compiler makes: Mosaic and libtpu for TPUs, ptxas for GPUs. Nothing can be run.

The numbers of a GPU are facts of the chip (CUDA programming guide, compute capabilities 9.0 and 10.0; data sheets of
H100 SXM, H200 and DGX B200), in the fields that XLA reads. Memory is what the driver shows: 81,559, 143,771 and
183,359 MiB. Needs the wheels of the chip: libtpu, or jax-cuda13-plugin and jax-cuda13-pjrt.
"""

from __future__ import annotations

from jax.experimental import topologies

from pallas_kernels.check.topology import parse

SHARED_MEMORY = 232_448  # bytes that one block may have, of Hopper and of Blackwell: 227 KiB


def _gpu(name: str, capability: int, cores: int, ghz: float, memory: int, bandwidth: int, l2: int) -> str:
    """What XLA wants to know. memory in MiB, bandwidth in GB/s, l2 in MiB."""
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {capability} minor: 0 }}
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: {ghz}
  device_memory_size: {memory * 2**20}
  memory_bandwidth: {bandwidth * 10**9}
  l2_cache_size: {l2 * 2**20}
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
device_description_str: "NVIDIA {name}"
"""


GPUS = {
    "h100": _gpu("H100 80GB HBM3", 9, 132, 1.98, 81_559, 3350, 50),
    "h200": _gpu("H200", 9, 132, 1.98, 143_771, 4800, 50),
    "b200": _gpu("B200", 10, 148, 1.965, 183_359, 8000, 126),
}
# One device for both cores of a v4 chip, as its runtime has it; libtpu's own default is one for each.
CONFIG = {"v4": {"chip_config_name": "megacore"}}


def topology(name: str) -> topologies.TopologyDescription:
    """The chips that `name` means, `check.topology.parse`.

    Raises ValueError for a name that is no topology, and whatever the plugin says of a shape that it does not know.
    """
    t = parse(name)
    if t.platform == "gpu":
        machines = f"1x{t.copies}x{t.shape[0]}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=machines, target_config=GPUS[t.family]
        )
    more = CONFIG.get(t.family, {}) | ({"num_slices": t.copies} if t.copies > 1 else {})
    shape = "x".join(map(str, t.shape))
    return topologies.get_topology_desc(f"{t.family}:{shape}", platform="tpu", **more)
