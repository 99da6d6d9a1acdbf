"""Products grouped by expert, by every kernel, against every expert computed, at any load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.sae import kernels, native
from scale_sae_jax.sae import tiles as tiling
from scale_sae_jax.sae.grouped import grouped_dot, grouped_dot_at, grouped_sum, spread
from scale_sae_jax.sae.groups import group

T, N, D, M = 150, 5, 7, 6


def dense(x, w, experts):
    """x_t W_i by computing every expert; x [T, A] or [T, E, A]."""
    rows = jnp.broadcast_to(x if x.ndim == 3 else x[:, None], (*experts.shape, x.shape[-1]))
    everything = jnp.einsum("tea,nab->tenb", rows, w)
    return jnp.take_along_axis(everything, experts[..., None, None], axis=2)[:, :, 0]


def random_experts(rng, tokens, n_experts, active, evenness):
    """Distinct experts of each token, ascending; popularity is a Dirichlet draw."""
    popular = rng.dirichlet(np.full(n_experts, evenness)) + 1e-9
    rank = rng.random((tokens, n_experts)) ** (1 / popular)
    return np.sort(np.argsort(-rank, 1)[:, :active], 1).astype(np.int32)


def loads():
    """Experts [T, 2] of tokens spread evenly, unevenly, all on two experts, one expert idle."""
    rng = np.random.default_rng(0)
    even = np.stack([np.arange(T) % N, (np.arange(T) + 1) % N], 1)
    uneven = np.stack([rng.choice(4, 2, replace=False, p=[0.7, 0.2, 0.05, 0.05]) for _ in range(T)])
    return {"even": even, "uneven, expert 4 idle": uneven, "all the same": np.tile([1, 3], (T, 1))}


def assert_equal_to_dense(kernel, x, w, experts, weight, dtype=jnp.float32, tolerance=1e-5):
    """The products of x [T, A], or the sums over experts of those of x [T, E, A]."""

    @jax.jit
    def both(x, w):
        def ours(x, w):
            function = grouped_dot if x.ndim == 2 else grouped_sum
            return function(x, w, group(experts, w.shape[0]), kernels.choose(kernel), dtype)

        def theirs(x, w):
            products = dense(x, w, experts)
            return products if x.ndim == 2 else products.sum(1)

        return [
            (f(x, w), jax.grad(lambda x, w: (f(x, w) * weight).sum(), argnums=(0, 1))(x, w))
            for f in (ours, theirs)
        ]

    (value, grads), (expected, expected_grads) = both(x, w)
    for ours, theirs in zip((value, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)
    return grads


@pytest.mark.optimised
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("per_expert", (False, True))
@pytest.mark.parametrize("name", loads())
def test_equals_dense_in_value_and_gradient(name, per_expert, kernel):
    experts = jnp.asarray(np.sort(loads()[name], 1), jnp.int32)
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (T, 2, D) if per_expert else (T, D))
    w = jax.random.normal(keys[1], (N, D, M))
    weight = jax.random.normal(keys[2], (T, M) if per_expert else (T, 2, M))
    grads = assert_equal_to_dense(kernel, x, w, experts, weight)
    idle = set(range(N)) - set(np.unique(experts))
    assert all((grads[1][i] == 0).all() for i in idle)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("per_expert", (False, True))
def test_sizes_of_more_than_a_block_equal_dense(per_expert, kernel):
    """Of GPUs' kernels: more rows, columns and turns of a loop than one has."""
    a, b = 150, 140
    experts = jnp.asarray(np.sort(loads()["uneven, expert 4 idle"], 1), jnp.int32)
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (T, 2, a) if per_expert else (T, a))
    w = jax.random.normal(keys[1], (N, a, b))
    weight = jax.random.normal(keys[2], (T, b) if per_expert else (T, 2, b))
    assert_equal_to_dense(kernel, x, w, experts, weight)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(1, 90),
    n_experts=st.integers(1, 7),
    evenness=st.sampled_from((0.05, 0.5, 50.0)),
    data=st.data(),
)
def test_any_shape_and_load_equals_dense(kernel, tokens, n_experts, evenness, data):
    """Numbers are positive: where all sums cancel, rounding is more than 1e-5 of the largest."""
    active = data.draw(st.integers(1, n_experts))
    a, b = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    experts = jnp.asarray(random_experts(rng, tokens, n_experts, active, evenness))
    w = rng.uniform(0.1, 2, (n_experts, a, b))
    for by_expert in (False, True):
        x = rng.uniform(0.1, 2, (tokens, active, a) if by_expert else (tokens, a))
        weight = rng.uniform(0.1, 2, (tokens, b) if by_expert else (tokens, active, b))
        x, weight, matrices = (jnp.asarray(a, jnp.float32) for a in (x, weight, w))
        assert_equal_to_dense(kernel, x, matrices, experts, weight)


@pytest.mark.parametrize("scattered_row", (0, 1000))
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("name", loads())
def test_some_products_and_means_have_the_gradient_of_dense_ones(name, kernel, scattered_row):
    """Slots may repeat a product, as a dead latent that fires does, and may lie beyond all."""
    used = kernels.choose(kernel)._replace(scattered_row=scattered_row)
    experts = jnp.asarray(np.sort(loads()[name], 1), jnp.int32)
    keys = jax.random.split(jax.random.key(2), 4)
    x, w = jax.random.normal(keys[0], (T, D)), jax.random.normal(keys[1], (N, D, M))
    places = jax.random.randint(keys[2], (T, 4), 0, 2 * M).at[:, 3].set(2 * M)
    places = places.at[:, 2].set(places[:, 1])
    weight = jax.random.normal(keys[3], (T, 6))

    def ours(x, w):
        groups = group(experts, N)
        products = jax.lax.stop_gradient(grouped_dot(x, w, groups, used))
        return jnp.concatenate(grouped_dot_at(x, w, products, places, groups, used), axis=1)

    def theirs(x, w):
        products = dense(x, w, experts)
        flat = jnp.pad(products.reshape(T, -1), ((0, 0), (0, 1)))
        return jnp.concatenate(
            [jnp.take_along_axis(flat, places, axis=1), products.mean(-1)], axis=1
        )

    np.testing.assert_allclose(ours(x, w), theirs(x, w), atol=1e-5)
    assert (ours(x, w)[:, 3] == 0).all()
    grads = [
        jax.jit(jax.grad(lambda x, w, f=f: (f(x, w) * weight).sum(), argnums=(0, 1)))(x, w)
        for f in (ours, theirs)
    ]
    for mine, expected in zip(*grads, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_bfloat16_rounds_operands_and_sums_in_float32(kernel):
    """A sum of 4096 ones and small parts, which bfloat16 sums would lose."""
    experts = jnp.zeros((4, 1), jnp.int32)
    x = jnp.ones((4, 4096)).at[:, ::2].set(2.0**-9)
    value = grouped_dot(
        x, jnp.ones((1, 4096, 1)), group(experts, 1), kernels.choose(kernel), jnp.bfloat16
    )
    np.testing.assert_array_equal(value, np.full((4, 1, 1), 2048 + 4, np.float32))
    rounded = grouped_dot(
        jnp.full((1, 1), 1 + 2.0**-9), jnp.ones((1, 1, 1)), group(experts[:1], 1),
        kernels.choose(kernel), jnp.bfloat16,
    )
    assert rounded == 1.0


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.integers(1, 200),
    n_experts=st.integers(1, 9),
    rows=st.sampled_from((1, 8, 64)),
    data=st.data(),
)
def test_every_pair_lies_in_its_experts_run_and_tiles_cover_all_runs(
    tokens, n_experts, rows, data
):
    active = data.draw(st.integers(1, n_experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    experts = random_experts(rng, tokens, n_experts, active, 0.3)
    with jax.disable_jit():
        groups = jax.tree.map(np.asarray, group(jnp.asarray(experts), n_experts))
        tiles = jax.tree.map(np.asarray, tiling.cut(jnp.asarray(groups.sizes), experts.size, rows))
    assert (experts.reshape(-1)[groups.pairs] == groups.experts).all()
    assert (np.diff(groups.experts) >= 0).all()
    assert (groups.pairs[groups.rows] == np.arange(experts.size)).all()
    assert (groups.sizes == np.bincount(experts.ravel(), minlength=n_experts)).all()

    covered = np.concatenate([
        np.arange(start, min(start + rows, stop))
        for start, stop in zip(tiles.start[: tiles.used], tiles.stop[: tiles.used])
    ])
    assert (covered == np.arange(experts.size)).all()
    for tile in range(tiles.used):
        assert groups.experts[tiles.start[tile]] == tiles.expert[tile]


def test_auto_takes_the_kernel_of_the_platform(monkeypatch):
    on_cpus = "native" if native.library else "loop"
    best = dict(cpu=on_cpus, gpu="triton", tpu="ragged", other="tiles")
    for platform, name in best.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert kernels.choose("auto") == kernels.choose(name) == kernels.KERNELS[name]
        assert kernels.choose("auto", shards=2) == kernels.KERNELS[name]._replace(shards=2)


def test_a_nan_in_one_row_stays_in_it():
    places = jnp.asarray([[1, 2], [0, 3], [2, 9]])
    dense = spread(jnp.asarray([[jnp.nan, 1.0], [2.0, 3.0], [4.0, 5.0]]), places, 4)
    expected = [[0, np.nan, 1, 0], [2, 0, 0, 3], [0, 0, 4, 0]]
    np.testing.assert_array_equal(dense, expected)
