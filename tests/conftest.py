"""Every test runs on the CPU, with one shared compilation cache and compilation tuned for short programs."""

import os
import pathlib
import sys
import tempfile

import pytest

MAPPED = pathlib.Path("/proc/self/maps")
CACHE = pathlib.Path(tempfile.gettempdir()) / "cosmos_jax_test_cache"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """XLA keeps every compiled program mapped; Linux allows a process 65,530 mappings, then it ends without a word."""
    yield
    if "jax" in sys.modules and MAPPED.exists() and MAPPED.read_bytes().count(b"\n") > 15_000:
        sys.modules["jax"].clear_caches()


def pytest_collection_modifyitems(items):
    """Files with slow tests first: at the end of a run no process waits for one."""
    slow = {i.path for i in items if i.get_closest_marker("slow")}
    items.sort(key=lambda i: i.path not in slow)
