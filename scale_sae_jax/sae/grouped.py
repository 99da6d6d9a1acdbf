"""The product of each row with its own expert's matrix, and its gradients.

Work and memory grow with the P = T * E rows, not with the number of experts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from scale_sae_jax.sae.groups import Groups
from scale_sae_jax.sae.kernels import Kernel


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_dot(
    rows: Float[Array, "P A"],
    w: Float[Array, "N A B"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "P B"]:
    """row_p W_i, i the expert of row p; operands rounded to `dtype`, sums and result float32.

    The loops of a gradient that nobody asks for are compiled away.
    """
    return kernel.dot(rows.astype(dtype), w.astype(dtype), groups, False)


def _forward(rows, w, groups, kernel, dtype):
    return grouped_dot(rows, w, groups, kernel, dtype), (rows, w, groups)


def _backward(kernel, dtype, saved, grad):
    rows, w, groups = saved
    grad = grad.astype(dtype)
    d_rows = kernel.dot(grad, w.astype(dtype), groups, True)
    d_w = kernel.outer(rows.astype(dtype), grad, groups)
    return d_rows.astype(rows.dtype), d_w.astype(w.dtype), None


grouped_dot.defvjp(_forward, _backward)
