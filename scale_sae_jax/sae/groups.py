"""The (token, expert) pairs of a batch in the order of their experts.

Every token has E selected experts, which makes P = T * E pairs. In the order of their experts, each
expert's pairs are one run of neighbouring rows, however many there are: none is dropped, nothing is
padded, and an expert without tokens has a run of length 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Groups(NamedTuple):
    """Where each pair lies.

    pairs [P]: which pair (token * E + place among its experts) stands in each row. rows [P]: the
    inverse, the row of each pair. tokens, experts [P]: of each row; experts ascend. sizes [N]: rows
    of each expert.
    """

    pairs: Int[Array, " P"]
    rows: Int[Array, " P"]
    tokens: Int[Array, " P"]
    experts: Int[Array, " P"]
    sizes: Int[Array, " N"]


def group(experts: Int[Array, "T E"], n_experts: int) -> Groups:
    """Sorts the pairs by expert; pairs of one expert stay in the order of their tokens."""
    flat = experts.reshape(-1)
    pairs = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.arange(flat.size, dtype=jnp.int32)
    return Groups(
        pairs=pairs,
        rows=jnp.zeros_like(pairs).at[pairs].set(place, unique_indices=True),
        tokens=pairs // experts.shape[1],
        experts=flat[pairs],
        sizes=jnp.zeros(n_experts, jnp.int32).at[flat].add(1),
    )


def by_expert(values: Float[Array, "T E *M"], groups: Groups) -> Float[Array, "P *M"]:
    """What belongs to each pair, in the order of experts."""
    return _reorder(values.reshape(-1, *values.shape[2:]), groups.pairs, groups.rows)


def by_token(rows: Float[Array, "P *M"], groups: Groups, tokens: int) -> Float[Array, "T E *M"]:
    """The inverse of `by_expert`."""
    return _reorder(rows, groups.rows, groups.pairs).reshape(tokens, -1, *rows.shape[1:])


@jax.custom_vjp
def _reorder(rows: Array, order: Array, inverse: Array) -> Array:
    """rows[order] of a permutation: its gradient is a gather as well, not a scatter."""
    return rows[order]


_reorder.defvjp(
    lambda rows, order, inverse: (rows[order], inverse),
    lambda inverse, grad: (grad[inverse], None, None),
)
