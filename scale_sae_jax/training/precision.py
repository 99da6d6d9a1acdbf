"""Keeping parameters and moments in bfloat16 between steps, at half the memory.

A step computes in float32: `widen` what is kept, update, `narrow` the result. Narrowing rounds
stochastically, up or down with probabilities that make the expected value exact. Rounding to the
nearest would lose every update below 1/256 of a value, and that is nearly all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def widen(tree: Any) -> Any:
    """All floats of a pytree as float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if _is_float(a) else a, tree)


def narrow(tree: Any, like: Any, key: Array) -> Any:
    """`tree` in the dtypes of `like`, rounded stochastically where they are bfloat16."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    rounded = [
        stochastic_round(leaf, k) if kept.dtype == jnp.bfloat16 else leaf
        for leaf, kept, k in zip(leaves, jax.tree.leaves(like), keys, strict=True)
    ]
    return jax.tree.unflatten(structure, rounded)


def kept_as(tree: Any, dtype: str) -> Any:
    """A starting pytree with its matrices in `dtype`, rounded to the nearest."""
    return jax.tree.map(lambda a: a.astype(dtype) if _is_float(a) and a.ndim > 1 else a, tree)


def stochastic_round(x: Float[Array, "*S"], key: Array) -> Float[Array, "*S"]:
    """float32 to bfloat16, to one of the two neighbours, the expected value being x.

    The 16 bits that bfloat16 lacks are a fraction of its spacing; adding 16 random bits before they
    are cut off carries over with just that probability. Not finite stays as it is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), cut, bits), jnp.float32).astype(
        jnp.bfloat16
    )


def _is_float(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
