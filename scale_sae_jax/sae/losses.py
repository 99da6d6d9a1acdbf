"""The reconstruction term of the training loss."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def mean_square(residual: Float[Array, "T D"]) -> Float[Array, ""]:
    """mean_t |x - x_hat|^2 of the residual x - x_hat, the `mse` of every report."""
    return jnp.square(residual).sum(-1).mean()
