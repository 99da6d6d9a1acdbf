"""What the router sends to each expert: its load, and the tokens that it gets more than others."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from scipy import sparse

from scale_sae_jax.evaluation.bootstrap import ratio


class Profile(NamedTuple):
    """Of one expert: share of all routing, and tokens with their share and over-representation.

    lifts: how many times as often a token is among the expert's as among all routed ones.
    """

    load: float
    tokens: list[int]
    shares: list[float]
    lifts: list[float]


def routed(
    tokens: Int[np.ndarray, " T"], experts: Int[np.ndarray, "T E"], shape: tuple[int, int]
) -> sparse.csr_array:
    """Counts [N, V] of the (selected expert, token id) pairs of T tokens."""
    ids = np.repeat(tokens, experts.shape[1])
    ones = np.ones(ids.size, np.int64)
    return sparse.coo_array((ones, (experts.ravel(), ids)), shape).tocsr()


def profiles(counts: sparse.csr_array, most: int) -> list[Profile]:
    """The profile of each expert from counts [N, V].

    Tokens are ranked by p(token | expert) log(p(token | expert) / p(token)), their part in the KL
    divergence of the expert's tokens from all: neither a frequent token that every expert gets nor
    one that came once leads it. Only tokens with a lift over 1 are named, at most `most`.
    """
    total = counts.sum()
    everywhere = ratio(counts.sum(axis=0), total)
    found = []
    for start, stop in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        tokens, times = counts.indices[start:stop], counts.data[start:stop]
        share = times / max(times.sum(), 1)
        lift = share / everywhere[tokens]
        order = np.lexsort((tokens, -share * np.log(lift)))
        order = order[lift[order] > 1][:most]
        listed = (values[order].tolist() for values in (tokens, share, lift))
        found.append(Profile(float(ratio(times.sum(), total)), *listed))
    return found
