"""Activations with known features: a sparse sum of directions, drawn anew for every sample id.

The settings of SynthSAEBench-16k (Chanin & Garriga-Alonso, arXiv 2602.14687) are the defaults. A
sample is x = bias + sum_i a_i * direction_i, with a >= 0 drawn in three steps:

1. Feature i is a candidate when a standard normal exceeds its cut. The normals correlate through
   `rank` factors (a Gaussian copula); the cuts give falling, Zipf-like firing rates.
2. The first features form trees, numbered level by level over all trees; the rest are free. A child
   needs its parent, and of the candidates among siblings one, drawn uniformly, fires. To make up
   for both, its candidate rate is rate / parent's rate * (1 + other siblings' rates / parent's
   rate), at most 1, as published. That is a first-order correction: siblings whose rates add up to
   more than their parent's still fire less often than their rates say.
3. A magnitude is ReLU(mean_i + std_i * normal); a child's is multiplied by its parent's, itself
   scaled, over the parent's mean_i. A feature whose magnitude is 0 does not fire.

`synthetic_features.py` makes the features, `synthetic_samples.py` the samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int64

from scale_sae_jax.activations.synthetic_features import (
    Layout,
    World,
    levels,
    make_layout,
    make_world,
)
from scale_sae_jax.activations.synthetic_samples import Drawn, compose, draw
from scale_sae_jax.config import SyntheticConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.codes import Codes

CHUNK = 1024  # samples drawn in one call
MEAN_SAMPLES = 16_384
MAX_SAMPLES = 2**31  # so that ids are 32-bit words


@dataclass(frozen=True, eq=False)
class SyntheticActivations:
    """Samples first_id ... first_id + n - 1 of a world; reads as `ActivationArray` does.

    mean [D] and median_norm are estimated on training samples, in the held-out part too. A
    row is the same, bit for bit, whatever it is read with.
    """

    world: World
    layout: Layout
    first_id: int
    n: int
    mean: Float32[np.ndarray, " D"]
    median_norm: float

    @property
    def features(self) -> Float32[Array, "F D"]:
        """The true directions, unit rows."""
        return self.world.directions

    @property
    def d(self) -> int:
        return self.features.shape[1]

    def rows(self, ids: Int64[np.ndarray, " T"]) -> Float32[np.ndarray, "T D"]:
        """The samples with these ids, in 0 ... n - 1."""
        return np.concatenate(self._read(ids, lambda drawn: compose(self.world, drawn.codes)))

    def codes(self, ids: Int64[np.ndarray, " T"]) -> Codes:
        """Their true codes: magnitudes [T, S] and feature ids [T, S], both 0 in an unused slot."""
        parts = self._read(ids, lambda drawn: drawn.codes)
        return Codes(*(jnp.asarray(np.concatenate(part)) for part in zip(*parts, strict=True)))

    def dropped(self, ids: Int64[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """How many roots and free features these samples lack for want of a slot."""
        return np.concatenate(self._read(ids, lambda drawn: drawn.dropped))

    def _read(self, ids: np.ndarray, part: Callable[[Drawn], Any]) -> list[Any]:
        """`part` of the samples, as NumPy, by chunks of one size, so that it compiles once."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n:
            raise IndexError(f"sample ids must lie in 0 ... {self.n - 1}")
        chunks = []
        for start in range(0, max(len(ids), 1), CHUNK):
            chunk = (ids[start : start + CHUNK] + self.first_id).astype(np.uint32)
            padded = np.pad(chunk, (0, CHUNK - len(chunk)))
            chunks.append((part(draw(self.world, padded, self.layout)), len(chunk)))
        return [jax.tree.map(lambda p, n=n: np.asarray(p)[:n], drawn) for drawn, n in chunks]


def open_synthetic(config: SyntheticConfig) -> tuple[SyntheticActivations, SyntheticActivations]:
    """Training and held-out samples of the same features.

    Raises UserError for settings that contradict each other.
    """
    check_synthetic(config)
    shared = {
        "world": make_world(config),
        "layout": make_layout(config),
    }
    blank = {"mean": np.zeros(config.d, np.float32), "median_norm": 0.0}
    training = SyntheticActivations(first_id=0, n=config.samples, **shared, **blank)
    sample = training.rows(np.arange(min(config.samples, MEAN_SAMPLES)))
    shared |= {
        "mean": sample.mean(axis=0, dtype=np.float64).astype(np.float32),
        "median_norm": float(np.median(np.linalg.norm(sample, axis=1))),
    }
    return (
        SyntheticActivations(first_id=0, n=config.samples, **shared),
        SyntheticActivations(first_id=config.samples, n=config.heldout, **shared),
    )


def check_synthetic(config: SyntheticConfig) -> None:
    """Raises UserError for settings that contradict each other."""
    forest = levels(config)[-2]
    at_least_1 = ("d", "samples", "heldout", "roots", "branching", "factors")
    not_negative = ("seed", "depth", "correlation", "std_spread", "bias")
    rules = [(getattr(config, name) > 0, f"{name} must be at least 1") for name in at_least_1]
    rules += [(getattr(config, name) >= 0, f"{name} must not be negative") for name in not_negative]
    rules += [
        (
            config.features >= max(forest, 2),
            f"features = {config.features} must be at least 2 and hold the {forest} of the trees: "
            "raise it, or lower roots, branching or depth",
        ),
        (
            config.samples + config.heldout <= MAX_SAMPLES,
            f"samples and heldout must not exceed {MAX_SAMPLES} together",
        ),
        (
            0 < config.min_rate <= config.max_rate < 1 and config.exponent > 0,
            "rates must obey 0 < min_rate <= max_rate < 1, and exponent must be positive",
        ),
        (
            min(config.first_mean, config.last_mean) > 0,
            "first_mean and last_mean must be positive",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(f"config.synthetic.{message}")
