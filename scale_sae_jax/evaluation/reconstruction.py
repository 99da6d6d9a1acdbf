"""How close the reconstruction is to the activation: MSE, FVU, cosine, norm ratio, relative bias.

`token_terms` runs on the device and gives what each token adds to the sums;
`reconstruction_metrics` turns sums of any shape (total, per document, resampled) into metrics.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scale_sae_jax.evaluation.bootstrap import ratio


class ReconstructionTerms(NamedTuple):
    """Additive terms, arrays of one shape; `_all` counts every real token, the rest kept ones."""

    tokens: Array | np.ndarray
    squared_error: Array | np.ndarray  # ‖x − x̂‖²
    variance: Array | np.ndarray  # ‖x − μ‖²
    cosine: Array | np.ndarray  # cos(x, x̂)
    norm_ratio: Array | np.ndarray  # ‖x̂‖ / ‖x‖
    inner: Array | np.ndarray  # ⟨x, x̂⟩
    energy: Array | np.ndarray  # ‖x̂‖²
    tokens_all: Array | np.ndarray
    squared_error_all: Array | np.ndarray
    variance_all: Array | np.ndarray


def token_terms(
    x: Float[Array, "*T D"],
    reconstructed: Float[Array, "*T D"],
    mean: Float[Array, " D"],
    kept: Bool[Array, "*T"],
    real: Bool[Array, "*T"],
) -> ReconstructionTerms:
    """Per-token terms [*T], zero outside their mask.

    Args:
      x: activations.
      reconstructed: x̂ of the same shape.
      mean: mean activation of the training stream, the constant predictor that FVU compares with.
      kept: tokens that count in the main metrics.
      real: tokens that are not padding; they count in the `_all` metrics.

    Where x or x̂ is the zero vector, cosine and norm ratio count as 0.
    """
    squared_error = jnp.sum(jnp.square(x - reconstructed), axis=-1)
    variance = jnp.sum(jnp.square(x - mean), axis=-1)
    inner = jnp.sum(x * reconstructed, axis=-1)
    energy = jnp.sum(jnp.square(reconstructed), axis=-1)
    norm, norm_hat = jnp.linalg.norm(x, axis=-1), jnp.sqrt(energy)

    def over_norms(top: Array, bottom: Array) -> Array:
        return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), 0)

    def among(mask: Array, term: Array | float) -> Array:
        return jnp.where(mask, term, 0.0)

    return ReconstructionTerms(
        tokens=among(kept, 1.0),
        squared_error=among(kept, squared_error),
        variance=among(kept, variance),
        cosine=among(kept, over_norms(inner, norm * norm_hat)),
        norm_ratio=among(kept, over_norms(norm_hat, norm)),
        inner=among(kept, inner),
        energy=among(kept, energy),
        tokens_all=among(real, 1.0),
        squared_error_all=among(real, squared_error),
        variance_all=among(real, variance),
    )


def reconstruction_metrics(sums: ReconstructionTerms) -> dict[str, np.ndarray]:
    """Metrics by key, each of the shape of the sums; NaN where undefined.

    `relative_bias` is E‖x̂‖² / E⟨x, x̂⟩: below 1 if the reconstruction shrinks x (relative
    reconstruction bias of Gated SAEs, arXiv 2404.16014).
    """
    return {
        "mse": ratio(sums.squared_error, sums.tokens),
        "mse_all": ratio(sums.squared_error_all, sums.tokens_all),
        "fvu": ratio(sums.squared_error, sums.variance),
        "fvu_all": ratio(sums.squared_error_all, sums.variance_all),
        "cosine": ratio(sums.cosine, sums.tokens),
        "norm_ratio": ratio(sums.norm_ratio, sums.tokens),
        "relative_bias": ratio(sums.energy, sums.inner),
    }
