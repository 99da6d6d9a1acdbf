"""Which latents survive: the global top-k over all latents of a token's selected experts.

All three scopes take a_[T, E, m] >= 0 and return `Codes`. A latent that is 0 never counts as
active, never more than k survive, and a tie goes to the lower global id. The gradient reaches the
winners only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.sae.codes import Codes

GROUP = 32
NARROW = 128  # rows of fewer than so many values a winner are not worth two stages
THRESHOLD_DECAY = 0.9


def latent_ids(experts: Int[Array, "T E"], size: int) -> Int[Array, "T W"]:
    """Global ids of all W = E * size latents of the selected experts, in their order."""
    ids = experts[..., None] * size + jnp.arange(size, dtype=experts.dtype)
    return ids.reshape(experts.shape[0], -1)


def top_k(
    values: Float[Array, "T W"], k: int
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """The k largest of each row and their places; exactly `jax.lax.top_k`, faster on wide rows.

    The k winners lie in the k groups of neighbours with the largest maxima: any other group is
    beaten by k values, one from each of those. On a tie the lower group counts as larger, and
    groups go on in their order, so a tie between values goes to the lower place as well.
    """
    tokens, width = values.shape
    if width < NARROW * k or width % GROUP:
        return tuple(jax.lax.top_k(values, k))
    grouped = values.reshape(tokens, -1, GROUP)
    _, groups = jax.lax.top_k(grouped.max(-1), k)
    groups = jnp.sort(groups, axis=-1)  # [T, K]
    candidates = jnp.take_along_axis(grouped, groups[..., None], axis=1)
    winners, slots = jax.lax.top_k(candidates.reshape(tokens, -1), k)
    group = jnp.take_along_axis(groups, slots // GROUP, axis=-1)
    return winners, group * GROUP + slots % GROUP


def batch_winners(acts: Float[Array, "T W"], k: int) -> Bool[Array, "T W"]:
    """Marks the k * T largest values > 0 of the batch; a tie goes to the lower token, then place.

    Looks for them among the 4 k largest of each token. Only if all of those win in some token,
    which may have still more, the whole batch is searched.
    """
    acts = jax.lax.stop_gradient(acts)
    tokens, width = acts.shape
    slots = min(4 * k, width)

    def mark(places: Int[Array, " P"]) -> Bool[Array, "T W"]:
        return jnp.zeros(acts.size, bool).at[places].set(True).reshape(acts.shape)

    def among_all() -> Bool[Array, "T W"]:
        return mark(jax.lax.top_k(acts.reshape(-1), k * tokens)[1])

    if slots == width:
        return among_all() & (acts > 0)
    values, ids = top_k(acts, slots)
    _, winners = jax.lax.top_k(values.reshape(-1), k * tokens)
    all_of_a_token = ((winners % slots == slots - 1) & (values.reshape(-1)[winners] > 0)).any()
    places = (ids + width * jnp.arange(tokens)[:, None]).reshape(-1)[winners]
    return jax.lax.cond(all_of_a_token, among_all, lambda: mark(places)) & (acts > 0)


def follow_threshold(
    old: Float[Array, ""], values: Float[Array, "..."]
) -> Float[Array, ""]:
    """Running mean of the smallest survivor, from the first batch with one on."""
    new = jnp.min(jnp.where(values > 0, values, jnp.inf))
    mean = jnp.where(old == 0, new, THRESHOLD_DECAY * old + (1 - THRESHOLD_DECAY) * new)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(new), mean, old))


def per_token(acts: Float[Array, "T E M"], experts: Int[Array, "T E"], k: int) -> Codes:
    """The k largest latents over all selected experts of each token (Scale SAE, global top-k)."""
    size = acts.shape[-1]
    values, slots = top_k(acts.reshape(acts.shape[0], -1), k)
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
    flat = acts.reshape(acts.shape[0], -1)
    values = jnp.where(batch_winners(flat, k), flat, 0)
    return Codes(values, latent_ids(experts, acts.shape[-1]))


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
    values, slots = top_k(candidates, k)
    return Codes(values, jnp.take_along_axis(ids, slots, axis=-1))
