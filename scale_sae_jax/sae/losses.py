"""Terms of the training loss, each a mean over tokens of sums over the D coordinates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.sae.codes import Codes
from scale_sae_jax.sae.selection import latent_ids


def squared_error(x: Float[Array, "T D"], x_hat: Float[Array, "T D"]) -> Float[Array, ""]:
    """mean_t |x - x_hat|^2, the `mse` of every report."""
    return jnp.square(x - x_hat).sum(-1).mean()


def dead_codes(
    acts: Float[Array, "T E M"], experts: Int[Array, "T E"], dead: Bool[Array, " L"], k: int
) -> Codes:
    """The k largest dead latents among the selected experts (AuxK, arXiv 2406.04093, appendix A.2).

    Latents of experts that a token does not use are not computed for it, so they cannot be revived
    by it. `dead` [N * M] marks latents by global id.
    """
    ids = latent_ids(experts, acts.shape[-1])
    candidates = jnp.where(dead[ids], acts.reshape(ids.shape), 0)
    values, slots = jax.lax.top_k(candidates, k)
    return Codes(values, jnp.take_along_axis(ids, slots, axis=-1))
