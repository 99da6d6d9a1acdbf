"""Sums over gathered rows, each way of writing them, against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.sae import gathered, kernels, native, triton
from scale_sae_jax.sae.kernels import KERNELS
from scale_sae_jax.sae.lookup import lookup

SUMS = {
    "by slots": kernels.SUM_BY_SLOTS,
    "of whole": kernels.SUM_OF_WHOLE,
    "in chunks": gathered.in_chunks(kernels.SUM_OF_WHOLE, 300),
    "triton": triton.weighted_sum,
}
DOTS = {
    "by lanes": gathered.row_dots_by_lanes,
    "of whole": gathered.row_dots_of_whole,
    "in chunks": gathered.in_chunks(gathered.row_dots_by_lanes, 300),
    "triton": triton.row_dots,
}
SCATTERS = {
    "at once": partial(gathered.scatter, 1 << 25),
    "in chunks": partial(gathered.scatter, 300),
    "triton": triton.scatter,
}
if native.library:
    SCATTERS["native"] = native.scatter
SHAPES = {"tokens": st.integers(0, 9), "slots": st.integers(1, 70), "width": st.integers(1, 90)}


def setting(tokens, slots, width, rows=11):
    """start and x [T, D], values and ids [T, K], rows [11, D]; ids repeat within a token."""
    rng = np.random.default_rng(1000 * tokens + 100 * slots + width)
    start, x = rng.standard_normal((2, tokens, width)).astype(np.float32)
    values = rng.standard_normal((tokens, slots)).astype(np.float32)
    ids = rng.integers(0, rows, (tokens, slots))
    return start, x, values, ids, rng.standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("way", SUMS)
@settings(deadline=None, max_examples=12)
@given(**SHAPES)
def test_weighted_sum(way, tokens, slots, width):
    start, _, values, ids, rows = setting(tokens, slots, width)
    expected = start + np.einsum("tk,tkd->td", values, rows[ids])
    ours = jax.jit(SUMS[way])(start, values, ids, rows)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * slots)


@pytest.mark.parametrize("way", DOTS)
@settings(deadline=None, max_examples=12)
@given(**SHAPES)
def test_row_dots(way, tokens, slots, width):
    _, x, _, ids, rows = setting(tokens, slots, width)
    expected = np.einsum("td,tkd->tk", x, rows[ids])
    ours = jax.jit(DOTS[way])(x, ids, rows)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * width)


@pytest.mark.parametrize("way", SCATTERS)
@settings(deadline=None, max_examples=12)
@given(**SHAPES)
def test_scatter(way, tokens, slots, width):
    """Some ids lie before the rows, some beyond them."""
    _, x, values, ids, _ = setting(tokens, slots, width, rows=33)
    expected = np.zeros((33, width))
    np.add.at(expected, ids, values[..., None] * x[:, None])
    ours = jax.jit(SCATTERS[way], static_argnums=3)(values, ids - 11, x, 11)
    np.testing.assert_allclose(ours, expected[11:22], rtol=1e-5, atol=1e-5 * slots)


def test_kernels_for_gpus_add_up_all_columns():
    """More than a block has, and than one turn of its loop."""
    start, x, values, ids, rows = map(jnp.asarray, setting(tokens=3, slots=40, width=700))
    total = start + np.einsum("tk,tkd->td", values, rows[ids])
    np.testing.assert_allclose(triton.weighted_sum(start, values, ids, rows), total, atol=1e-4)
    dots = np.einsum("td,tkd->tk", x, rows[ids])
    np.testing.assert_allclose(triton.row_dots(x, ids, rows), dots, atol=1e-3)
    added = np.zeros(rows.shape)
    np.add.at(added, ids, values[..., None] * x[:, None])
    np.testing.assert_allclose(triton.scatter(values, ids, x, len(rows)), added, atol=1e-4)


@pytest.mark.parametrize("way", SUMS)
def test_a_row_that_no_token_uses_may_be_nan(way):
    """Though slots are filled up to a multiple of what one loop adds."""
    start, _, values, ids, rows = setting(tokens=3, slots=35, width=8)
    rows[0] = np.nan
    ours = jax.jit(SUMS[way])(start, values, np.maximum(ids, 1), rows)
    assert np.isfinite(ours).all()


@pytest.mark.optimised
@pytest.mark.parametrize("width", (768, 1600, 2304, 4100))
def test_widths_of_language_models(width):
    """Terms of more columns than one loop adds, and columns left over."""
    _, x, _, ids, rows = setting(4, 8, width)
    expected = np.einsum("td,tkd->tk", x, rows[ids])
    ours = jax.jit(gathered.row_dots_by_lanes)(x, ids, rows)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.optimised
@pytest.mark.parametrize("kernel", KERNELS)
def test_operands_are_rounded_and_sums_are_not(kernel):
    """Products of two bfloat16 numbers, 1 + 2^-7 each, are kept in full."""
    x = jnp.full((2, 64), 1 + 2**-7, jnp.bfloat16)
    rows = jnp.full((3, 64), 1 + 2**-7, jnp.bfloat16)
    values, ids = x[:, :40], jnp.zeros((2, 40), jnp.int32)
    start = jnp.zeros((2, 64), jnp.float32)
    weighted_sum, row_dots = KERNELS[kernel].weighted_sum, KERNELS[kernel].row_dots
    np.testing.assert_array_equal(weighted_sum(start, values, ids, rows), 40 * (1 + 2**-7) ** 2)
    np.testing.assert_array_equal(row_dots(x, ids, rows), 64 * (1 + 2**-7) ** 2)


@pytest.mark.optimised
def test_on_cpus_the_rows_of_a_batch_are_never_stored():
    """Nor where the sum has two users: the residual, and its products with the same rows."""
    tokens, slots, width = 2048, 32, 768
    kernel = KERNELS["loop"]

    def residual_and_dots(start, values, ids, rows):
        residual = kernel.weighted_sum(start, -values, ids, rows)
        return residual[::-1], kernel.row_dots(residual, ids, rows)

    shapes = [(tokens, width), (tokens, slots), (tokens, slots), (64, width)]
    types = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
    compiled = jax.jit(residual_and_dots).lower(*arguments).compile()
    stored_rows = 4 * tokens * slots * width
    assert compiled.memory_analysis().temp_size_in_bytes < stored_rows / 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_looking_up_and_its_gradient(kernel):
    """As indexing does, alone and under vmap, but that ids beyond the last leave no gradient."""
    ids = jnp.asarray([[0, 4, 5], [1, 3, 0]])
    table = jnp.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 3)), jnp.float32)

    def value_and_gradient(table, weight):
        found = lookup(table, ids, KERNELS[kernel])
        return found, jax.grad(lambda t: (weight * lookup(t, ids, KERNELS[kernel])).sum())(table)

    expected = np.zeros((2, 5, 3))
    np.add.at(expected, (slice(None), np.minimum(ids, 4)), weight)
    for found, gradient in (
        jax.vmap(value_and_gradient)(table, weight),
        [jnp.stack(both) for both in zip(*map(value_and_gradient, table, weight), strict=True)],
    ):
        np.testing.assert_array_equal(found, table[:, np.minimum(ids, 3)])
        np.testing.assert_allclose(gradient, expected[:, :4], atol=1e-6)
