"""Batches as a pure function of (seed, step)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.activations.batches import batch_ids, permuted

SEEDS = st.integers(-(2**63), 2**64)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), SEEDS, st.integers(0, 2**40))
def test_permuted_is_a_permutation(n, seed, epoch):
    assert sorted(permuted(np.arange(n), n, seed, epoch)) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 700), SEEDS)
def test_every_epoch_holds_every_row_once(n, batch_size, seed):
    steps = -(-3 * n // batch_size)
    ids = np.concatenate([batch_ids(seed, step, batch_size, n) for step in range(steps)])
    for epoch in range(3):
        assert sorted(ids[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_depends_on_nothing_but_its_arguments():
    first = batch_ids(3, 17, 64, 1000)
    batch_ids(4, 18, 64, 999)
    assert (first == batch_ids(3, 17, 64, 1000)).all()
    assert first.dtype == np.int64


def test_the_order_never_changes():
    """Pinned: another order would break the resumption of a run begun with an earlier version."""
    assert batch_ids(0, 0, 8, 10).tolist() == [8, 7, 2, 4, 0, 6, 5, 3]


def test_epochs_and_seeds_differ():
    n = 1000
    epochs = [batch_ids(0, step, n, n) for step in range(3)] + [batch_ids(1, 0, n, n)]
    for i, a in enumerate(epochs):
        for b in epochs[:i]:
            assert (a == b).mean() < 0.02


def test_one_row():
    assert batch_ids(0, 5, 4, 1).tolist() == [0] * 4


def test_a_batch_larger_than_the_epoch():
    assert np.bincount(batch_ids(0, 0, 300, 100)).tolist() == [3] * 100


def test_the_order_looks_random():
    """Uniform in each slot of the epoch, and no correlation of neighbours."""
    n, trials = 16, 3000
    firsts = np.array([batch_ids(seed, 0, 1, n)[0] for seed in range(trials)])
    expected = trials / n
    chi2 = ((np.bincount(firsts, minlength=n) - expected) ** 2 / expected).sum()
    assert chi2 < 45  # 15 degrees of freedom: exceeded with probability 1e-4
    ids = batch_ids(0, 0, 100_000, 100_000)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.015


def test_large_n():
    n = 10**11
    ids = batch_ids(0, 10**6, 4096, n)
    assert 0 <= ids.min() and ids.max() < n
    assert len(set(ids.tolist())) == 4096
