"""Ways to multiply each expert's run of rows by that expert's matrix, one for each platform.

A kernel is two products over rows in the order of their experts (`Groups`):

    dot    rows [P, A], w [N, A, B] -> [P.., B]    row p times the matrix of its expert
    outer  left [P, A], right [P, B] -> [N, A, B]  sum of outer products over each expert's rows

with float32 sums whatever the dtype of the operands. `dot` takes w [N, B, A] where `transposed`,
and may return void rows after the P-th.

loop    tiles of rows one after the other; only tiles that exist cost anything. For CPUs.
        `outer` takes the first tile of all experts at once, unless half of them are idle.
native  kernels of our own (`native.py`): `dot` without padding, gradients of matrices from the
        winning latents alone, rows gathered once for decoding and the gradient of its values. The
        rest, and `dot` by transposed matrices or in bfloat16, as in `loop`. Best on CPUs.
triton  kernels of our own (`triton.py`). Best on GPUs.
ragged  `jax.lax.ragged_dot`, and `outer` as in loop. For TPUs. On CPUs, and on GPUs by default, a
        ragged product lowers to work for all experts; on TPUs too where it sums over the runs.
tiles   all tiles at once, as one batched product over gathered matrices. For what has none.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import gathered, native, triton
from scale_sae_jax.sae.groups import Groups
from scale_sae_jax.sae.tiles import Rows, cut, tile_rows


class Kernel(NamedTuple):
    """dot(rows, w, groups, transposed, shards) and outer(left, right, groups, shards).

    weighted_sum, row_dots, scatter: sums over decoder rows, see `gathered`. gathered_row,
    scattered_row: gathering a decoder row to multiply by it, or adding to one, takes as long as
    multiplying by so many of them. scatter_columns: as in `native`, where adding to a column of an
    encoder is as cheap. fused: `sum_and_dots` in float32, where one call does both. shards: devices
    that the experts of these pairs lie on, so that the run of one is so much shorter than pairs and
    experts here say. plain: whether all rows are of one expert.
    """

    dot: Callable[[Rows, Array, Groups, bool, int], Array]
    outer: Callable[[Rows, Rows, Groups, int], Array]
    weighted_sum: Callable[[Array, Array, Array, Array], Array]
    row_dots: Callable[[Array, Array, Array], Array]
    scatter: Callable[[Array, Array, Array, int], Array]
    gathered_row: int
    scattered_row: int
    scatter_columns: Callable[[Array, Array, Array, Array, int], Array] | None = None
    fused: Callable[[Array, Array, Array, Array], tuple[Array, Array]] | None = None
    shards: int = 1
    plain: bool = False

    def sum_and_dots(
        self,
        start: Float[Array, "T D"],
        values: Float[Array, "T K"],
        ids: Int[Array, "T K"],
        rows: Float[Array, "L D"],
    ) -> tuple[Float[Array, "T D"], Float[Array, "T K"]]:
        """The weighted sum, and its `row_dots` with the same rows."""
        if self.fused and rows.dtype == jnp.float32:
            return self.fused(start, values, ids, rows)
        total = self.weighted_sum(start, values, ids, rows)
        return total, self.row_dots(total.astype(rows.dtype), ids, rows)


def _product(rows: Array, w: Array, transposed: bool) -> Array:
    """rows w or rows w^T over any leading axes, summed in float32."""
    spec = "...ra,...ba->...rb" if transposed else "...ra,...ab->...rb"
    return jnp.einsum(spec, rows, w, preferred_element_type=jnp.float32)


def _outer(rows: Array, grads: Array) -> Array:
    return jnp.einsum("...ra,...rb->...ab", rows, grads, preferred_element_type=jnp.float32)


def _loop_dot(
    rows: Rows, w: Float[Array, "N X Y"], groups: Groups, transposed: bool, shards: int = 1
) -> Float[Array, "P B"]:
    """Tiles are written in order, so what a tile computes beyond its run is overwritten."""
    pairs = groups.pairs.size
    size = tile_rows(pairs, w.shape[0] * shards)
    tiles = cut(groups.sizes, pairs, size)

    def body(t, out):
        start = tiles.start[t]
        product = _product(rows.at(start + jnp.arange(size)), w[tiles.expert[t]], transposed)
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, axis=0)

    out = jnp.zeros((pairs + size, w.shape[1 if transposed else 2]), jnp.float32)
    return jax.lax.fori_loop(0, tiles.used, body, out)


def _native_dot(
    rows: Rows, w: Float[Array, "N X Y"], groups: Groups, transposed: bool, shards: int = 1
) -> Float[Array, "P B"]:
    if transposed or w.dtype != jnp.float32:
        return _loop_dot(rows, w, groups, transposed, shards)
    return native.grouped_dot(rows.array, rows.index, w, groups.sizes)


def _loop_outer(left: Rows, right: Rows, groups: Groups, shards: int = 1) -> Float[Array, "N A B"]:
    """The first tile of every expert in one batched product, then those of longer runs in a loop.

    So most of the result is written once; a loop over all tiles has zeros to add to. It is taken
    where half of the experts are idle. Both sides are 0 beyond a run: a product with 0 alone would
    let a NaN through.
    """
    experts, pairs = groups.sizes.size, groups.pairs.size
    size = tile_rows(pairs, experts * shards)
    tiles = cut(groups.sizes, pairs, size)
    tile = jnp.arange(tiles.start.size)
    exists, first = tile < tiles.used, tile == tiles.first[tiles.expert]
    stop = jnp.cumsum(groups.sizes)

    def product(start, stop):
        place = start[..., None] + jnp.arange(size)
        inside = (place < stop[..., None])[..., None]
        return _outer(*(jnp.where(inside, rows.at(place), 0) for rows in (left, right)))

    def add_tiles(out, chosen):
        (order,) = jnp.nonzero(chosen, size=chosen.size)

        def add(i, out):
            t = order[i]
            return out.at[tiles.expert[t]].add(product(tiles.start[t], tiles.stop[t]))

        return jax.lax.fori_loop(0, chosen.sum(), add, out)

    def firsts_at_once():
        return add_tiles(product(stop - groups.sizes, stop), exists & ~first)

    def one_by_one():
        shape = (experts, left.array.shape[1], right.array.shape[1])
        return add_tiles(jnp.zeros(shape, jnp.float32), exists)

    return jax.lax.cond(2 * (groups.sizes > 0).sum() > experts, firsts_at_once, one_by_one)


def _tiles_dot(
    rows: Rows, w: Float[Array, "N X Y"], groups: Groups, transposed: bool, shards: int = 1
) -> Float[Array, "P B"]:
    pairs = groups.pairs.size
    size = tile_rows(pairs, w.shape[0] * shards)
    tiles = cut(groups.sizes, pairs, size)
    gathered = rows.at(tiles.start[:, None] + jnp.arange(size))  # [B, R, A]
    products = _product(gathered, w[tiles.expert], transposed)
    first = tiles.first[groups.experts]
    place = first * size + jnp.arange(pairs) - tiles.start[first]
    return products.reshape(-1, products.shape[-1])[place]


def _tiles_outer(left: Rows, right: Rows, groups: Groups, shards: int = 1) -> Float[Array, "N A B"]:
    experts, pairs = groups.sizes.size, groups.pairs.size
    size = tile_rows(pairs, experts * shards)
    tiles = cut(groups.sizes, pairs, size)
    place = tiles.start[:, None] + jnp.arange(size)  # [B, R]
    exists = jnp.arange(tiles.start.size) < tiles.used
    inside = ((place < tiles.stop[:, None]) & exists[:, None])[..., None]
    products = _outer(*(jnp.where(inside, rows.at(place), 0) for rows in (left, right)))
    out = jnp.zeros((experts, *products.shape[1:]), jnp.float32)
    return out.at[tiles.expert].add(products, indices_are_sorted=True)


def _one_expert_dot(
    rows: Rows, w: Float[Array, "1 X Y"], groups: Groups, transposed: bool, shards: int = 1
) -> Float[Array, "P B"]:
    return _product(rows.array, w[0], transposed)


def _one_expert_outer(
    left: Rows, right: Rows, groups: Groups, shards: int = 1
) -> Float[Array, "1 A B"]:
    return _outer(left.array, right.array)[None]


def _ragged_dot(
    rows: Rows, w: Float[Array, "N X Y"], groups: Groups, transposed: bool, shards: int = 1
) -> Float[Array, "P B"]:
    dims = (((1,), (2 if transposed else 1,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(dims, (0,), (0,))
    return jax.lax.ragged_dot_general(
        rows.array[rows.index], w, groups.sizes, numbers, preferred_element_type=jnp.float32
    )


SUM_BY_SLOTS = partial(gathered.weighted_sum, gathered.products_by_slots)
SUM_OF_WHOLE = partial(gathered.weighted_sum, gathered.products_of_whole)
SCATTER_AT_ONCE = partial(gathered.scatter, 1 << 25)
# What gathering costs was measured on CPUs and GPUs; on TPUs it is the compiler's estimate
# (docs/performance.md), and for `tiles` a guess.
KERNELS = {
    "loop": Kernel(
        _loop_dot,
        _loop_outer,
        SUM_BY_SLOTS,
        gathered.in_chunks(gathered.row_dots_by_lanes, 3 << 22),
        partial(gathered.scatter, 3 << 15),
        gathered_row=7,
        scattered_row=40,
    ),
    "ragged": Kernel(
        _ragged_dot,
        _loop_outer,
        gathered.in_chunks(SUM_OF_WHOLE, 1 << 25),
        gathered.in_chunks(gathered.row_dots_of_whole, 1 << 25),
        SCATTER_AT_ONCE,
        gathered_row=1600,
        scattered_row=1000,
    ),
    "tiles": Kernel(
        _tiles_dot,
        _tiles_outer,
        SUM_OF_WHOLE,
        gathered.row_dots_of_whole,
        SCATTER_AT_ONCE,
        gathered_row=100,
        scattered_row=100,
    ),
}
if native.library:
    KERNELS["native"] = KERNELS["loop"]._replace(
        dot=_native_dot,
        scatter=native.scatter,
        scatter_columns=native.scatter_columns,
        fused=native.sum_and_dots,
        scattered_row=8,
    )
if triton.backend:
    KERNELS["triton"] = Kernel(
        triton.dot,
        triton.outer,
        triton.weighted_sum,
        triton.row_dots,
        triton.scatter,
        gathered_row=20,
        scattered_row=24,
    )
BEST = {"cpu": ("native", "loop"), "gpu": ("triton",), "tpu": ("ragged",)}
MISSING = {
    "native": "it was not compiled as this scale_sae_jax was installed (no C++ compiler?)",
    "triton": "this JAX has no Pallas for Triton",
}


def best(platform: str) -> str:
    """The name of the best kernel there is for a platform of JAX."""
    return next(name for name in (*BEST.get(platform, ()), "tiles") if name in KERNELS)


def choose(name: str, shards: int = 1) -> Kernel:
    """The kernel of that name; 'auto' takes the best for the platform that JAX computes on.

    That is the one of JAX's default backend: what is to run on the CPUs of a machine with a GPU
    needs another name. Raises UserError for 'native' on another platform than CPUs, and for it and
    'triton' where they are missing.
    """
    platform = jax.default_backend()
    name = best(platform) if name == "auto" else name
    if name not in KERNELS:
        raise UserError(f"config.sae.kernel = {name!r}, but {MISSING[name]}: take 'auto'")
    if name == "native" and platform != "cpu":
        raise UserError("config.sae.kernel = 'native', but it is for CPUs: take 'auto'")
    return KERNELS[name]._replace(shards=shards)


def one_expert(name: str) -> Kernel:
    """The kernel for one expert that takes all tokens in their order: plain products."""
    return choose(name)._replace(dot=_one_expert_dot, outer=_one_expert_outer, plain=True)
