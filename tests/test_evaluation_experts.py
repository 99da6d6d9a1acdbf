"""Expert load and mutual information against closed forms."""

import numpy as np
import pytest

from scale_sae_jax.evaluation.experts import (
    expert_load,
    expert_metrics,
    load_cv,
    mutual_information,
)


def entropy(p):
    p = np.asarray(p)[np.asarray(p) > 0]
    return -np.sum(p * np.log(p))


def test_load_counts_all_selected_experts():
    experts = np.array([[0, 1], [0, 2], [0, 1]])
    np.testing.assert_allclose(expert_load(experts, 4), [3 / 6, 2 / 6, 1 / 6, 0])


@pytest.mark.parametrize(
    ("load", "cv"), [([0.25] * 4, 0.0), ([1.0, 0, 0, 0], np.sqrt(3)), ([0.75, 0.25], 0.5)]
)
def test_load_cv(load, cv):
    assert load_cv(np.array(load)) == pytest.approx(cv)


def test_deterministic_experts_tell_their_whole_entropy():
    tokens = np.random.default_rng(0).integers(0, 50, 4000)
    experts = (tokens % 4)[:, None]
    got = mutual_information(tokens, experts, 4)
    assert got == pytest.approx(entropy(np.bincount(experts[:, 0]) / 4000))


def test_independent_experts_tell_nothing():
    tokens, experts = (a.ravel() for a in np.meshgrid(np.arange(6), np.arange(3)))
    assert mutual_information(tokens, experts[:, None], 3) == pytest.approx(0, abs=1e-12)


def test_against_entropies_with_two_active_experts():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 7, 500)
    experts = np.stack([tokens % 2, 2 + rng.integers(0, 3, 500)], axis=1)
    joint = np.zeros((7, 5))
    np.add.at(joint, (np.repeat(tokens, 2), experts.ravel()), 1 / 1000)
    expected = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel())
    assert mutual_information(tokens, experts, 5) == pytest.approx(expected)


def test_shuffling_leaves_only_the_bias():
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 100, 500)
    related = expert_metrics(tokens, (tokens % 8)[:, None], 8, seed=0)
    unrelated = expert_metrics(tokens, rng.integers(0, 8, (500, 1)), 8, seed=0)
    assert related["expert_mi"] > related["expert_mi_null"] + 1
    assert unrelated["expert_mi_null"] > 0.3
    assert unrelated["expert_mi"] == pytest.approx(unrelated["expert_mi_null"], rel=0.1)


def test_without_token_ids():
    got = expert_metrics(None, np.array([[0], [1]]), 2, seed=0)
    assert got["expert_load"] == [0.5, 0.5]
    assert got["expert_mi"] is None
    assert got["expert_mi_null"] is None
