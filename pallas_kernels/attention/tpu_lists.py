"""What the Mosaic TPU kernels visit: sizes of tiles, and lists of the tiles in which anything is seen.

In: buffer sizes and a chip's name, then `Flat`. Out: `Tiles`, then `Lists`, built once per step for all layers, forward
and backward.

A list holds one int32 per visited tile, and the kernels' grid is as long as the list, so a tile in which nobody sees
anything costs nothing. Each row of tiles (column, in the list by keys) is there at least once: its output is written.

    query tile << 18 | key tile << 4 | kind << 2 | last of its row << 1 | first of its row
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.segments import ALL, SKIP, SOME, Flat, kinds

LANES = 128
QUERY_TILES, KEY_TILES = 2**13, 2**14  # what an entry has bits for
LONGEST = 180_000  # entries; a list lives in scalar memory: 170,569 still compile for v5e, v5p and tpu7x
VMEM = {"v5 lite": 128, "v5e": 128, "v6": 128}  # MiB, by a part of the chip's name; others have 64


@dataclasses.dataclass(frozen=True)
class Tiles:
    """queries × keys of a tile, multiples of 128; `chunk` keys (or queries) of it are computed at a time."""

    queries: int = 1024
    keys: int = 1024
    chunk: int = 512
    vmem: int = 48 * 2**20  # bytes the compiler may use

    @property
    def pad(self) -> tuple[int, int]:
        return self.queries, self.keys

    def __str__(self) -> str:
        return f"tiles of {self.queries} × {self.keys}"


class Lists(NamedTuple):
    """Tiles to visit, and ids and limits repeated along lanes as the vector unit compares them. All int32."""

    by_query: jax.Array  # [tiles]: entries; those after `queries_steps` are unused
    by_key: jax.Array  # [tiles]
    query_steps: jax.Array  # [1]
    key_steps: jax.Array  # [1]
    q_ids: jax.Array  # [Tq,128]; padding is −2 and so equals no key
    limit: jax.Array  # [Tq,128]
    k_ids: jax.Array  # [Tk,128]


def tiles(queries: int, keys: int, kind: str) -> Tiles:
    """Tiles for buffers of so many tokens: up to 1024 × 1024, as even as they can be, more keys for a longer list.

    Raises ValueError for buffers that no list can hold.
    """
    vmem = next((mib for name, mib in VMEM.items() if name in kind), 64)
    for most in (1024, 2048):
        found = Tiles(_even(queries, 1024), _even(keys, most), vmem=vmem * 3 // 4 * 2**20)
        if _entries(queries, keys, found) <= LONGEST:
            return found
    raise ValueError(
        f"attention backend mosaic_tpu holds no list for {queries} queries × {keys} keys in one buffer; "
        "spread them over more devices (context parallel) or choose xla."
    )


def plan(flat: Flat, sizes: Tiles) -> Lists:
    """The lists for these ids. Raises ValueError when tiles of this size are too many."""
    count = _entries(len(flat.q_ids), len(flat.k_ids), sizes)
    if count > LONGEST or len(flat.q_ids) // sizes.queries > QUERY_TILES or len(flat.k_ids) // sizes.keys > KEY_TILES:
        raise ValueError(f"attention backend mosaic_tpu: {count} {sizes} are too many for one list; take larger ones.")
    found = kinds(flat, sizes.queries, sizes.keys)
    query, key = (jax.lax.broadcasted_iota(jnp.int32, found.shape, axis) for axis in (0, 1))
    where = query << 18 | key << 4 | found << 2
    by_query, query_steps = _ordered(where, found)
    by_key, key_steps = _ordered(where.T, found.T)
    q_ids = jnp.where(flat.q_ids < 0, -2, flat.q_ids)
    columns = (jnp.broadcast_to(x[:, None], (len(x), LANES)) for x in (q_ids, flat.limit, flat.k_ids))
    return Lists(by_query, by_key, query_steps, key_steps, *columns)


class Entry(NamedTuple):
    query: jax.Array
    key: jax.Array
    full: jax.Array  # every pair of the tile is visible
    some: jax.Array  # some pairs may be; neither: nothing to compute
    first: jax.Array
    last: jax.Array


def read(entry: jax.Array) -> Entry:
    """What an entry says."""
    kind = entry >> 2 & 3
    return Entry(query_tile(entry), key_tile(entry), kind == ALL, kind == SOME, (entry & 1) != 0, (entry & 2) != 0)


def query_tile(entry: jax.Array) -> jax.Array:
    return entry >> 18


def key_tile(entry: jax.Array) -> jax.Array:
    return entry >> 4 & KEY_TILES - 1


def _ordered(entries: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The visited entries row by row, the rest of the array unused; and their number [1]."""
    visited = found != SKIP
    visited = visited.at[:, 0].set(visited[:, 0] | ~visited.any(1))
    before = jnp.cumsum(visited, 1)
    entries |= jnp.where(before == 1, 1, 0) | jnp.where(before == before[:, -1:], 2, 0)
    flat = visited.reshape(-1)
    places = jnp.where(flat, jnp.cumsum(flat) - 1, flat.size)
    return jnp.zeros(flat.size, jnp.int32).at[places].set(entries.reshape(-1), mode="drop"), flat.sum(keepdims=True)


def _entries(queries: int, keys: int, sizes: Tiles) -> int:
    return -(-queries // sizes.queries) * -(-keys // sizes.keys)


def _even(tokens: int, most: int) -> int:
    """Multiple of 128, at most `most`, that cuts the tokens into the fewest tiles and pads them least."""
    count = max(-(-tokens // most), 1)
    return max(-(-tokens // (count * LANES)), 1) * LANES
