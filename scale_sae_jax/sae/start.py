"""Starting values: encoder, decoder, and the biases from the first batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def uniform_encoder(key: Array, experts: int, width: int, size: int) -> Float[Array, "N D M"]:
    """Uniform in +-1/sqrt(D)."""
    bound = width**-0.5
    return jax.random.uniform(key, (experts, width, size), minval=-bound, maxval=bound)


def normalise(w_dec: Float[Array, "... M D"], norm: str) -> Float[Array, "... M D"]:
    """Unit norm a latent ('latent') or a coordinate inside an expert ('coordinate'), or as is.

    Norms first, then the quotient: as one computation, XLA for CPUs would not write it in place.
    """
    axis = {"latent": -1, "coordinate": -2, "none": None}[norm]
    if axis is None:
        return w_dec
    norms = jax.lax.optimization_barrier(jnp.linalg.norm(w_dec, axis=axis, keepdims=True))
    return w_dec / jnp.maximum(norms, 1e-12)


def coordinate_scale(centred: Float[Array, "T D"]) -> Float[Array, ""]:
    """Root mean square coordinate of activations without their centre."""
    return jnp.sqrt(jnp.square(centred).mean())


def geometric_median(x: Float[Array, "T D"], iterations: int = 50) -> Float[Array, " D"]:
    """The point with the least summed distance to all x, by Weiszfeld's iteration from the mean."""

    def closer(_, point):
        weight = 1 / jnp.maximum(jnp.linalg.norm(x - point, axis=-1), 1e-6)
        return (weight @ x) / weight.sum()

    return jax.lax.fori_loop(0, iterations, closer, x.mean(0))
