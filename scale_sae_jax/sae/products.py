"""Products of activations with all rows of a dictionary, and the gradient of only a few of them."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

from scale_sae_jax.sae.decoding import decode_rows, scatter_rows
from scale_sae_jax.sae.grouped import spread
from scale_sae_jax.sae.kernels import Kernel


def rounded_dot(
    x: Float[Array, "T A"], w: Float[Array, "B A"], dtype: DTypeLike
) -> Float[Array, "T B"]:
    """x w^T with operands rounded to `dtype`, summed in float32."""
    x, w = x.astype(dtype), w.astype(dtype)
    return jnp.einsum("ta,ba->tb", x, w, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def products_at(
    x: Float[Array, "T D"],
    w: Float[Array, "L D"],
    products: Float[Array, "T L"],
    ids: Int[Array, "T K"],
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T K"]:
    """x_t . w_i for the latents i = ids[t], read from `products` = x w^T, which is a constant.

    The gradient is that of K products a token: it gathers and scatters K rows where that is
    cheaper than multiplying by all L.
    """
    return jnp.take_along_axis(products, ids, axis=-1)


def _forward(x, w, products, ids, kernel, dtype):
    return products_at(x, w, products, ids, kernel, dtype), (x, w, products.shape, ids)


def _backward(kernel, dtype, saved, grad):
    x, w, shape, ids = saved
    if shape[1] > kernel.scattered_row * ids.shape[1]:
        d_w = scatter_rows(grad, ids, x, w, kernel)
    else:
        d_w = rounded_dot(spread(grad, ids, shape[1]).T, x.T, dtype).astype(w.dtype)
    return decode_rows(grad, ids, w, kernel, dtype), d_w, None, None


products_at.defvjp(_forward, _backward)
