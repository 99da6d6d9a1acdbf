"""The product of each (token, expert) pair's row with its expert's matrix, and its gradients.

Work and memory grow with the P = T * E pairs, not with the number of experts.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

from scale_sae_jax.sae.gathered import wide
from scale_sae_jax.sae.groups import Groups
from scale_sae_jax.sae.joined import joined
from scale_sae_jax.sae.kernels import Kernel
from scale_sae_jax.sae.tiles import Rows

NO_ID = -(2**30)  # below 0 also as `joined` has shifted it


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_dot(
    x: Float[Array, "T A"],
    w: Float[Array, "N A B"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T E B"]:
    """x_t W_i for every selected expert i of token t; 0 for an expert on another device.

    Args:
      dtype: operands are rounded to it; sums and results are float32.

    The loops of a gradient that nobody asks for are compiled away.
    """
    return _dot(x, w, groups, kernel, dtype, transposed=False)


def _forward(x, w, groups, kernel, dtype):
    return grouped_dot(x, w, groups, kernel, dtype), (x, w, groups)


def _backward(kernel, dtype, saved, grad):
    """Of `grouped_dot`, and of `grouped_sum`, where grad has a row a token and x one an expert."""
    x, w, groups = saved
    d_x = _dot(grad, w, groups, kernel, dtype, transposed=True)
    d_x = d_x.sum(1) if x.ndim == 2 else d_x
    d_w = grouped_outer(x, grad, groups, kernel, dtype)
    return d_x.astype(x.dtype), d_w.astype(w.dtype), None


grouped_dot.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_sum(
    x: Float[Array, "T E A"],
    w: Float[Array, "N A B"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T B"]:
    """sum_i x_ti W_i over the selected experts i of token t; arguments as for `grouped_dot`."""
    return _dot(x, w, groups, kernel, dtype, transposed=False).sum(1)


def _forward_sum(x, w, groups, kernel, dtype):
    return grouped_sum(x, w, groups, kernel, dtype), (x, w, groups)


grouped_sum.defvjp(_forward_sum, _backward)


def grouped_outer(
    x: Float[Array, "T ... A"],
    y: Float[Array, "T ... B"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "N A B"]:
    """sum of x_t^T y_t over the tokens t of each expert; arguments as for `grouped_dot`."""

    def outer(x, y, groups):
        rows = _rows(x, groups, dtype), _rows(y, groups, dtype)
        return kernel.outer(*rows, groups, kernel.shards)

    return _over_calls(outer, kernel)(x, y, groups)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def grouped_dot_at(
    x: Float[Array, "T A"],
    w: Float[Array, "N A B"],
    products: Float[Array, "T E B"],
    places: Int[Array, "T K"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "T K"], Float[Array, "T E"]]:
    """Some of `products` = grouped_dot(x, w, ...), a constant, and their mean in each expert.

    The gradient is that of these alone: no dense array waits for it. Where `Kernel` says that K
    columns a token are added up sooner than all of them, none is made for w at all.

    Args:
      places: in E * B, of the products asked for; 0 is given at E * B and above.
    """
    flat = products.reshape(x.shape[0], -1)
    values = jnp.take_along_axis(flat, places, axis=-1, mode="fill", fill_value=0)
    return values, products.mean(-1)


def _forward_at(x, w, products, places, groups, kernel, dtype):
    results = grouped_dot_at(x, w, products, places, groups, kernel, dtype)
    return results, (x, w, places, groups)


def _backward_at(kernel, dtype, saved, grads):
    x, w, places, groups = saved
    at_places, means = grads
    size = w.shape[2]
    width = means.shape[1] * size
    dense = spread(at_places, places, width).reshape(*means.shape, size)
    d_x, d_w, _ = _backward(kernel, dtype, (x, w, groups), dense + means[..., None] / size)
    if kernel.scatter_columns and width > kernel.scattered_row * places.shape[1]:
        d_w = _outer_at(at_places, places, means / size, x, size, groups, kernel, dtype)
    return d_x, d_w.astype(w.dtype), None, None, None


grouped_dot_at.defvjp(_forward_at, _backward_at)


def _outer_at(
    values: Float[Array, "T K"],
    places: Int[Array, "T K"],
    everywhere: Float[Array, "T E"],
    x: Float[Array, "T A"],
    size: int,
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike,
) -> Float[Array, "N A B"]:
    """`grouped_outer` of x and of `values` at their places plus `everywhere` at all places."""
    tokens, active = everywhere.shape
    experts = groups.experts.at[groups.rows].get(mode="fill", fill_value=NO_ID)
    experts = experts.reshape(tokens, active)
    of_place = jnp.take_along_axis(experts, places // size, axis=1, mode="fill", fill_value=NO_ID)
    ids = jnp.where(of_place == NO_ID, NO_ID, of_place * size + places % size)

    def outer(values, ids, everywhere, experts, x, sizes):
        start = kernel.scatter(everywhere, experts, x, sizes.size)
        return kernel.scatter_columns(start, values, ids, x, size)

    n_experts = groups.sizes.size
    shifts = lambda *_: (0, n_experts * size, 0, n_experts, 0, 0)  # noqa: E731
    values, everywhere, x = (wide(a.astype(dtype)) for a in (values, everywhere, x))
    return joined(outer, shifts)(values, ids, everywhere, experts, x, groups.sizes)


def spread(
    values: Float[Array, "T K"], places: Int[Array, "T K"], width: int
) -> Float[Array, "T W"]:
    """Rows of zeros with each value added at its place; one at `width` or above is dropped.

    The zeros hang on the values: equal zeros XLA would make once, keep, and copy for every call.
    """
    first = values[0, 0]
    zero = (jnp.isnan(first) & jnp.isinf(first)).astype(values.dtype)  # which is never so
    zeros = jnp.broadcast_to(zero, (values.shape[0], width))
    return zeros.at[jnp.arange(values.shape[0])[:, None], places].add(values)


def _dot(
    x: Array, w: Array, groups: Groups, kernel: Kernel, dtype: DTypeLike, transposed: bool
) -> Float[Array, "T E B"]:
    def dot(x, w, groups):
        rows = _rows(x, groups, dtype)
        products = kernel.dot(rows, w.astype(dtype), groups, transposed, kernel.shards)
        return _by_token(products, x, groups, kernel)

    return _over_calls(dot, kernel)(x, w, groups)


def _over_calls(function: Callable[..., Array], kernel: Kernel) -> Callable[..., Array]:
    """The function of two arrays and their groups, as one call under `jax.vmap`."""
    if kernel.plain or kernel.shards > 1:  # pairs elsewhere would come between those of the calls
        return function
    return joined(function, lambda left, right, groups: (0, 0, groups.shifts))


def _rows(x: Array, groups: Groups, dtype: DTypeLike) -> Rows:
    x = x.astype(dtype)
    if x.ndim == 3:
        return Rows(x.reshape(-1, x.shape[-1]), groups.pairs)
    return Rows(x, groups.pairs // groups.active(x.shape[0]))


def _by_token(rows: Array, x: Array, groups: Groups, kernel: Kernel) -> Array:
    elsewhere = {"mode": "fill", "fill_value": 0} if kernel.shards > 1 else {"mode": "clip"}
    by_pair = rows.at[groups.rows].get(**elsewhere)
    return by_pair.reshape(x.shape[0], -1, rows.shape[-1])
