"""How alike decoder directions are: each live latent's largest cosine with another live latent,
inside its expert and across experts, next to what random directions would give.

The value for random directions is exact, not simulated. Given one direction, its cosines with c
independent uniform directions are independent, so its largest cosine has the distribution function
F(t)^c, with F the distribution function of one cosine: (1 + cos) / 2 ~ Beta((D−1)/2, (D−1)/2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import betainc, xlog1py

from scale_sae_jax.evaluation.bootstrap import ratio

THRESHOLDS = (0.7, 0.8, 0.9)


class MaxCosines(NamedTuple):
    """Largest cosine of each direction with another one; −inf where there is no other."""

    intra: np.ndarray  # [n] among directions of the same expert
    inter: np.ndarray  # [n] among directions of other experts


def max_cosines(
    directions: Float[Array | np.ndarray, "n D"],
    experts: Int[Array | np.ndarray, " n"],
    block: int = 2048,
) -> MaxCosines:
    """Largest cosines of n directions of any length, by blocks of the upper triangle.

    Directions stay on the host; a device sees two blocks of them at a time.

    Args:
      directions: decoder rows.
      experts: expert of each row, >= 0.
      block: rows a side of a block; the memory that a device needs is a few block² floats.
    """
    directions = np.asarray(directions, np.float32)
    n, width = directions.shape
    block = min(block, max(n, 1))
    rows = -(-n // block) * block  # the last block is filled up with rows of no expert
    norms = np.linalg.norm(directions, axis=-1, keepdims=True)
    unit, expert = np.zeros((rows, width), np.float32), np.full(rows, -1, np.int32)
    unit[:n] = directions / np.maximum(norms, np.finfo(np.float32).tiny)
    expert[:n] = experts
    best = MaxCosines(*np.full((2, rows), -np.inf, np.float32))
    blocks = [slice(start, start + block) for start in range(0, rows, block)]
    for place, i in enumerate(blocks):
        for j in blocks[place:]:
            sides = _largest(unit[i], unit[j], expert[i], expert[j], i == j)
            for here, found in zip((i, j), jax.device_get(sides), strict=True):
                for largest, new in zip(best, found, strict=True):
                    largest[here] = np.maximum(largest[here], new)
    return MaxCosines(*(largest[:n] for largest in best))


@jax.jit
def _largest(
    a: Float[Array, "B D"],
    b: Float[Array, "B D"],
    expert_a: Int[Array, " B"],
    expert_b: Int[Array, " B"],
    one_block: Bool[Array, ""],
) -> tuple[MaxCosines, MaxCosines]:
    """Of unit rows a with other rows b, and of b with a. Rows of expert −1 are none."""
    cosine = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    real = (expert_a[:, None] >= 0) & (expert_b >= 0)
    real &= ~(one_block & jnp.eye(len(a), dtype=bool))  # no row is another than itself
    same = expert_a[:, None] == expert_b
    masked = [jnp.where(real & scope, cosine, -jnp.inf) for scope in (same, ~same)]
    of_a, of_b = (MaxCosines(*(m.max(axis) for m in masked)) for axis in (1, 0))
    return of_a, of_b


def exceedance(
    threshold: Float[np.ndarray, "*shape"], others: Int[np.ndarray, "*shape"], width: int
) -> Float[np.ndarray, "*shape"]:
    """P(largest cosine of a random direction in R^width with `others` random ones > threshold)."""
    half = (width - 1) / 2
    one_exceeds = betainc(half, half, (1 - threshold) / 2)
    return -np.expm1(xlog1py(others, -one_exceeds))


def _summary(
    best: Float[np.ndarray, " n"], others: Int[np.ndarray, " n"], width: int, suffix: str
) -> dict[str, float]:
    """Shares over the thresholds and the mean of `best`, each with its value for random directions.

    Args:
      best: largest cosine of each live latent; if there are none, every value is NaN.
      others: how many latents it is the largest of; with none, a latent exceeds no threshold and
        does not enter the mean.
      width: model width D.
      suffix: ends every key, before `_null`.
    """
    sizes, latents = np.unique(others[others > 0], return_counts=True)
    found = best[others > 0].astype(np.float64)
    summary = {}
    for threshold in THRESHOLDS:
        random = exceedance(np.full(sizes.shape, threshold), sizes, width)
        key = f"redundancy_{threshold}{suffix}"
        summary[key] = float(ratio(np.sum(best > threshold), best.size))
        summary[f"{key}_null"] = float(ratio(random @ latents, best.size))
    grid = np.linspace(-1, 1, 4001)
    above = exceedance(*np.broadcast_arrays(grid, sizes[:, None]), width)  # [sizes, 4001]
    expected = np.trapezoid(above, grid, axis=-1) - 1  # E max = −1 + ∫ P(max > t) dt
    summary[f"max_cosine_mean{suffix}"] = float(ratio(found.sum(), found.size))
    summary[f"max_cosine_mean{suffix}_null"] = float(ratio(expected @ latents, found.size))
    return summary


def redundancy_metrics(
    decoder: Float[Array | np.ndarray, "L D"], live: Bool[np.ndarray, " L"], n_experts: int
) -> dict[str, float]:
    """Redundancy of the live rows of a decoder whose latent id is expert · (L / N) + latent.

    `redundancy_t` is the share of live latents whose largest cosine exceeds t. `_intra` looks only
    inside the latent's expert, `_inter` only at other experts. `_null` is the expectation for
    random directions with as many live latents in each expert. NaN where undefined: `_inter` of a
    single expert, everything without live latents.
    """
    n_latents, width = decoder.shape
    ids = np.flatnonzero(live)
    experts = ids // (n_latents // n_experts)  # [n]
    mates = np.bincount(experts, minlength=n_experts)[experts]  # [n] live latents of the expert
    intra, inter = max_cosines(np.asarray(decoder)[ids], experts)
    strangers = ids.size - mates
    inter_scope = slice(None) if n_experts > 1 else slice(0)
    return (
        _summary(np.maximum(intra, inter), np.full(ids.shape, ids.size - 1), width, "")
        | _summary(intra, mates - 1, width, "_intra")
        | _summary(inter[inter_scope], strangers[inter_scope], width, "_inter")
    )
