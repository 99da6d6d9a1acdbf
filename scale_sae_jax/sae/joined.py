"""Several autoencoders under `jax.vmap`, as one with more experts, more tokens and more rows.

Loops over tiles, sorts and gathers cost under `jax.vmap` far more than what they cost for each
autoencoder: a loop runs as long as the longest of them, and copies what it carries. Put end to end,
the tokens of C autoencoders with N experts each are those of one with C * N experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def joined(function: Callable[..., Any], shifts: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays, whose calls under `jax.vmap` become one on arrays end to end.

    Args:
      function: of pytrees of arrays, to such a pytree. It must work on rows: on arrays [X, ...] of
        several calls end to end it gives their results [Y, ...] end to end.
      shifts: called as the function, gives for each of its arrays what numbers in it grow by from
        one call to the next: 0, or the length of the axis that they are places in.
    """
    call = custom_vmap(function)

    @call.def_vmap
    def _(size: int, batched: list[Any], *args: Any) -> tuple[Any, Any]:
        whole = jax.tree.map(
            lambda a, b: a if b else jnp.broadcast_to(a, (size, *a.shape)), args, tuple(batched)
        )
        by = shifts(*jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), whole))
        results = joined(function, shifts)(*jax.tree.map(_end_to_end, whole, by))
        results = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _end_to_end(array: jax.Array, shift: int) -> jax.Array:
    """[C, X, ...] as [C * X, ...], the c-th part shifted by c * shift."""
    size = array.shape[0]
    if shift:
        by = (shift * jnp.arange(size, dtype=array.dtype)).reshape(-1, *[1] * (array.ndim - 1))
        array = array + by
    return array.reshape(-1, *array.shape[2:])
