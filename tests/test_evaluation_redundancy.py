"""Decoder redundancy against known duplicates, brute force, and simulated random directions."""

import jax.numpy as jnp
import numpy as np
import pytest

from scale_sae_jax.evaluation.redundancy import exceedance, max_cosines, redundancy_metrics


def brute_force(directions, experts):
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    cosine = unit @ unit.T
    same = experts[:, None] == experts
    intra = np.where(same & ~np.eye(len(unit), dtype=bool), cosine, -np.inf)
    return intra.max(1), np.where(~same, cosine, -np.inf).max(1)


@pytest.mark.parametrize("n", [1, 4, 23])
@pytest.mark.parametrize("block", [4, 5, 64])
def test_blocks_give_what_brute_force_gives(n, block):
    rng = np.random.default_rng(n)
    directions = rng.normal(1.0, 1.0, (n, 6)).astype(np.float32) * rng.uniform(0.1, 9, (n, 1))
    experts = rng.integers(0, 3, n)
    best = max_cosines(jnp.asarray(directions, jnp.float32), jnp.asarray(experts), block=block)
    intra, inter = brute_force(directions, experts)
    np.testing.assert_allclose(best.intra, intra, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(best.inter, inter, rtol=1e-5, atol=1e-6)


def test_known_duplicates():
    """Of 8 latents in 2 experts, two are twins inside an expert and two are twins across."""
    decoder = np.eye(8, dtype=np.float32)
    decoder[1] = 3 * decoder[0]  # both in expert 0
    decoder[5] = decoder[2]  # experts 1 and 0
    got = redundancy_metrics(decoder, np.ones(8, bool), 2)
    assert got["redundancy_0.9"] == 4 / 8
    assert got["redundancy_0.9_intra"] == 2 / 8
    assert got["redundancy_0.9_inter"] == 2 / 8
    assert got["max_cosine_mean"] == pytest.approx(4 / 8)
    assert got["max_cosine_mean_intra"] == pytest.approx(2 / 8)
    assert got["max_cosine_mean_inter"] == pytest.approx(2 / 8)


def test_thresholds_are_told_apart():
    angle = np.arccos(0.85)
    decoder = np.array([[1, 0, 0], [np.cos(angle), np.sin(angle), 0], [0, 0, 1]], np.float32)
    got = redundancy_metrics(decoder, np.ones(3, bool), 1)
    assert got["redundancy_0.7"] == got["redundancy_0.8"] == pytest.approx(2 / 3)
    assert got["redundancy_0.9"] == 0
    assert got["max_cosine_mean"] == pytest.approx((0.85 + 0.85 + 0) / 3, abs=1e-6)


def test_opposite_directions_are_not_redundant():
    got = redundancy_metrics(np.array([[1, 0], [-1, 0]], np.float32), np.ones(2, bool), 1)
    assert got["redundancy_0.7"] == 0
    assert got["max_cosine_mean"] == pytest.approx(-1)


def test_dead_latents_do_not_count():
    decoder = np.ones((4, 3), np.float32)
    decoder[3] = [1, -1, 0]
    got = redundancy_metrics(decoder, np.array([True, False, False, True]), 2)
    assert got["redundancy_0.7"] == 0
    assert got["max_cosine_mean"] == pytest.approx(0, abs=1e-6)


def test_a_single_expert_has_no_inter():
    got = redundancy_metrics(np.eye(4, dtype=np.float32), np.ones(4, bool), 1)
    assert all(np.isnan(v) == ("_inter" in key) for key, v in got.items())
    assert got["redundancy_0.8"] == got["redundancy_0.8_intra"]


def test_no_live_latent_leaves_everything_undefined():
    got = redundancy_metrics(np.eye(4, dtype=np.float32), np.zeros(4, bool), 2)
    assert all(np.isnan(v) for v in got.values())


def test_a_latent_alone_in_its_expert():
    """It exceeds nothing inside the expert, and does not enter that mean."""
    live = np.array([True, False, True, True])
    got = redundancy_metrics(np.ones((4, 3), np.float32), live, 2)
    assert got["redundancy_0.9_intra"] == pytest.approx(2 / 3)
    assert got["max_cosine_mean_intra"] == pytest.approx(1)
    assert got["redundancy_0.9_inter"] == 1


def test_null_is_the_expectation_of_a_simulation():
    """With D = 3 the chance of one cosine over t is (1 − t) / 2; sizes 6, 6 and 2 of 20 live."""
    live = np.zeros(24, bool)
    live[[0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 16, 17]] = True
    rng = np.random.default_rng(0)
    draws = [
        redundancy_metrics(rng.normal(size=(24, 3)).astype(np.float32), live, 3)
        for _ in range(400)
    ]
    for key in draws[0]:
        if not key.endswith("_null"):
            samples = np.array([d[key] for d in draws])
            error = samples.std() / np.sqrt(len(samples))
            assert draws[0][f"{key}_null"] == pytest.approx(samples.mean(), abs=4 * error), key
    pair = redundancy_metrics(np.eye(2, 3, dtype=np.float32), np.ones(2, bool), 1)
    assert pair["redundancy_0.7_null"] == pytest.approx(0.15)
    assert pair["max_cosine_mean_null"] == pytest.approx(0, abs=1e-6)


def test_exceedance_at_the_ends():
    got = exceedance(np.array([-1.0, 1.0, 0.0]), np.array([5, 5, 0]), 16)
    np.testing.assert_allclose(got, [1, 0, 0])
