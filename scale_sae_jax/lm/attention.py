"""Causal attention within segments, the same for every family.

Padding is segment 0 and attends to padding before it, itself at least: no row of the softmax is
empty, so padding gives no NaN and no special case.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def segment_positions(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of each token in its segment, from 0; a segment is a run of equal numbers."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def attention_mask(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where query s may see key t: t <= s, of the same segment."""
    causal = jnp.tri(segments.shape[1], dtype=bool)
    return causal & (segments[:, :, None] == segments[:, None, :])


def attend(
    q: Float[Array, "B S H C"],
    k: Float[Array, "B S G C"],
    v: Float[Array, "B S G C"],
    segments: Int[Array, "B S"],
) -> Float[Array, "B S H*C"]:
    """Attention of H query heads over G key and value heads, scaled by 1/sqrt(C).

    Query head h reads key head h // (H / G). The softmax is float32 for every dtype.
    """
    mask = attention_mask(segments)[:, None]  # [B, 1, S, S]
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return mixed.reshape(*mixed.shape[:2], -1)
