"""Products grouped by expert against every expert computed, in value and gradient, at any load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.sae.grouped import BLOCK, plan, selected_products

T, N, D, M = 150, 5, 7, 6


def dense(x, w, experts):
    everything = jnp.einsum("td,ndm->tnm", x, w)
    return jnp.take_along_axis(everything, experts[..., None], axis=1)


@jax.jit
def both(x, w, experts, weight):
    def summed(product, x, w):
        return (product(x, w, experts) * weight).sum()

    return [
        (f(x, w, experts), jax.grad(summed, argnums=(1, 2))(f, x, w))
        for f in (selected_products, dense)
    ]


def loads():
    """Experts [T, 2] of tokens spread evenly, unevenly, all on two experts, one expert idle."""
    rng = np.random.default_rng(0)
    even = np.stack([np.arange(T) % N, (np.arange(T) + 1) % N], 1)
    uneven = np.stack([rng.choice(4, 2, replace=False, p=[0.7, 0.2, 0.05, 0.05]) for _ in range(T)])
    return {"even": even, "uneven, expert 4 idle": uneven, "all the same": np.tile([1, 3], (T, 1))}


@pytest.mark.parametrize("name", loads())
def test_equals_dense_in_value_and_gradient(name):
    experts = jnp.asarray(np.sort(loads()[name], 1), jnp.int32)
    keys = jax.random.split(jax.random.key(1), 3)
    x, w = jax.random.normal(keys[0], (T, D)), jax.random.normal(keys[1], (N, D, M))
    weight = jax.random.normal(keys[2], (T, 2, M))
    (value, grads), (expected, expected_grads) = both(x, w, experts, weight)
    for ours, theirs in zip((value, *grads), (expected, *expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    idle = set(range(N)) - set(np.unique(experts))
    assert all((grads[1][i] == 0).all() for i in idle)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.data())
def test_plan_places_every_pair_once_in_a_block_of_its_expert(tokens, n_experts, data):
    active = data.draw(st.integers(1, n_experts))
    seed = data.draw(st.integers(0, 100))
    rng = np.random.default_rng(seed)
    popular = rng.dirichlet(np.full(n_experts, 0.3)) + 1e-9
    rank = rng.random((tokens, n_experts)) ** (1 / popular)
    experts = np.sort(np.argsort(-rank, 1)[:, :active], 1).astype(np.int32)
    with jax.disable_jit():
        blocks = jax.tree.map(np.asarray, plan(jnp.asarray(experts), n_experts))
    assert len(set(blocks.slots.ravel())) == experts.size
    assert (blocks.experts[blocks.slots // BLOCK] == experts).all()
    assert (blocks.tokens[blocks.slots] == np.arange(tokens)[:, None]).all()
    assert (blocks.tokens < tokens).sum() == experts.size
    needed = sum(-(-count // BLOCK) for count in np.bincount(experts.ravel()))
    assert blocks.used == needed <= len(blocks.experts)
