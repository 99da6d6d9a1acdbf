"""Counting which latents fire, and steering a penalty until the asked for number does."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scale_sae_jax.sae.codes import Codes


def count_slots(codes: Codes, latents: int) -> Int[Array, " L"]:
    """Tokens that each latent fires for, of sparse codes."""
    return jnp.zeros(latents, jnp.int32).at[codes.ids].add(codes.values != 0)


def count_dense(acts: Float[Array, "T L"]) -> Int[Array, " L"]:
    """Tokens that each latent fires for, of dense latents."""
    return (acts != 0).sum(0, dtype=jnp.int32)


def one_load() -> Float[Array, " N"]:
    """Expert load of an architecture without experts."""
    return jnp.ones(1)


def steer(
    penalty: Float[Array, ""],
    l0: Float[Array, ""],
    target: int | Int[Array, ""],
    rate: float,
) -> Float[Array, ""]:
    """The penalty for the next batch: larger while more than `target` latents a token fire.

    It moves by at most a factor exp(rate) a batch. Rate 0 keeps it as it is.
    """
    off = jnp.log(jnp.maximum(l0, 1e-3) / target)
    return penalty * jnp.exp(rate * jnp.clip(off, -1, 1))


def sparsity_weight(
    penalty: Float[Array, ""], l0: Float[Array, ""], target: int | Int[Array, ""]
) -> Float[Array, ""]:
    """penalty (l0 / target)^3, a constant: the weight of sparsity in this batch.

    `steer` alone would overshoot, for latents answer to a penalty only after many batches. The
    ratio is held within [1/4, 4].
    """
    return jax.lax.stop_gradient(penalty * jnp.clip(l0 / target, 0.25, 4.0) ** 3)
