"""GPU kernels of our own, written in Pallas and compiled by Triton, for what XLA does slowly, would
store, or adds up in any order (docs/performance.md).

    dot, outer      the products of `kernels.Kernel`: rows are gathered, and the matrices of experts
                    read where they lie, as they are multiplied
    weighted_sum, row_dots, scatter    the sums of `gathered.py`, likewise
    largest         the k largest of each row

All sums have one order, so that a step gives the same bits each time: XLA's scatters on GPUs do
not. Sizes within a kernel are powers of two, and what lies beyond an array's end is masked. Where
there is no GPU, Pallas interprets them: slow, for tests.

JAX has announced the end of this way from Pallas to Triton. Where it is gone, there is no kernel of
this name, and GPUs take `tiles` and XLA's top-k.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

from scale_sae_jax.sae.gathered import wide
from scale_sae_jax.sae.groups import Groups, group
from scale_sae_jax.sae.tiles import Rows, cut

try:
    from jax.experimental.pallas import triton as backend
except ImportError:
    backend = None

WIDEST = 1 << 13  # row that `largest` holds in the registers of a block
NUMBERS = 1 << 12  # that a block of `scatter` loads at once


def power_of_two(size: int, most: int, least: int = 16) -> int:
    """The smallest power of two that is not below `size`, within [least, most], two such powers."""
    return min(max(1 << (size - 1).bit_length(), least), most)


def dot(
    rows: Rows, w: Float[Array, "N X Y"], groups: Groups, transposed: bool, shards: int = 1
) -> Float[Array, "P B"]:
    """A block multiplies a tile of rows by some columns of its expert's matrix."""
    pairs, depth = groups.pairs.size, rows.array.shape[1]
    width = w.shape[1 if transposed else 2]
    size = power_of_two(-(-pairs // (w.shape[0] * shards)), most=32)
    tiles = cut(groups.sizes, pairs, size)
    columns, step = power_of_two(width, most=128), power_of_two(depth, most=64)

    def block(index, expert, starts, stops, array, w, out):
        tile, column = pl.program_id(0), pl.program_id(1) * columns + jnp.arange(columns)
        n, start, stop = expert[tile], starts[tile], stops[tile]

        @pl.when(start < stop)
        def _():
            place = start + jnp.arange(size)
            in_run = (place < stop)[:, None]
            row = backend.load(index.at[place], mask=place < stop, other=0)[:, None]

            def add(i, total):
                at = i * step + jnp.arange(step)
                inside = in_run & (at < depth)[None]
                left = backend.load(array.at[row, at[None]], mask=inside, other=0)
                if transposed:
                    inside = (column < width)[:, None] & (at < depth)[None]
                    right = backend.load(w.at[n, column[:, None], at[None]], mask=inside, other=0).T
                else:
                    inside = (at < depth)[:, None] & (column < width)[None]
                    right = backend.load(w.at[n, at[:, None], column[None]], mask=inside, other=0)
                return total + _product(left, right)

            total = jnp.zeros((size, columns), jnp.float32)
            total = jax.lax.fori_loop(0, pl.cdiv(depth, step), add, total)
            to = out.at[place[:, None], column[None]]
            backend.store(to, total, mask=in_run & (column < width)[None])

    grid = tiles.expert.size, pl.cdiv(width, columns)
    arrays = rows.index, tiles.expert, tiles.start, tiles.stop, rows.array, w
    return _launch(block, (pairs, width), grid, arrays, stages=2)


def outer(left: Rows, right: Rows, groups: Groups, shards: int = 1) -> Float[Array, "N A B"]:
    """A block goes through the run of one expert, for a part of its matrix."""
    height, width = left.array.shape[1], right.array.shape[1]
    part = power_of_two(height, most=128), power_of_two(width, most=64)
    step, experts = 64 // left.array.dtype.itemsize, groups.sizes.size
    stop = jnp.cumsum(groups.sizes)

    def block(left_index, right_index, starts, stops, left, right, out):
        n = pl.program_id(0)
        start, stop = starts[n], stops[n]
        a = pl.program_id(1) * part[0] + jnp.arange(part[0])
        b = pl.program_id(2) * part[1] + jnp.arange(part[1])

        def add(i, total):
            place = start + i * step + jnp.arange(step)

            def rows(array, index, column):
                row = backend.load(index.at[place], mask=place < stop, other=0)[:, None]
                inside = (place < stop)[:, None] & (column < array.shape[1])[None]
                return backend.load(array.at[row, column[None]], mask=inside, other=0)

            return total + _product(rows(left, left_index, a).T, rows(right, right_index, b))

        total = jax.lax.fori_loop(0, pl.cdiv(stop - start, step), add, jnp.zeros(part, jnp.float32))
        inside = (a < height)[:, None] & (b < width)[None]
        backend.store(out.at[n, a[:, None], b[None]], total, mask=inside)

    grid = experts, pl.cdiv(height, part[0]), pl.cdiv(width, part[1])
    arrays = left.index, right.index, stop - groups.sizes, stop, left.array, right.array
    return _launch(block, (experts, height, width), grid, arrays, stages=4)


def weighted_sum(
    start: Float[Array, "T D"],
    values: Float[Array, "T K"],
    ids: Int[Array, "T K"],
    rows: Float[Array, "L D"],
) -> Float[Array, "T D"]:
    """start + sum_k values[:, k] * rows[ids[:, k]]; a block has some columns of one token."""
    (tokens, slots), width = ids.shape, rows.shape[1]
    columns = power_of_two(width, most=256)

    def block(start, values, ids, rows, out):
        t = pl.program_id(0)
        column = pl.program_id(1) * columns + jnp.arange(columns)
        inside = column < width

        def add(k, total):
            row = backend.load(rows.at[ids[t, k], column], mask=inside, other=0)
            return total + wide(values[t, k]) * wide(row)

        total = backend.load(start.at[t, column], mask=inside, other=0)
        total = jax.lax.fori_loop(0, slots, add, total)
        backend.store(out.at[t, column], total, mask=inside)

    grid = tokens, pl.cdiv(width, columns)
    arrays = start, values, _in_range(ids, rows), rows
    return _launch(block, (tokens, width), grid, arrays, warps=2)


def row_dots(
    x: Float[Array, "T D"], ids: Int[Array, "T K"], rows: Float[Array, "L D"]
) -> Float[Array, "T K"]:
    """x_t . rows[ids[t, k]]; a block has some slots of one token."""
    (tokens, slots), width = ids.shape, rows.shape[1]
    some, step = power_of_two(slots, most=32, least=1), power_of_two(width, most=128)

    def block(x, ids, rows, out):
        t = pl.program_id(0)
        slot = pl.program_id(1) * some + jnp.arange(some)
        row = backend.load(ids.at[t, slot], mask=slot < slots, other=0)[:, None]

        def add(i, total):
            at = i * step + jnp.arange(step)
            inside = (slot < slots)[:, None] & (at < width)[None]
            gathered = backend.load(rows.at[row, at[None]], mask=inside, other=0)
            along = backend.load(x.at[t, at], mask=at < width, other=0)
            return total + (wide(gathered) * wide(along)[None]).sum(1)

        total = jax.lax.fori_loop(0, pl.cdiv(width, step), add, jnp.zeros(some, jnp.float32))
        backend.store(out.at[t, slot], total, mask=slot < slots)

    grid = tokens, pl.cdiv(slots, some)
    return _launch(block, ids.shape, grid, (x, _in_range(ids, rows), rows))


def scatter(
    values: Float[Array, "T K"], ids: Int[Array, "T K"], grad: Float[Array, "T D"], latents: int
) -> Float[Array, "L D"]:
    """Sum over t and k with ids[t, k] = l of values[t, k] * grad[t]; other ids are left out.

    A block goes through the slots of one latent, in the order of their tokens, for some columns.
    """
    slots, width = ids.shape[1], grad.shape[1]
    columns = power_of_two(width, most=256)
    step = NUMBERS // columns
    runs = group(jnp.where(ids < 0, latents, ids), latents)  # negative ids would come first
    stop = jnp.cumsum(runs.sizes)

    def block(values, tokens, starts, stops, grad, out):
        l = pl.program_id(0)
        column = pl.program_id(1) * columns + jnp.arange(columns)

        def add(i, total):
            place = starts[l] + i * step + jnp.arange(step)
            there = place < stops[l]
            t = backend.load(tokens.at[place], mask=there, other=0)[:, None]
            inside = there[:, None] & (column < width)[None]
            rows = backend.load(grad.at[t, column[None]], mask=inside, other=0)
            value = backend.load(values.at[place], mask=there, other=0)
            return total + (wide(value)[:, None] * wide(rows)).sum(0)

        count = pl.cdiv(stops[l] - starts[l], step)
        total = jax.lax.fori_loop(0, count, add, jnp.zeros(columns, jnp.float32))
        backend.store(out.at[l, column], total, mask=column < width)

    grid = latents, pl.cdiv(width, columns)
    arrays = values.reshape(-1)[runs.pairs], runs.pairs // slots, stop - runs.sizes, stop, grad
    return _launch(block, (latents, width), grid, arrays)


def largest(values: Float[Array, "T W"], k: int) -> Int[Array, "T K"]:
    """Places of the k largest of each row of at most WIDEST, rising; a tie goes to the lower place.

    A block holds one row. The k-th largest is found bit by bit, from counts alone: read as
    integers, with the others turned round where the sign is set, floats keep their order.
    """
    tokens, width = values.shape
    size = power_of_two(width, most=WIDEST)
    lowest = jnp.iinfo(jnp.int32).min

    def block(bits, out):
        t, place = pl.program_id(0), jnp.arange(size)
        bits = backend.load(bits.at[t, place], mask=place < width, other=0)
        keys = jnp.where(place < width, bits ^ ((bits >> 31) & 0x7FFFFFFF), lowest)

        def narrow(i, least):
            higher = least + (1 << (31 - i))  # 0 is above the lowest by 2^31, which wraps around
            return jnp.where((keys >= higher).astype(jnp.int32).sum() >= k, higher, least)

        least = jax.lax.fori_loop(0, 32, narrow, jnp.int32(lowest))
        above, tie = keys > least, keys == least
        left = k - above.astype(jnp.int32).sum()
        won = above | (tie & (jnp.cumsum(tie.astype(jnp.int32)) <= left))
        slot = jnp.where(won, jnp.cumsum(won.astype(jnp.int32)) - 1, k)
        backend.store(out.at[t, slot], place, mask=won)

    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    warps = 1 if size <= 1024 else 4
    return _launch(block, (tokens, k), (tokens,), (bits,), warps=warps, dtype=jnp.int32)


def _launch(
    block: Callable[..., None],
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    arrays: tuple[Array, ...],
    warps: int = 4,
    stages: int = 3,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """The array that `block`, called once for each place in the grid, writes.

    Args:
      warps: of 32 threads, which share a block's work. stages: turns of a loop under way at once.
    """
    if 0 in grid or not all(array.size for array in arrays):
        return jnp.zeros(shape, dtype)
    return pl.pallas_call(
        block,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=grid,
        interpret=jax.default_backend() != "gpu",
        compiler_params=backend.CompilerParams(num_warps=warps, num_stages=stages),
    )(*arrays)


def _product(left: Array, right: Array) -> Float[Array, "A B"]:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _in_range(ids: Int[Array, "T K"], rows: Float[Array, "L D"]) -> Int[Array, "T K"]:
    return jnp.clip(ids, 0, rows.shape[0] - 1)
