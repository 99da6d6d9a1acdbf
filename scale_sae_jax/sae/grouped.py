"""The product of each (token, expert) pair's row with its expert's matrix, and its gradients.

Work and memory grow with the P = T * E pairs, not with the number of experts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from scale_sae_jax.sae.groups import Groups
from scale_sae_jax.sae.kernels import Kernel, Rows


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_dot(
    x: Float[Array, "T ... A"],
    w: Float[Array, "N A B"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T E B"]:
    """x_t W_i for every selected expert i of token t; 0 for an expert on another device.

    Args:
      x: a row a token, [T, A], or a row a selected expert, [T, E, A].
      dtype: operands are rounded to it; sums and results are float32.

    The loops of a gradient that nobody asks for are compiled away.
    """
    rows = _rows(x, groups, dtype)
    return _by_token(kernel.dot(rows, w.astype(dtype), groups, False, kernel.shards), x, groups)


def _forward(x, w, groups, kernel, dtype):
    return grouped_dot(x, w, groups, kernel, dtype), (x, w, groups)


def _backward(kernel, dtype, saved, grad):
    x, w, groups = saved
    rows = _rows(grad, groups, dtype)
    d_rows = kernel.dot(rows, w.astype(dtype), groups, True, kernel.shards)
    d_x = _by_token(d_rows, x, groups)
    d_x = d_x.sum(1) if x.ndim == 2 else d_x
    d_w = grouped_outer(x, grad, groups, kernel, dtype)
    return d_x.astype(x.dtype), d_w.astype(w.dtype), None


grouped_dot.defvjp(_forward, _backward)


def grouped_outer(
    x: Float[Array, "T ... A"],
    y: Float[Array, "T ... B"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "N A B"]:
    """sum of x_t^T y_t over the tokens t of each expert; arguments as for `grouped_dot`."""
    return kernel.outer(_rows(x, groups, dtype), _rows(y, groups, dtype), groups, kernel.shards)


def _rows(x: Array, groups: Groups, dtype: DTypeLike) -> Rows:
    x = x.astype(dtype)
    if x.ndim == 3:
        return Rows(x.reshape(-1, x.shape[-1]), groups.pairs)
    return Rows(x, groups.pairs // (groups.pairs.size // x.shape[0]))


def _by_token(rows: Array, x: Array, groups: Groups) -> Array:
    by_pair = rows.at[groups.rows].get(mode="fill", fill_value=0)
    return by_pair.reshape(x.shape[0], -1, rows.shape[-1])
