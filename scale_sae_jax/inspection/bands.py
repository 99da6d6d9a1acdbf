"""The sampled contexts of a latent by how strongly it fires: bands of equally many peaks."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from scale_sae_jax.inspection.contexts import OUTSIDE, Peaks

BANDS = ("strong", "middling", "weak")


class Band(NamedTuple):
    """low, high: smallest and largest peak of this share of the sample; contexts: from it."""

    name: str
    low: float
    high: float
    share: float
    contexts: Peaks


def bands(sample: Peaks, top: Peaks) -> list[Band]:
    """Thirds of one latent's uniform sample of peaks, strongest first, without those in `top`."""
    if not len(sample.value):
        return []
    order = np.lexsort((sample.position, sample.row, -sample.value))
    shown = set(zip(top.row.tolist(), top.position.tolist(), strict=True))
    found = []
    for name, third in zip(BANDS, np.array_split(order, len(BANDS)), strict=True):
        new = [i for i in third if (sample.row[i], sample.position[i]) not in shown]
        if not new:
            continue
        values, chosen = sample.value[third], Peaks(*(field[new] for field in sample))
        share = len(third) / len(order)
        found.append(Band(name, float(values.min()), float(values.max()), share, chosen))
    return found


def peak_tokens(top: Peaks, before: int) -> Int[np.ndarray, " n"]:
    """Tokens on which the top contexts peak, the most frequent first, then the stronger."""
    tokens = top.tokens[:, before]
    tokens = tokens[tokens != OUTSIDE]
    ids, first, times = np.unique(tokens, return_index=True, return_counts=True)
    return ids[np.lexsort((first, -times))]
