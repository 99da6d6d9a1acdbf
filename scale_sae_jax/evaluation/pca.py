"""A linear yardstick: rank-k principal components, which spend the same k numbers a token."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from scale_sae_jax.evaluation.bootstrap import ratio
from scale_sae_jax.evaluation.evaluator import EvalBatch


def components(
    rows: Float[np.ndarray, "T D"], mean: Float[np.ndarray, " D"], rank: int
) -> Float[np.ndarray, "R D"]:
    """The `rank` leading principal directions of training activations."""
    centred = rows.astype(np.float64) - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return vectors[:, ::-1][:, :rank].T


def fvu(
    batches: Iterable[EvalBatch],
    mean: Float[np.ndarray, " D"],
    directions: Float[np.ndarray, "R D"],
    max_norm: float,
) -> float:
    """FVU of the projection of held-out activations, on the tokens that `fvu` is measured on.

    NaN where they do not vary.
    """
    left, total = 0.0, 0.0
    for batch in batches:
        x = np.asarray(batch.x, np.float64)[batch.scored]
        x = x[np.linalg.norm(x, axis=-1) <= max_norm] - mean
        total += np.square(x).sum()
        left += np.square(x).sum() - np.square(x @ directions.T).sum()
    return float(ratio(left, total))
