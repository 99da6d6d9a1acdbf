"""Rows in the order of their experts, and the run of each expert, cut into tiles of equal size."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rows(NamedTuple):
    """The rows array[index], P of them, which a kernel gathers when it needs them."""

    array: Float[Array, "R A"]
    index: Int[Array, " P"]

    def at(self, place: Int[Array, "*B"]) -> Float[Array, "*B A"]:
        """Rows at `place`; one beyond the last gives the last."""
        return self.array[self.index.at[place].get(mode="clip")]


class Tiles(NamedTuple):
    """Each expert's run, cut into tiles of R rows; a run's last tile reaches beyond it.

    expert, start, stop [B]: expert of each tile, its first row, and the end of its expert's run.
    first [N]: first tile of each expert. used: tiles that exist; those after it are void.
    """

    expert: Int[Array, " B"]
    start: Int[Array, " B"]
    stop: Int[Array, " B"]
    first: Int[Array, " N"]
    used: Int[Array, ""]


def tile_rows(pairs: int, experts: int) -> int:
    """R: an eighth more than the mean run, so that most runs fit one tile; 8 to 256."""
    return min(max(-(-9 * pairs // (8 * experts * 8)) * 8, 8), 256)


def cut(sizes: Int[Array, " N"], pairs: int, rows: int) -> Tiles:
    """Tiles of `rows` rows; there is room for the largest number that any load needs."""
    experts = sizes.shape[0]
    most = pairs // rows + min(experts, pairs)
    count = -(-sizes // rows)
    last = jnp.cumsum(count)
    begin = jnp.cumsum(sizes) - sizes
    tile = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.searchsorted(last, tile, side="right", method="compare_all")
    expert = jnp.minimum(expert, experts - 1)
    return Tiles(
        expert=expert,
        start=begin[expert] + (tile - (last - count)[expert]) * rows,
        stop=(begin + sizes)[expert],
        first=last - count,
        used=last[-1],
    )
