"""What a batch's loss consists of, and the terms that any architecture can have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scale_sae_jax.sae.start import normalise


class Loss(NamedTuple):
    """What one batch yields: the loss, and what the training step keeps count of.

    total: what is differentiated. mse: mean_t |x - x_hat|^2. terms: the other terms by name, before
    their weights. firing: tokens that each latent fired for. expert_load: share of the routing.
    tracked: new values of the parameters that follow the batches instead of a gradient, such as
    the inference threshold of BatchTopK.
    """

    total: Float[Array, ""]
    mse: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]
    firing: Int[Array, " L"]
    expert_load: Float[Array, " N"]
    tracked: dict[str, Float[Array, "..."]]


def mean_square(residual: Float[Array, "T D"]) -> Float[Array, ""]:
    """mean_t |x - x_hat|^2 of the residual x - x_hat, the `mse` of every report."""
    return jnp.square(residual).sum(-1).mean()


def variance(x: Float[Array, "T D"]) -> Float[Array, ""]:
    """mean_t |x - mean x|^2, a constant: the unit in which penalties are weighted."""
    return jax.lax.stop_gradient(mean_square(x - x.mean(0)))


def orthogonality(w_dec: Float[Array, "L D"], key: Array, chunk: int) -> Float[Array, ""]:
    """Mean over latents of the squared largest cosine with another latent of the same chunk.

    Latents are dealt anew into random chunks of `chunk`, so the cost is linear in their number
    (OrtSAE, arXiv 2509.22033, section 3). Where `chunk` does not divide L, the last ones of the
    random order wait for another batch. 0 for a dictionary of one latent.
    """
    size = min(chunk, w_dec.shape[0])
    if size < 2:
        return jnp.zeros(())
    chunks = w_dec.shape[0] // size
    order = jax.random.permutation(key, w_dec.shape[0])[: chunks * size]
    dealt = normalise(w_dec[order], "latent").reshape(chunks, size, -1)

    def nearest(chunk: Float[Array, "C D"]) -> Int[Array, " C"]:
        cosines = chunk @ chunk.T
        return jnp.where(jnp.eye(size, dtype=bool), -jnp.inf, cosines).argmax(-1)

    # The gradient goes through the largest cosine alone, which is a product of two rows.
    partner = jax.lax.map(nearest, jax.lax.stop_gradient(dealt))  # [chunks, C]
    others = jnp.take_along_axis(dealt, partner[..., None], axis=1)
    return jnp.square((dealt * others).sum(-1)).mean()
