"""Reconstruction metrics against hand-computed values and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scale_sae_jax.evaluation.reconstruction import reconstruction_metrics, token_terms


def metrics(x, reconstructed, mean, kept=None, real=None):
    x = jnp.asarray(x, jnp.float32)
    everything = jnp.ones(x.shape[:-1], bool)
    terms = token_terms(
        x,
        jnp.asarray(reconstructed, jnp.float32),
        jnp.asarray(mean, jnp.float32),
        everything if kept is None else jnp.asarray(kept),
        everything if real is None else jnp.asarray(real),
    )
    sums = jax.tree.map(lambda t: np.asarray(t, np.float64).sum(), terms)
    return {key: float(value) for key, value in reconstruction_metrics(sums).items()}


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(2.0, 1.0, (40, 6)).astype(np.float32)


def test_perfect_reconstruction(x):
    got = metrics(x, x, x.mean(0))
    assert (got["mse"], got["fvu"]) == (0, 0)
    assert [got[k] for k in ("cosine", "norm_ratio", "relative_bias")] == pytest.approx([1, 1, 1])


def test_the_mean_explains_nothing(x):
    got = metrics(x, np.broadcast_to(x.mean(0), x.shape), x.mean(0))
    assert got["fvu"] == pytest.approx(1)


def test_fvu_is_centred_on_the_mean_that_is_given(x):
    got = metrics(x, np.zeros_like(x), np.zeros(6))
    assert got["fvu"] == pytest.approx(1)
    assert metrics(x, np.zeros_like(x), x.mean(0))["fvu"] > 2


def test_by_hand():
    # Errors 1 and 4; norms 5 and 2; energies 16 and 0; inner products 16 and 0.
    got = metrics([[3.0, 4.0], [0.0, 2.0]], [[0.0, 4.0], [0.0, 0.0]], [0.0, 0.0])
    assert got["mse"] == pytest.approx((9 + 4) / 2)
    assert got["fvu"] == pytest.approx(13 / 29)
    assert got["cosine"] == pytest.approx((4 / 5 + 0) / 2)
    assert got["norm_ratio"] == pytest.approx((4 / 5 + 0) / 2)
    assert got["relative_bias"] == pytest.approx(16 / 16)


def test_shrinking_by_a_half(x):
    got = metrics(x, 0.5 * x, x.mean(0))
    assert got["relative_bias"] == pytest.approx(0.5)
    assert got["norm_ratio"] == pytest.approx(0.5)
    assert got["cosine"] == pytest.approx(1)


def test_masks_select_tokens(x):
    rng = np.random.default_rng(1)
    hat, mean = rng.normal(size=x.shape).astype(np.float32), x.mean(0)
    real = rng.random(40) < 0.8
    kept = real & (rng.random(40) < 0.5)
    x[~real] = np.nan
    got = metrics(x, hat, mean, kept, real)

    def mse_and_fvu(mask):
        error = np.square(x[mask] - hat[mask]).sum()
        return error / mask.sum(), error / np.square(x[mask] - mean).sum()

    assert (got["mse"], got["fvu"]) == pytest.approx(mse_and_fvu(kept), rel=1e-5)
    assert (got["mse_all"], got["fvu_all"]) == pytest.approx(mse_and_fvu(real), rel=1e-5)
    assert got["mse"] != pytest.approx(got["mse_all"], rel=1e-2)


def test_no_tokens_is_undefined(x):
    nothing = np.zeros(40, bool)
    assert all(np.isnan(v) for v in metrics(x, x, x.mean(0), nothing, nothing).values())
