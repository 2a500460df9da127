"""How processes are told to train as one. What they then do is in tests/processes."""

import pytest

from cosmos_jax import dist
from cosmos_jax.config import ConfigError


def test_a_launcher_of_several_processes_is_not_overlooked(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "16")
    with pytest.raises(ConfigError, match="Slurm started 16 processes.*add --distributed"):
        dist.start(False)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    dist.start(False)


def test_an_address_without_the_option_is_not_overlooked(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS is set, but --distributed is not given"):
        dist.start(False)


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="is set, but not JAX_NUM_PROCESSES, JAX_PROCESS_ID; set all three"):
        dist.start(True)


def test_nobody_to_find_is_one_sentence(monkeypatch):
    for name in (*dist.BY_HAND, *dist.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="the processes did not find each other"):
        dist.start(True)


def test_alone_the_values_are_ones_own():
    assert dist.gather({"a": [1]}) == [{"a": [1]}] and dist.first() and dist.count() == 1
