"""Sums over the rows of a decoder that tokens use, rows[ids], K of them a token, which no array
should hold.

    weighted_sum   start_t + sum_k values[t, k] * rows[ids[t, k]]     decoding
    row_dots       x_t . rows[ids[t, k]]                              the gradient of the values
    scatter        sum_tk values[t, k] * grad_t at row ids[t, k]      the gradient of the rows

with float32 sums whatever the dtype of the operands. XLA makes a gather part of the loop that uses
it, so that rows are read where they lie, if the sum is written as the platform's fusion has it:

by_slots, by_lanes   as many gathers as the sum has terms, each used once. For CPUs, which fuse a
                     gather into one elementwise loop, and into no reduction.
of_whole             one gather, and sums of it, which XLA for GPUs makes one kernel; it is for GPUs
                     without `triton.py`. TPUs store the rows, so there tokens go through in chunks.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SLOTS = 16  # that one loop of a weighted sum adds; with many more it is slower
TERMS = 48  # that one loop of a dot product adds, likewise
LANES = 16  # columns of such a term: what a CPU adds at once


def weighted_sum(
    products: Callable[[Array, Array, Array], list[Float[Array, "T D"]]],
    start: Float[Array, "T D"],
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    rows: Float[Array, "L D"],
) -> Float[Array, "T D"]:
    """start + the sum of products(values, ids, rows), SLOTS slots at once, in two loops at least.

    The result of a loop is stored. A sum of one alone XLA would put into each of the loops that use
    it, and store the rows for them.
    """
    tokens, slots = ids.shape
    parts = max(2, -(-slots // SLOTS))
    size = -(-slots // parts)

    def add(total, part):
        return functools.reduce(operator.add, products(*part, rows), total), None

    def cut(array, fill):  # [T, K] as [parts, T, size]
        padded = jnp.pad(array, ((0, 0), (0, parts * size - slots)), fill)
        return padded.reshape(tokens, parts, size).swapaxes(0, 1)

    # Slots of no value at the end are of a row in use: 0 times the NaN of another were a NaN.
    return jax.lax.scan(add, start, (cut(values, "constant"), cut(ids, "edge")))[0]


def products_by_slots(values: Array, ids: Array, rows: Array) -> list[Float[Array, "T D"]]:
    """values[:, k] * rows[ids[:, k]] of every slot k."""
    return [wide(values[:, k, None]) * _take(rows, ids[:, k]) for k in range(ids.shape[1])]


def products_of_whole(values: Array, ids: Array, rows: Array) -> list[Float[Array, "T D"]]:
    products = wide(values[..., None]) * _take(rows, ids)
    return [products[:, k] for k in range(ids.shape[1])]


def row_dots_by_lanes(
    x: Float[Array, "T D"], ids: Int[Array, "T K"], rows: Float[Array, "L D"]
) -> Float[Array, "T K"]:
    """In TERMS terms of LANES columns at most, or of a multiple of that."""
    width = x.shape[1]
    lanes = min(width, LANES * -(-width // (TERMS * LANES)))
    whole = width - width % lanes

    def dots(begins, size):
        columns = [slice(begin, begin + size) for begin in begins]
        terms = [wide(x[:, None, c]) * _take(rows[:, c], ids) for c in columns]
        total = functools.reduce(operator.add, terms)
        return total @ jnp.ones(size)  # a `sum` would be one reduction with the terms

    result = dots(range(0, whole, lanes), lanes)
    return result if whole == width else result + dots([whole], width - whole)


def row_dots_of_whole(
    x: Float[Array, "T D"], ids: Int[Array, "T K"], rows: Float[Array, "L D"]
) -> Float[Array, "T K"]:
    return (wide(x[:, None]) * _take(rows, ids)).sum(-1)


def scatter(
    numbers: int,
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    grad: Float[Array, "T D"],
    latents: int,
) -> Float[Array, "L D"]:
    """Sum over t and k with ids[t, k] = l of values[t, k] * grad[t]; other ids are left out.

    What is scattered is stored, so tokens go through in chunks of so many numbers: on CPUs small
    ones, which stay in a core's cache; elsewhere large ones, for each waits for the one before.
    """

    def step(rows, chunk):
        g, v, i = chunk  # [C, D], [C, K], [C, K]
        at = rows.at[i]
        return at.add(v[..., None] * g[:, None], mode="drop", wrap_negative_indices=False), None

    chunks = chunked(numbers, grad, grad, values, ids)
    return jax.lax.scan(step, jnp.zeros((latents, grad.shape[1]), jnp.float32), chunks)[0]


def in_chunks(function: Callable[..., Float[Array, "T _"]], numbers: int) -> Callable[..., Array]:
    """function(*arrays, ids, rows), on the tokens of one chunk after the other; see `chunked`."""

    def by_chunks(*arguments):
        *arrays, ids, rows = arguments
        chunks = chunked(numbers, rows, *arrays, ids)
        results = jax.lax.map(lambda chunk: function(*chunk, rows), chunks)
        return results.reshape(-1, results.shape[-1])[: ids.shape[0]]

    return by_chunks


def chunked(numbers: int, rows: Float[Array, "L D"], *arrays: Array) -> list[Array]:
    """Arrays [T, ...] as [chunks, C, ...], C tokens having at most `numbers` in their K rows.

    The last of the arrays is [T, K]. All are filled up with zeros; a zero value decodes to nothing.
    """
    tokens, slots = arrays[-1].shape
    most = max(1, numbers // (slots * rows.shape[1]))
    count = max(1, -(-tokens // most))
    size = -(-tokens // count)

    def cut(array):
        padded = jnp.pad(array, [(0, count * size - tokens)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(count, size, *array.shape[1:])

    return [cut(array) for array in arrays]


def _take(rows: Array, ids: Array) -> Array:
    return wide(rows.at[ids].get(mode="clip"))


def wide(operand: Array) -> Array:
    """In float32, where products of two in bfloat16 are exact."""
    return operand.astype(jnp.float32)
