"""Looking up by id, with a gradient that is added up by a kernel, in the same order each time.

On GPUs a gradient that XLA scatters is added up in any order, and differs from run to run.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scale_sae_jax.sae.decoding import scatter_rows
from scale_sae_jax.sae.kernels import Kernel


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table: Float[Array, "L ..."], ids: Int[Array, "T K"], kernel: Kernel
) -> Float[Array, "T K ..."]:
    """table[ids]; ids beyond the last give the last, and leave no gradient."""
    return table.at[ids].get(mode="clip")


def _forward(table, ids, kernel):
    return lookup(table, ids, kernel), (table, ids)


def _backward(kernel, saved, grad):
    table, ids = saved
    each, rows = ids.reshape(-1, 1), table.reshape(table.shape[0], -1)
    grads, last = grad.reshape(each.shape[0], -1), table.shape[0] - 1
    inside = (each <= last).astype(grads.dtype)
    d_rows = scatter_rows(inside, jnp.minimum(each, last), grads, rows, kernel)
    return d_rows.reshape(table.shape), None


lookup.defvjp(_forward, _backward)
