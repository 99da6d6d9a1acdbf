"""Matrix products grouped by expert: each expert multiplies its own tokens, and no others.

The T * E (token, expert) pairs are put in the order of their experts, and each expert's run is
padded to whole blocks of `BLOCK` rows, so that a block belongs to one expert. A loop then runs over
the blocks that are really there. No pair is dropped at any load; an expert without tokens has no
block. Work and memory grow with T * E, not with the number of experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 64


class Blocks(NamedTuple):
    """Where the pairs lie: S = blocks * BLOCK slots, of which the first `used` blocks are in use.

    slots [T, E]: slot of each pair. tokens [S]: token of each slot, T where there is none.
    experts [S / BLOCK]: expert of each block.
    """

    slots: Int[Array, "T E"]
    tokens: Int[Array, " S"]
    experts: Int[Array, " B"]
    used: Int[Array, ""]


def plan(experts: Int[Array, "T E"], n_experts: int) -> Blocks:
    """Lays the pairs out; at most one partly filled block an expert."""
    tokens, active = experts.shape
    pairs = tokens * active
    most = -(-pairs // BLOCK) + min(n_experts, pairs)

    flat = experts.reshape(-1)
    counts = jnp.zeros(n_experts, jnp.int32).at[flat].add(1)
    ends = jnp.cumsum(-(-counts // BLOCK))  # last block of each expert, plus 1
    order = jnp.argsort(flat, stable=True)  # [P]
    expert = flat[order]
    rank = jnp.arange(pairs) - (jnp.cumsum(counts) - counts)[expert]
    start = (ends - -(-counts // BLOCK))[expert]
    slot = start * BLOCK + rank
    return Blocks(
        slots=jnp.zeros(pairs, jnp.int32).at[order].set(slot).reshape(experts.shape),
        tokens=jnp.full(most * BLOCK, tokens, jnp.int32).at[slot].set(order // active),
        experts=jnp.searchsorted(ends, jnp.arange(most), side="right").astype(jnp.int32),
        used=ends[-1],
    )


@jax.custom_vjp
def selected_products(
    x: Float[Array, "T D"], w: Float[Array, "N D M"], experts: Int[Array, "T E"]
) -> Float[Array, "T E M"]:
    """x W_i for each selected expert i."""
    return _multiply(x, w, plan(experts, w.shape[0]))


def _forward(x, w, experts):
    blocks = plan(experts, w.shape[0])
    return _multiply(x, w, blocks), (x, w, blocks)


def _backward(saved, grad):
    x, w, blocks = saved
    return _input_gradient(grad, w, blocks), _weight_gradient(x, grad, w, blocks), None


selected_products.defvjp(_forward, _backward)


def _multiply(x: Array, w: Array, blocks: Blocks) -> Array:
    """[T, D] x [N, D, M] -> [T, E, M]."""
    padded = _with_zero_row(x)

    def body(i, out):
        rows = padded[_block(blocks.tokens, i)]
        return _write_block(out, rows @ w[blocks.experts[i]], i)

    out = jnp.zeros((blocks.tokens.shape[0], w.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, blocks.used, body, out)[blocks.slots]


def _input_gradient(grad: Array, w: Array, blocks: Blocks) -> Array:
    """[T, E, M] x [N, D, M] -> [T, D]; compiled away where nobody asks for it."""
    slotted = _to_slots(grad, blocks)

    def body(i, out):
        return _write_block(out, _block(slotted, i) @ w[blocks.experts[i]].T, i)

    out = jnp.zeros((blocks.tokens.shape[0], w.shape[1]), grad.dtype)
    return jax.lax.fori_loop(0, blocks.used, body, out)[blocks.slots].sum(1)


def _weight_gradient(x: Array, grad: Array, w: Array, blocks: Blocks) -> Array:
    """[T, D] x [T, E, M] -> [N, D, M]."""
    padded, slotted = _with_zero_row(x), _to_slots(grad, blocks)

    def body(i, out):
        outer = padded[_block(blocks.tokens, i)].T @ _block(slotted, i)
        return out.at[blocks.experts[i]].add(outer)

    return jax.lax.fori_loop(0, blocks.used, body, jnp.zeros_like(w))


def _with_zero_row(x: Array) -> Array:
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])


def _to_slots(grad: Array, blocks: Blocks) -> Array:
    """[T, E, M] in slot order [S, M]; unused slots are 0."""
    out = jnp.zeros((blocks.tokens.shape[0], grad.shape[-1]), grad.dtype)
    return out.at[blocks.slots.reshape(-1)].set(grad.reshape(-1, grad.shape[-1]))


def _block(rows: Array, i: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(rows, i * BLOCK, BLOCK)


def _write_block(out: Array, rows: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(out, rows, i * BLOCK, axis=0)
