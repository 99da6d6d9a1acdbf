"""Sums per document and bootstrap intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.evaluation.bootstrap import (
    interval,
    merge_documents,
    ratio,
    resample,
    sum_by_document,
)


def test_sums_by_hand():
    ids, sums = sum_by_document(np.array([7, 3, 7]), {"a": np.array([1.0, 2.0, 4.0])})
    np.testing.assert_array_equal(ids, [3, 7])
    np.testing.assert_array_equal(sums["a"], [2.0, 5.0])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=1), st.data())
def test_cutting_the_tokens_anywhere_changes_nothing(rows, data):
    documents, terms = np.array(rows, np.int64).T
    cut = data.draw(st.integers(0, len(rows)))
    parts = [sum_by_document(documents[s], (terms[s],)) for s in (slice(cut), slice(cut, None))]
    whole_ids, (whole,) = sum_by_document(documents, (terms,))
    ids, (merged,) = merge_documents(parts)
    np.testing.assert_array_equal(ids, whole_ids)
    np.testing.assert_array_equal(merged, whole)


def test_sums_are_float64():
    small = np.full(1000, 0.1, np.float32)
    _, (total,) = sum_by_document(np.zeros(1000, np.int64), (small,))
    assert total.dtype == np.float64
    assert total[0] == pytest.approx(1000 * float(np.float32(0.1)), rel=1e-12)


def test_interval_of_equal_documents_is_a_point():
    sums = resample((np.full(20, 3.0), np.full(20, 2.0)), 100, seed=0)
    assert interval(ratio(*sums)) == pytest.approx([1.5, 1.5])


def test_interval_covers_as_the_normal_one_does():
    values = np.random.default_rng(1).normal(size=2000)
    (totals,) = resample((values,), 2000, seed=0)
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = interval(totals / len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_leaves_share_their_draws():
    a = np.arange(10.0)
    first, second = resample((a, 2 * a), 50, seed=3)
    np.testing.assert_allclose(second, 2 * first)
    assert np.ptp(first) > 0


def test_nothing_to_resample_has_no_interval():
    (one_document,) = resample((np.array([4.0]),), 100, seed=0)
    (no_draws,) = resample((np.array([4.0, 5.0]),), 0, seed=0)
    assert interval(one_document) is None
    assert interval(no_draws) is None


def test_undefined_draws_are_left_out():
    assert interval(np.array([np.nan, 2.0, 2.0])) == [2.0, 2.0]
    assert interval(np.array([np.nan])) is None


def test_ratio_is_undefined_over_zero():
    np.testing.assert_array_equal(ratio(np.array([1.0, 3.0]), np.array([0.0, 2.0])), [np.nan, 1.5])
