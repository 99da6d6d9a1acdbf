"""L0, firing counts, dead latents and the density histogram."""

import jax.numpy as jnp
import numpy as np
import pytest

from scale_sae_jax.evaluation.sparsity import density_metrics, firing_counts, l0_percentiles


def test_firing_counts_skip_unused_slots():
    ids = jnp.array([[0, 3], [3, 0], [3, 1]])
    fired = jnp.array([[True, True], [True, False], [True, False]])
    np.testing.assert_array_equal(firing_counts(ids, fired, 5), [1, 0, 0, 3, 0])


def test_percentiles_by_hand():
    # 1 … 100: 5 tokens have L0 <= 5, 95 have L0 <= 95.
    assert l0_percentiles(np.arange(1, 101)) == {"l0_p5": 5.0, "l0_p95": 95.0}


def test_density_by_hand():
    # Frequencies never, 1/1000 (log −3), 10/1000 (−2), always (0): bins are a quarter decade.
    got = density_metrics(np.array([0, 1, 10, 1000]), 1000)
    edges = got["density_edges"]
    assert got["dead"] == 0.25
    assert (edges[0], edges[1], edges[-1]) == (-8.0, -7.75, 0.0)
    filled = {edges[i]: n for i, n in enumerate(got["density"]) if n}
    assert filled == {-3.0: 1, -2.0: 1, -0.25: 1}


@pytest.mark.parametrize("seed", range(3))
def test_every_latent_is_dead_or_in_the_histogram(seed):
    firing = np.random.default_rng(seed).poisson(0.8, 300).clip(max=50)
    got = density_metrics(firing, 50)
    assert sum(got["density"]) + got["dead"] * 300 == pytest.approx(300)


def test_rarer_than_the_lowest_edge_still_counts():
    assert density_metrics(np.array([1]), 10**9)["density"][0] == 1
