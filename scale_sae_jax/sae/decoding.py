"""Decoding, the sum over a token's latents of value times decoder row, in two ways.

`decode_rows` gathers the K rows of each token: work grows with K. Tokens go through in chunks, so
that at most about `CHUNK_ELEMENTS` gathered numbers are alive; the backward pass scatters each
chunk's outer products into one [M, D] buffer.

`decode_experts` multiplies the dense code of the selected experts by their decoders: work grows
with E * m, but it is all matrix products. It wins where few latents are left out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

from scale_sae_jax.sae.codes import Codes
from scale_sae_jax.sae.grouped import grouped_dot
from scale_sae_jax.sae.groups import Groups, by_expert, by_token
from scale_sae_jax.sae.kernels import Kernel

CHUNK_ELEMENTS = 1 << 20


def decode_experts(
    codes: Codes,
    experts: Int[Array, "T E"],
    w_dec: Float[Array, "N M D"],
    groups: Groups,
    kernel: Kernel,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T D"]:
    """The same sum for codes of the selected experts' latents."""
    tokens, active = experts.shape
    size = w_dec.shape[1]
    place = (codes.ids[..., None] // size == experts[:, None, :]).argmax(-1)  # [T, K]
    slots = place * size + codes.ids % size
    dense = jnp.zeros((tokens, active * size), codes.values.dtype)
    dense = dense.at[jnp.arange(tokens)[:, None], slots].add(codes.values)
    rows = by_expert(dense.reshape(tokens, active, size), groups)
    return by_token(grouped_dot(rows, w_dec, groups, kernel, dtype), groups, tokens).sum(1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def decode_rows(
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    rows: Float[Array, "L D"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "T D"]:
    """sum_k values[t, k] * rows[ids[t, k]], with operands rounded to `dtype`, float32 sums."""
    width = rows.shape[1]
    rows = rows.astype(dtype)

    def decode(chunk):
        v, i = chunk  # [C, K], [C, K]
        return _einsum("tk,tkd->td", v.astype(dtype), rows[i])

    decoded = jax.lax.map(decode, (_chunked(values, width), _chunked(ids, width)))
    return decoded.reshape(-1, width)[: values.shape[0]]


def _forward(values, ids, rows, dtype):
    return decode_rows(values, ids, rows, dtype), (values, ids, rows)


def _backward(dtype, saved, grad):
    values, ids, rows = saved
    tokens, slots = values.shape
    width = rows.shape[1]
    rounded = rows.astype(dtype)

    def step(d_rows, chunk):
        v, i, g = chunk  # [C, K], [C, K], [C, D]
        d_values = _einsum("td,tkd->tk", g.astype(dtype), rounded[i])
        return d_rows.at[i].add(v[..., None] * g[:, None, :]), d_values

    chunks = (_chunked(values, width), _chunked(ids, width), _chunked(grad, width, slots))
    d_rows, d_values = jax.lax.scan(step, jnp.zeros(rows.shape, jnp.float32), chunks)
    return d_values.reshape(-1, slots)[:tokens], None, d_rows.astype(rows.dtype)


decode_rows.defvjp(_forward, _backward)


def _einsum(spec: str, left: Array, right: Array) -> Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _chunked(array: Array, width: int, slots: int | None = None) -> Array:
    """[T, ...] as [chunks, C, ...], padded with zeros (a zero value decodes to nothing)."""
    tokens = array.shape[0]
    size = max(1, min(tokens, CHUNK_ELEMENTS // (width * (slots or array.shape[1]))))
    padding = [(0, -tokens % size)] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(-1, size, *array.shape[1:])
