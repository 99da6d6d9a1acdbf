"""The optimiser against hand values, and the starting values of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scale_sae_jax.config import OptimConfig, SAEConfig
from scale_sae_jax.sae import build
from scale_sae_jax.sae.start import geometric_median, normalise
from scale_sae_jax.training.optim import (
    clip,
    is_decoder,
    learning_rate,
    optimiser,
    retract,
    schedule,
    tangent,
)

LATENTS, EXPERTS, WIDTH = 24, 3, 10
AXES = {"latent": -1, "coordinate": -2}


def start(decoder_norm="latent"):
    config = SAEConfig(latents=LATENTS, experts=EXPERTS, k=4, decoder_norm=decoder_norm)
    return build(config, WIDTH).init(jax.random.key(0))


def noise(seed, params):
    """Gradients with the shapes of `params`."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    )


def test_learning_rate_follows_the_rule_unless_it_is_set():
    assert learning_rate(OptimConfig(), 2**14) == pytest.approx(2e-4)
    assert learning_rate(OptimConfig(), 2**16) == pytest.approx(1e-4)
    assert learning_rate(OptimConfig(), 24_576) == pytest.approx(1.6329932e-4)
    assert learning_rate(OptimConfig(lr=3e-3), 2**16) == 3e-3


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (0.0, 0.0, [8] * 8),
        (0.0, 0.5, [8, 8, 8, 8, 8, 6, 4, 2]),
        (0.5, 0.0, [2, 4, 6, 8, 8, 8, 8, 8]),
        (0.25, 0.25, [4, 8, 8, 8, 8, 8, 8, 4]),
        (0.0, 1.0, [8, 7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_schedule_by_hand(warmup, decay, expected):
    rate = schedule(OptimConfig(lr=8.0, warmup=warmup, decay=decay), LATENTS, 8)
    np.testing.assert_allclose([rate(jnp.asarray(step)) for step in range(8)], expected, rtol=1e-6)
    if decay:
        assert rate(8) == 0.0


@pytest.mark.parametrize("norm", AXES)
def test_decoder_stays_normalised_over_noisy_updates(norm):
    params = start(norm)
    tx = optimiser(OptimConfig(lr=0.05), LATENTS, 50, norm)

    @jax.jit
    def update(params, state, seed):
        updates, state = tx.update(noise(seed, params), state, params)
        return optax.apply_updates(params, updates), state

    first, state = params, tx.init(params)
    for seed in range(50):
        params, state = update(params, state, seed)
        norms = np.linalg.norm(params["w_dec"], axis=AXES[norm])
        np.testing.assert_allclose(norms, 1.0, atol=1e-5)
    for name, leaf in params.items():
        assert np.abs(leaf - first[name]).max() > 0.05, name
    assert np.linalg.norm(params["w_enc"], axis=1).std() > 1e-3  # only the decoder is held


def test_a_decoder_without_norm_takes_the_plain_adam_step():
    params = start("none")
    config = OptimConfig(lr=0.1, decay=0.0, clip=0.0)
    tx = optimiser(config, LATENTS, 10, "none")
    grads = noise(1, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for name, update in updates.items():  # Adam's first step is -lr * sign(g)
        np.testing.assert_allclose(update, -0.1 * np.sign(grads[name]), rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("limit", (1e-3, 1.0, 1e3))
def test_clip_is_that_of_optax(limit):
    gradient = noise(0, start())
    ours, theirs = (
        tx.update(gradient, tx.init(gradient))[0]
        for tx in (clip(limit), optax.clip_by_global_norm(limit))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    if limit == 1e3:
        jax.tree.map(np.testing.assert_array_equal, ours, gradient)


def test_clip_bounds_the_global_norm_before_adam():
    """Adam forgets a scale common to all gradients, but not one that changes between steps."""
    params = {"w_dec": normalise(jnp.ones((1, 2, 3)), "latent"), "b": jnp.zeros(2)}
    tx = optimiser(OptimConfig(lr=1.0, decay=0.0, clip=1.0, b1=0.0), LATENTS, 10, "none")
    small = {"w_dec": jnp.zeros((1, 2, 3)), "b": jnp.array([0.6, 0.0])}
    large = {"w_dec": jnp.zeros((1, 2, 3)), "b": jnp.array([50.0, 0.0])}  # clipped to 1
    _, state = tx.update(small, tx.init(params), params)
    updates, _ = tx.update(large, state, params)
    second_moment = (0.999 * 0.001 * 0.6**2 + 0.001 * 1.0**2) / (1 - 0.999**2)
    np.testing.assert_allclose(updates["b"], [-1 / second_moment**0.5, 0.0], rtol=1e-5)


def test_tangent_removes_the_radial_component():
    rows = normalise(start()["w_dec"], "latent")
    grads = noise(2, rows)
    left, _ = tangent().update(grads, optax.EmptyState(), rows)
    np.testing.assert_allclose((left * rows).sum(-1), 0.0, atol=1e-6)
    radial = np.einsum("nmd,nmd->nm", grads, rows)[..., None] * rows
    np.testing.assert_allclose(left, grads - radial, atol=1e-6)


@pytest.mark.parametrize("norm", AXES)
def test_retract_ends_on_the_normalised_point(norm):
    w = normalise(start()["w_dec"], norm)
    proposed = noise(3, w)
    updates, _ = retract(norm).update(proposed, optax.EmptyState(), w)
    moved = np.asarray(w + proposed)
    expected = moved / np.linalg.norm(moved, axis=AXES[norm], keepdims=True)
    np.testing.assert_allclose(w + updates, expected, atol=1e-6)


def test_only_the_decoder_is_masked():
    mask = is_decoder(start())
    assert mask["w_dec"] and [name for name, held in mask.items() if held] == ["w_dec"]


def test_decoder_starts_as_the_normalised_encoder_transpose():
    for norm, axis in (*AXES.items(), ("none", None)):
        params = start(norm)
        rows = np.swapaxes(params["w_enc"], 1, 2)
        if axis is not None:
            rows = rows / np.linalg.norm(rows, axis=axis, keepdims=True)
        np.testing.assert_allclose(params["w_dec"], rows, rtol=1e-5, err_msg=norm)
    assert np.abs(params["w_enc"]).max() <= WIDTH**-0.5


def test_biases_start_at_the_geometric_median_of_the_first_batch():
    x = jax.random.normal(jax.random.key(4), (40, WIDTH)) + 3
    config = SAEConfig(latents=LATENTS, experts=EXPERTS, k=4)
    params = build(config, WIDTH).init(jax.random.key(0), x)
    for name in ("b_dec", "b_router"):
        np.testing.assert_array_equal(params[name], geometric_median(x))
    assert params["b_dec"] is not params["b_router"]  # donated apart
    assert not start()["b_dec"].any()


def test_geometric_median_of_points_with_a_centre():
    cross = jnp.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    np.testing.assert_allclose(geometric_median(cross + 5), [5, 5], atol=1e-5)
    stretched = cross * jnp.array([1.0, 7.0]) - 2
    np.testing.assert_allclose(geometric_median(stretched), [-2, -2], atol=1e-5)
    np.testing.assert_allclose(geometric_median(jnp.full((3, 2), 4.0)), [4, 4], atol=1e-6)


def test_geometric_median_withstands_outliers_and_minimises_the_distances():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 4))
    x[:6] += 1000
    point = x.mean(0)
    for _ in range(50):
        weight = 1 / np.maximum(np.linalg.norm(x - point, axis=1), 1e-6)
        point = (weight[:, None] * x).sum(0) / weight.sum()
    ours = np.asarray(geometric_median(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(ours, point, atol=1e-3)
    assert np.linalg.norm(ours) < 1 < np.linalg.norm(x.mean(0))

    def distances(centre):
        return np.linalg.norm(x - centre, axis=1).sum()

    nearby = [distances(ours + 0.1 * rng.normal(size=4)) for _ in range(20)]
    assert distances(ours) < min(nearby)
