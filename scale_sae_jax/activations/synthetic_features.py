"""The features of synthetic activations: directions, firing rates, trees; see `synthetic.py`.

A sample has slots for a fixed number of roots, of free features and of features in all, so many
Poisson deviations over the mean; `synthetic_samples.py` leaves out what is beyond.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import ndtri

from scale_sae_jax.config import SyntheticConfig

# Free features spread most: they are rare, and all the likelier when the factors are large.
ROOT_DEVIATIONS, FREE_DEVIATIONS, ALL_DEVIATIONS = 8, 24, 12


class Layout(NamedTuple):
    """What the shapes of a sample depend on.

    starts: see `levels`.
    """

    starts: tuple[int, ...]
    branching: int
    root_slots: int
    free_slots: int
    slots: int


class World(NamedTuple):
    """The features, and the `seeds` [2] of the samples.

    directions [F, D]: unit rows. bias [D]. weights [F, factors]: on the factors of the copula.
    scalars [F, 4]: cut, standard deviation of the noise, mean and standard deviation of the
    magnitude.
    """

    seeds: Array
    directions: Array
    bias: Array
    weights: Array
    scalars: Array


def levels(config: SyntheticConfig) -> tuple[int, ...]:
    """The first feature of each level of the trees, then the first free one, then F."""
    sizes = [config.roots * config.branching**level for level in range(config.depth + 1)]
    return (*(int(start) for start in np.cumsum([0, *sizes])), config.features)


def firing_rates(config: SyntheticConfig) -> Float[np.ndarray, " F"]:
    """Nominal firing rates: rank^-exponent, mapped linearly onto min_rate ... max_rate."""
    falling = np.arange(1, config.features + 1.0) ** -config.exponent
    share = (falling - falling[-1]) / (falling[0] - falling[-1])
    return config.min_rate + (config.max_rate - config.min_rate) * share


def candidate_rates(config: SyntheticConfig) -> Float[np.ndarray, " F"]:
    """P(candidate), by step 2 of `synthetic.py`."""
    nominal, starts = firing_rates(config), levels(config)
    rates = nominal.copy()
    for start, stop, end in zip(starts, starts[1:-1], starts[2:-1], strict=False):
        parent = nominal[start:stop, None]
        child = nominal[stop:end].reshape(-1, config.branching)
        others = child.sum(axis=1, keepdims=True) - child
        rates[stop:end] = (child / parent * (1 + others / parent)).ravel()
    return np.minimum(rates, 1.0)


def make_layout(config: SyntheticConfig) -> Layout:
    rates, starts = firing_rates(config), levels(config)

    def slots(mean: float, deviations: int) -> int:
        return int(np.ceil(mean + deviations * np.sqrt(mean)))

    roots, free = rates[: starts[1]].sum(), rates[starts[-2] :].sum()
    root_slots = min(slots(roots, ROOT_DEVIATIONS), starts[1])
    free_slots = min(slots(free, FREE_DEVIATIONS), starts[-1] - starts[-2])
    most = root_slots * (config.depth + 1) + free_slots
    every = slots(roots * (config.depth + 1) + free, ALL_DEVIATIONS)
    return Layout(starts, config.branching, root_slots, free_slots, min(every, most))


def make_world(config: SyntheticConfig) -> World:
    """The features of these settings."""
    rng, count = np.random.default_rng(config.seed), config.features
    directions = tight_frame(rng.standard_normal((count, config.d), np.float32))
    bias = rng.standard_normal(config.d)
    weights = config.correlation * rng.standard_normal((count, config.factors))
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    weights *= np.minimum(1, np.sqrt(0.99) / np.maximum(norms, 1e-9))  # noise keeps 1 % at least
    scalars = [
        -ndtri(candidate_rates(config)),
        np.sqrt(1 - np.sum(weights**2, axis=1)),
        np.linspace(config.first_mean, config.last_mean, count),
        np.abs(config.std_mean + config.std_spread * rng.standard_normal(count)),
    ]
    return World(
        seeds=jnp.asarray(rng.integers(2**32, size=2, dtype=np.uint32)),
        directions=directions,
        bias=jnp.asarray(config.bias / np.linalg.norm(bias) * bias, jnp.float32),
        weights=jnp.asarray(weights, jnp.float32),
        scalars=jnp.asarray(np.column_stack(scalars), jnp.float32),
    )


@partial(jax.jit, static_argnames="steps")
def tight_frame(rows: Float[Array | np.ndarray, "F D"], steps: int = 16) -> Float[Array, "F D"]:
    """Unit rows near the given ones whose squared cosines have the least sum that is possible.

    They have it when all singular values are equal (those that F < D leaves at 0 aside). A step is
    a damped Newton-Schulz iteration towards that, and makes the rows units again.
    """
    count, width = rows.shape

    def unit(r: Array) -> Array:
        return r / jnp.linalg.norm(r, axis=1, keepdims=True)

    def step(_: Array, r: Array) -> Array:
        return unit(1.25 * r - 0.25 / max(count / width, 1) * (r @ (r.T @ r)))

    with jax.default_matmul_precision("float32"):
        return jax.lax.fori_loop(0, steps, step, unit(jnp.asarray(rows)))
