"""Which latents survive: the global top-k over all latents of a token's selected experts.

All three scopes take a_[T, E, m] >= 0 and return `Codes`. A latent that is 0 never counts as
active, never more than k survive, and a tie goes to the lower global id. The gradient reaches the
winners only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.sae.codes import Codes


def latent_ids(experts: Int[Array, "T E"], size: int) -> Int[Array, "T W"]:
    """Global ids of all W = E * size latents of the selected experts, in their order."""
    ids = experts[..., None] * size + jnp.arange(size, dtype=experts.dtype)
    return ids.reshape(experts.shape[0], -1)


def per_token(acts: Float[Array, "T E M"], experts: Int[Array, "T E"], k: int) -> Codes:
    """The k largest latents over all selected experts of each token (Scale SAE, global top-k)."""
    size = acts.shape[-1]
    values, slots = jax.lax.top_k(acts.reshape(acts.shape[0], -1), k)
    expert, latent = slots // size, slots % size
    return Codes(values, jnp.take_along_axis(experts, expert, axis=-1) * size + latent)


def per_expert(acts: Float[Array, "T E M"], experts: Int[Array, "T E"], k: int) -> Codes:
    """k / E latents in each selected expert: the control without competition between experts."""
    tokens, active, size = acts.shape
    values, latents = jax.lax.top_k(acts, k // active)
    ids = experts[..., None] * size + latents
    return Codes(values.reshape(tokens, k), ids.reshape(tokens, k))


def per_batch(acts: Float[Array, "T E M"], experts: Int[Array, "T E"], k: int) -> Codes:
    """The k * T largest latents of the batch (BatchTopK, arXiv 2412.06410); K = E * m slots."""
    tokens, _, size = acts.shape
    flat = acts.reshape(-1)
    _, winners = jax.lax.top_k(jax.lax.stop_gradient(flat), k * tokens)
    kept = jnp.zeros(flat.shape, bool).at[winners].set(True)
    values = jnp.where(kept, flat, 0).reshape(tokens, -1)
    return Codes(values, latent_ids(experts, size))


def over_threshold(
    acts: Float[Array, "T E M"], experts: Int[Array, "T E"], threshold: Float[Array, ""]
) -> Codes:
    """Every latent above `threshold`: BatchTopK at inference, where each token stands alone."""
    values = jnp.where(acts > threshold, acts, 0).reshape(acts.shape[0], -1)
    return Codes(values, latent_ids(experts, acts.shape[-1]))


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
