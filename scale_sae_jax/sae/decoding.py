"""Decoding, the sum over a token's latents of value times decoder row, and its squared error.

There are two ways to each product. Gathering and scattering decoder rows costs work that grows with
K; multiplying the dense code of the selected experts costs work that grows with E * m, but it is
all matrix products. `Kernel` says how many dense rows are worth a gathered and a scattered one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

from scale_sae_jax.sae.codes import Codes
from scale_sae_jax.sae.grouped import grouped_outer, grouped_sum, spread
from scale_sae_jax.sae.groups import Groups
from scale_sae_jax.sae.joined import joined
from scale_sae_jax.sae.kernels import Kernel
from scale_sae_jax.sae.losses import mean_square
from scale_sae_jax.sae.shards import Shards


def decode(
    codes: Codes, rows: Float[Array, "L D"], kernel: Kernel, dtype: DTypeLike = jnp.float32
) -> Float[Array, "T D"]:
    """sum_k values[t, k] * rows[ids[t, k]], by gathered rows or the dense code by cost."""
    if rows.shape[0] > kernel.gathered_row * codes.ids.shape[1]:
        return decode_rows(*codes, rows, kernel, dtype)
    dense = spread(*codes, rows.shape[0])
    operands = dense.astype(dtype), rows.astype(dtype)
    return jnp.einsum("tl,ld->td", *operands, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def decode_rows(
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    rows: Float[Array, "L D"],
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T D"]:
    """sum_k values[t, k] * rows[ids[t, k]], with operands rounded to `dtype`, float32 sums."""

    def decode(values, ids, rows):
        zeros = jnp.zeros((values.shape[0], rows.shape[1]), jnp.float32)
        return kernel.weighted_sum(zeros, values.astype(dtype), ids, rows.astype(dtype))

    return joined(decode, lambda values, ids, rows: (0, rows.shape[0], 0))(values, ids, rows)


def _decode_forward(values, ids, rows, kernel, dtype):
    return decode_rows(values, ids, rows, kernel, dtype), (values, ids, rows)


def _decode_backward(kernel, dtype, saved, grad):
    values, ids, rows = saved

    def values_gradient(ids, grad, rows):
        return kernel.row_dots(grad.astype(dtype), ids, rows.astype(dtype))

    by_rows = joined(values_gradient, lambda ids, grad, rows: (rows.shape[0], 0, 0))
    return by_rows(ids, grad, rows), None, scatter_rows(values, ids, grad, rows, kernel)


decode_rows.defvjp(_decode_forward, _decode_backward)


def squared_error(
    target: Float[Array, "T D"],
    codes: Codes,
    places: Int[Array, "R K"] | None,
    w_dec: Float[Array, "N M D"],
    b_dec: Float[Array, " D"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
    shards: Shards = Shards(),
) -> tuple[Float[Array, ""], Float[Array, "T D"]]:
    """mean_t |target - b_dec - decoded|^2 of codes of the selected experts, and the residual.

    Args:
      codes: of the R tokens that this device's experts see (T without expert shards), ids of its
        own experts; `shards` adds what the other devices decode.
      places: of the codes in E * m, see `Slots`.

    The residual is a constant: no gradient flows through it.
    """
    tokens, slots = codes.values.shape
    width = groups.active(tokens) * w_dec.shape[1]
    if shards.expert == 1 and width > kernel.gathered_row * slots:
        return _error_by_rows(*codes, places, w_dec, b_dec, target, groups, kernel, dtype)
    dense = dense_codes(codes.values, places, w_dec.shape[1], groups)
    decoded = grouped_sum(dense, w_dec, groups, kernel, dtype)
    residual = target - b_dec - shards.sum_to_owner(decoded)
    return mean_square(residual), jax.lax.stop_gradient(residual)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _error_by_rows(values, ids, places, w_dec, b_dec, target, groups, kernel, dtype):
    residual = target - b_dec - decode_rows(values, ids, _flat(w_dec), kernel, dtype)
    return mean_square(residual), residual


def _error_forward(values, ids, places, w_dec, b_dec, target, groups, kernel, dtype):
    """Goes through the tokens in the order of their first experts: neighbours gather the same rows.

    Takes the gradient of the values along, while the tokens are in that order.
    """

    def in_order(values, ids, order, target, rows):
        minus = -values[order].astype(dtype)
        return kernel.sum_and_dots(target[order], minus, ids[order], rows.astype(dtype))

    tokens, rows = values.shape[0], _flat(w_dec)
    order = groups.rows.reshape(tokens, -1)[:, 0].argsort()
    shifts = lambda *_: (0, rows.shape[0], tokens, 0, 0)  # noqa: E731
    results = joined(in_order, shifts)(values, ids, order, target - b_dec, rows)
    back = order.argsort()
    residual, along = (result[back] for result in results)
    saved = values, ids, places, w_dec, groups, residual, along
    return (mean_square(residual), residual), saved


def _error_backward(kernel, dtype, saved, grads):
    values, ids, places, w_dec, groups, residual, along = saved
    tokens, slots = values.shape
    scale = -2 * grads[0] / tokens  # d(error) = scale * residual . d(decoded)
    size = w_dec.shape[1]
    if groups.active(tokens) * size > kernel.scattered_row * slots:
        d_rows = scatter_rows(scale * values, ids, residual, _flat(w_dec), kernel)
    else:
        dense = dense_codes(scale * values, places, size, groups)
        d_rows = grouped_outer(dense, residual, groups, kernel, dtype)
    d_w = d_rows.reshape(w_dec.shape).astype(w_dec.dtype)
    d_target = -scale * residual
    return scale * along, None, None, d_w, -d_target.sum(0), d_target, None


_error_by_rows.defvjp(_error_forward, _error_backward)


def dense_codes(
    values: Float[Array, "T K"], places: Int[Array, "T K"] | None, size: int, groups: Groups
) -> Float[Array, "T E M"]:
    """The codes over all `size` latents of each selected expert; `places` as in `Slots`."""
    tokens = values.shape[0]
    width = groups.active(tokens) * size
    dense = values if places is None else spread(values, places, width)
    return dense.reshape(tokens, -1, size)


def scatter_rows(
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    grad: Float[Array, "T D"],
    rows: Float[Array, "L D"],
    kernel: Kernel,
) -> Float[Array, "L D"]:
    """Gradient of `rows`: values[t, k] * grad[t], summed over the tokens and slots of each row."""

    def scatter(values, ids, grad, rows):
        return kernel.scatter(values, ids, grad, rows.shape[0]).astype(rows.dtype)

    shifts = lambda values, ids, grad, rows: (0, rows.shape[0], 0, 0)  # noqa: E731
    return joined(scatter, shifts)(values, ids, grad, rows)


def _flat(w_dec: Float[Array, "N M D"]) -> Float[Array, "L D"]:
    return w_dec.reshape(-1, w_dec.shape[-1])
