"""Synthetic activations: the stated distributions, worked out independently, and pure rows."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, multivariate_normal, norm

from scale_sae_jax.activations.synthetic import open_synthetic
from scale_sae_jax.activations.synthetic_features import candidate_rates, firing_rates, tight_frame
from scale_sae_jax.activations.synthetic_samples import set_bits
from scale_sae_jax.config import SyntheticConfig
from scale_sae_jax.errors import UserError

SMALL = SyntheticConfig(
    features=200, d=32, samples=6000, heldout=1000, min_rate=0.02, roots=4, branching=3, depth=2
)
LEVELS = [range(4), range(4, 16), range(16, 52)]
FREE = range(52, 200)


def dense_codes(activations, count):
    codes = activations.codes(np.arange(count))
    dense = np.zeros((count, len(activations.features)), np.float32)
    np.add.at(dense, (np.arange(count)[:, None], np.asarray(codes.ids)), np.asarray(codes.values))
    return dense


def parent(feature):
    level = 1 if feature in LEVELS[1] else 2
    return LEVELS[level - 1][0] + (feature - LEVELS[level][0]) // 3


@pytest.fixture(scope="module")
def plain():
    """Without a copula or a spread of magnitudes, rates can be worked out exactly."""
    config = dataclasses.replace(SMALL, correlation=0.0, std_mean=0.0, std_spread=0.0)
    return config, dense_codes(open_synthetic(config)[0], SMALL.samples)


@pytest.fixture(scope="module")
def small():
    return open_synthetic(SMALL)


def test_rates_fall_like_zipf_between_their_ends():
    rates = firing_rates(SyntheticConfig(features=16_384))
    assert rates[0] == pytest.approx(0.4) and rates[-1] == pytest.approx(5e-4)
    steps = rates[:-1] - rates[1:]
    ratio = (1 - 2**-0.5) / (4**-0.5 - 5**-0.5)
    assert steps[0] / steps[3] == pytest.approx(ratio)


def test_every_feature_fires_at_the_rate_that_gating_and_exclusion_leave(plain):
    config, dense = plain
    candidate = candidate_rates(config)
    expected = candidate.copy()
    for feature in itertools.chain(LEVELS[1], LEVELS[2]):
        up = parent(feature)
        siblings = [f for f in range(4, 52) if parent(f) == up and f != feature]
        wins = 0.0
        for pattern in itertools.product((0, 1), repeat=len(siblings)):
            chances = [candidate[s] if on else 1 - candidate[s] for s, on in zip(
                siblings, pattern, strict=True)]
            wins += np.prod(chances) / (1 + sum(pattern))
        expected[feature] = expected[up] * candidate[feature] * wins
    error = np.sqrt(expected * (1 - expected) / len(dense))
    assert np.all(np.abs((dense > 0).mean(axis=0) - expected) < 4.5 * error)


def test_children_need_their_parent_and_exclude_their_siblings(small):
    fires = dense_codes(small[0], 4000) > 0
    for level in LEVELS[1:]:
        for family in np.split(np.array(level), len(level) // 3):
            up = parent(family[0])
            assert fires[:, family].sum(axis=1).max() == 1
            assert not np.any(fires[:, family].any(axis=1) & ~fires[:, up])


def test_a_childs_magnitude_is_its_parents_over_the_parents_mean(small):
    """With no spread of its own, a free feature has its mean, and so has a child of a root."""
    config = dataclasses.replace(SMALL, std_mean=0.0, std_spread=0.0)
    dense = dense_codes(open_synthetic(config)[0], 2000)
    mean = np.linspace(5, 4, 200)
    np.testing.assert_allclose(dense[dense > 0], mean[np.nonzero(dense)[1]], rtol=1e-5)
    spread = dense_codes(small[0], 6000)
    scalars = np.asarray(small[0].world.scalars)
    for feature in (5, 20):
        up = parent(feature)
        both = spread[:, feature] > 0
        own = spread[both, feature] / (spread[both, up] / scalars[up, 2])
        z = (own - scalars[feature, 2]) / scalars[feature, 3]
        assert abs(z.mean()) < 4.5 / np.sqrt(both.sum()) and both.sum() > 50


def test_magnitudes_are_normal_above_zero(small):
    dense = dense_codes(small[0], 6000)
    mean, std = np.asarray(small[0].world.scalars)[:, 2:].T
    z = [(dense[dense[:, f] > 0, f] - mean[f]) / std[f] for f in FREE if std[f] < mean[f] / 5]
    assert kstest(np.concatenate(z), "norm").pvalue > 1e-3
    assert np.abs(std - 0.5).std() > 0.2 and std.min() >= 0


def test_the_copula_correlates_features_as_its_factors_say(small):
    """P(both fire) of free features, by the bivariate normal, with a strong copula."""
    config = dataclasses.replace(SMALL, correlation=0.17, min_rate=0.2)
    activations = open_synthetic(config)[0]
    fires = dense_codes(activations, 6000) > 0
    weights, rates = np.asarray(activations.world.weights), firing_rates(config)
    correlation = weights[52:] @ weights[52:].T
    np.fill_diagonal(correlation, 0)
    for flat in (correlation.argmax(), correlation.argmin()):
        i, j = np.array(divmod(flat, 148)) + 52
        rho = correlation.ravel()[flat]
        cut = norm.ppf(rates[[i, j]])
        both = multivariate_normal.cdf(cut, cov=[[1, rho], [rho, 1]])
        error = np.sqrt(both * (1 - both) / len(fires))
        assert np.mean(fires[:, i] & fires[:, j]) == pytest.approx(both, abs=4.5 * error)
        assert abs(both - rates[i] * rates[j]) > 5 * error  # the test can tell


def test_directions_are_unit_and_nearer_orthogonal_than_random(small):
    directions = np.asarray(small[0].features)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-5)
    cosines = directions @ directions.T
    squares = (np.sum(cosines**2) - 200) / (200 * 199)
    least = (200 - 32) / (32 * 199)  # Welch's bound; random directions have 1 / 32
    assert squares == pytest.approx(least, rel=1e-3)
    few = np.asarray(tight_frame(np.random.default_rng(0).standard_normal((8, 32), np.float32)))
    np.testing.assert_allclose(few @ few.T, np.eye(8), atol=1e-3)


def test_rows_are_the_bias_and_the_sum_of_the_coded_directions(small):
    training, _ = small
    x = training.rows(np.arange(300))
    expected = dense_codes(training, 300) @ np.asarray(training.features) + training.world.bias
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(training.world.bias) == pytest.approx(1, rel=1e-5)


def test_rows_do_not_depend_on_what_they_are_read_with(small):
    training, heldout = small
    ids = np.arange(2500)
    x, codes = training.rows(ids), training.codes(ids)
    order = np.random.default_rng(0).permutation(2500)
    assert np.array_equal(training.rows(order), x[order])
    assert np.array_equal(training.rows(ids[7:8]), x[7:8])
    assert np.array_equal(training.codes(ids[1000:1100]).ids, codes.ids[1000:1100])
    assert np.array_equal(open_synthetic(SMALL)[0].rows(ids[:100]), x[:100])
    assert training.rows(ids[:0]).shape == (0, 32)
    assert not training.dropped(ids).any()


def test_held_out_samples_are_others_of_the_same_features(small):
    training, heldout = small
    assert heldout.features is training.features
    assert (training.n, heldout.n, heldout.d) == (6000, 1000, 32)
    ids = np.arange(1000)
    x = training.rows(np.arange(6000))
    full = [{row.tobytes() for row in rows if np.linalg.norm(row) > 5}  # several features
            for rows in (x, heldout.rows(ids))]
    assert len(full[1]) > 900 and not full[0] & full[1]
    np.testing.assert_allclose(training.mean, x.mean(axis=0), rtol=1e-4, atol=1e-4)
    assert heldout.median_norm == pytest.approx(np.median(np.linalg.norm(x, axis=1)))
    with pytest.raises(IndexError, match="0 ... 999"):
        heldout.rows(np.array([1000]))


def test_another_seed_is_another_world(small):
    other, _ = open_synthetic(dataclasses.replace(SMALL, seed=1))
    assert np.abs(np.asarray(other.features) - np.asarray(small[0].features)).max() > 0.1


def test_set_bits_finds_every_bit_and_counts_those_left_out():
    marked = np.random.default_rng(0).random((50, 64)) < 0.1
    bits = marked.reshape(50, 32, 2).astype(np.uint32)
    packed = (bits << np.arange(32, dtype=np.uint32)[:, None]).sum(axis=1, dtype=np.uint32)
    columns, used, lost = map(np.asarray, set_bits(jnp.asarray(packed), 6))
    for row in range(50):
        found = columns[row, used[row]]
        assert marked[row, found].all() and len(set(found)) == len(found)
        assert len(found) == min(6, marked[row].sum())
        assert lost[row] == marked[row].sum() - len(found)


@pytest.mark.parametrize(
    "wrong, part",
    [
        ({"features": 51}, "features = 51 must be"),
        ({"min_rate": 0.5}, "min_rate <= max_rate"),
        ({"d": 0}, "d must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"samples": 2**31}, "samples and heldout"),
        ({"last_mean": 0.0}, "last_mean"),
    ],
)
def test_bad_settings_are_refused_in_a_line(wrong, part):
    with pytest.raises(UserError, match="config.synthetic") as caught:
        open_synthetic(dataclasses.replace(SMALL, **wrong))
    assert part in str(caught.value) and "\n" not in str(caught.value)
