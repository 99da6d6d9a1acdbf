"""Sparse decoding: a sum of K decoder rows a token, never a dense [T, M] code.

Tokens go through in chunks, so that at most about `CHUNK_ELEMENTS` gathered numbers are alive. The
backward pass scatters each chunk's outer products into one [M, D] buffer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_ELEMENTS = 1 << 20


@jax.custom_vjp
def decode_rows(
    values: Float[Array, "T K"], ids: Int[Array, "T K"], rows: Float[Array, "M D"]
) -> Float[Array, "T D"]:
    """sum_k values[t, k] * rows[ids[t, k]]."""
    tokens = values.shape[0]
    chunks = (_chunked(values, rows.shape[1]), _chunked(ids, rows.shape[1]))
    decoded = jax.lax.map(lambda chunk: jnp.einsum("tk,tkd->td", chunk[0], rows[chunk[1]]), chunks)
    return decoded.reshape(-1, rows.shape[1])[:tokens]


def _forward(values, ids, rows):
    return decode_rows(values, ids, rows), (values, ids, rows)


def _backward(saved, grad):
    values, ids, rows = saved
    tokens, slots = values.shape
    width = rows.shape[1]
    chunk_grads = _chunked(grad, width, slots)

    def step(d_rows, chunk):
        v, i, g = chunk  # [C, K], [C, K], [C, D]
        d_values = jnp.einsum("td,tkd->tk", g, rows[i])
        return d_rows.at[i].add(v[..., None] * g[:, None, :]), d_values

    chunks = (_chunked(values, width), _chunked(ids, width), chunk_grads)
    d_rows, d_values = jax.lax.scan(step, jnp.zeros_like(rows), chunks)
    return d_values.reshape(-1, slots)[:tokens], None, d_rows


decode_rows.defvjp(_forward, _backward)


def _chunked(array: Array, width: int, slots: int | None = None) -> Array:
    """[T, ...] as [chunks, C, ...], padded with zeros (a zero value decodes to nothing)."""
    tokens = array.shape[0]
    size = max(1, min(tokens, CHUNK_ELEMENTS // (width * (slots or array.shape[1]))))
    padding = [(0, -tokens % size)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(-1, size, *array.shape[1:])
