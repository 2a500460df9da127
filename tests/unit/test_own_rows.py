"""Which rows of a global batch a process reads: exactly those that its devices hold, in the order they hold them."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from cosmos_jax import shard
from cosmos_jax.mesh import AXES


@pytest.mark.parametrize(
    ("shape", "process_of", "rows"),
    [
        ((2, 2, 1, 1), [0, 0, 1, 1], {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}),
        ((4, 1, 1, 1), [0, 1, 0, 1], {0: (0, 1, 4, 5), 1: (2, 3, 6, 7)}),  # not side by side
        ((1, 2, 2, 1), [0, 1, 0, 1], {0: tuple(range(8)), 1: tuple(range(8))}),  # tp across processes: both hold all
    ],
)
def test_a_process_owns_the_rows_of_its_devices(monkeypatch, shape, process_of, rows):
    whole = shard.batch_sharding(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES))
    assert shard.own_rows(whole.mesh, 8) == tuple(range(8))
    parts = np.arange(8).reshape(shape[0] * shape[1], -1)

    class Sharding:
        def __init__(self, process):
            self.process = process

        def addressable_devices_indices_map(self, global_shape):
            assert global_shape == (8,)
            coordinates = np.ndindex(*shape)
            found = {}
            for i, (data, fsdp, *_) in enumerate(coordinates):
                own = parts[data * shape[1] + fsdp]
                if process_of[i] == self.process:
                    found[i] = (slice(own[0], own[-1] + 1, None),)
            return found

    for process, expected in rows.items():
        monkeypatch.setattr(shard, "batch_sharding", lambda mesh, p=process: Sharding(p))
        assert shard.own_rows(None, 8) == expected
