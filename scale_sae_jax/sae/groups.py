"""The (token, expert) pairs of a batch in the order of their experts.

Every token has E selected experts, which makes P = T * E pairs. In the order of their experts, each
expert's pairs are one run of neighbouring rows, however many there are: none is dropped, nothing is
padded, and an expert without tokens has a run of length 0. Pairs whose expert lies on another
device come last and belong to no run.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

ELSEWHERE = 2**30  # the row of a pair without one


class Groups(NamedTuple):
    """Where each pair lies.

    pairs [P]: which pair (token * E + place among its experts) stands in each row. rows [P]: the
    inverse, the row of each pair, or `ELSEWHERE`. experts [P]: the expert of each row, ascending.
    sizes [N]: rows of each expert.
    """

    pairs: Int[Array, " P"]
    rows: Int[Array, " P"]
    experts: Int[Array, " P"]
    sizes: Int[Array, " N"]

    def active(self, tokens: int) -> int:
        """E, the pairs of each of all `tokens`."""
        return self.pairs.size // tokens

    @property
    def shifts(self) -> "Groups":
        """What numbers grow by from one group of pairs to another put at its end; see `joined`."""
        pairs, experts = self.pairs.size, self.sizes.size
        return Groups(pairs=pairs, rows=pairs, experts=experts, sizes=0)


def group(experts: Int[Array, "T E"], n_experts: int) -> Groups:
    """Sorts the pairs by expert; pairs of one expert stay in the order of their tokens.

    Args:
      experts: ids below `n_experts`; `n_experts` itself stands for an expert on another device.
    """
    flat = experts.reshape(-1)
    pairs = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.arange(flat.size, dtype=jnp.int32)
    sizes = jnp.zeros(n_experts, jnp.int32).at[flat].add(1, mode="drop")
    row = jnp.where(place < sizes.sum(), place, ELSEWHERE)
    return Groups(
        pairs=pairs,
        rows=jnp.zeros_like(pairs).at[pairs].set(row, unique_indices=True),
        experts=flat[pairs],
        sizes=sizes,
    )
