"""Matrix products of tokens with the experts they selected."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def selected_products(
    x: Float[Array, "T D"], w_enc: Float[Array, "N D M"], experts: Int[Array, "T E"]
) -> Float[Array, "T E M"]:
    """x W_i for each selected expert i.

    This form computes all N experts and keeps E of them: obviously right, and as dear as a dense
    encoder of the full width.
    """
    everything = jnp.einsum("td,ndm->tnm", x, w_enc)  # [T, N, M]
    return jnp.take_along_axis(everything, experts[..., None], axis=1)
