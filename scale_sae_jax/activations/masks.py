"""Which positions of token rows are left out, and for what reason.

Harvest and evaluation share these rules. Beginning-of-segment and special tokens, and about one
other token in a thousand, have norms hundreds of times the median ("massive activations",
arXiv 2402.17762); one of them would outweigh thousands of ordinary tokens.
"""

from collections.abc import Collection
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from scale_sae_jax.config import ActivationsConfig
from scale_sae_jax.errors import UserError


class Fate(IntEnum):
    """What becomes of a position; one that meets several conditions has the first of these."""

    KEPT = 0
    PADDING = 1
    POSITION_0 = 2
    SPECIAL = 3
    OUTLIER = 4


class TokenFlags(NamedTuple):
    """Facts about positions [B, S]; a BOS at the start of a segment is both of the last two."""

    padding: np.ndarray  # bool
    position_0: np.ndarray  # bool: first position of a segment
    special: np.ndarray  # bool: token is one of the special ids


def token_flags(
    tokens: Int[np.ndarray, "B S"], segments: Int[np.ndarray, "B S"], special_ids: Collection[int]
) -> TokenFlags:
    """Flags of token rows; `segments` is 0 for padding and equal for one piece of a document."""
    real = segments > 0
    starts = np.diff(segments, axis=1, prepend=0) != 0
    special = np.isin(tokens, np.fromiter(special_ids, np.int64))
    return TokenFlags(~real, real & starts, real & special)


def fates(flags: TokenFlags, config: ActivationsConfig) -> Int8[np.ndarray, "B S"]:
    """The `Fate` of each position by its flags and the mask options; outliers are not known yet."""
    fate = np.full(flags.padding.shape, Fate.KEPT, np.int8)
    if config.drop_special:
        fate[flags.special] = Fate.SPECIAL
    if config.drop_position_0:
        fate[flags.position_0] = Fate.POSITION_0
    if config.mask_padding:
        fate[flags.padding] = Fate.PADDING
    return fate


def evaluated(config: ActivationsConfig) -> ActivationsConfig:
    """The mask options of evaluation and edits, which leave out what training may have kept.

    Padding, position 0, special tokens, and outliers: by the ratio of training, or by the default
    where that keeps all. So metrics compare, and no few positions decide them.
    """
    default = ActivationsConfig()
    return replace(default, max_norm_ratio=config.max_norm_ratio or default.max_norm_ratio)


def keep(flags: TokenFlags, config: ActivationsConfig) -> Bool[np.ndarray, "B S"]:
    """Positions that no mask option leaves out."""
    return fates(flags, config) == Fate.KEPT


def nothing_kept() -> UserError:
    """What to raise where no activation is left to train on."""
    return UserError(
        "no activation is left after the masks: give more text with --config.text.path, or raise "
        "--config.text.context or --config.activations.max_norm_ratio"
    )


def largest_norm(median_norm: float, max_norm_ratio: float) -> float:
    """The norm over which an activation is an outlier; none is if the ratio is 0."""
    return max_norm_ratio * median_norm if max_norm_ratio > 0 else np.inf


def largest_evaluated(median_norm: float, config: ActivationsConfig) -> float:
    """The norm over which an activation is an outlier of evaluation and edits."""
    return largest_norm(median_norm, evaluated(config).max_norm_ratio)


def outliers(
    norms: Float[np.ndarray, "*T"], median_norm: float, max_norm_ratio: float
) -> Bool[np.ndarray, "*T"]:
    """Activations with a norm over `max_norm_ratio` times the median."""
    return norms > largest_norm(median_norm, max_norm_ratio)
