"""Small autoencoders of every architecture, with random parameters."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from scale_sae_jax.sae import build
from scale_sae_jax.sae.jumprelu import SPEED
from scale_sae_jax.sae.presets import preset

D, L, K, T = 12, 40, 5, 24
PLAIN = ("relu", "topk", "jumprelu", "batchtopk", "matryoshka", "gated")
# Many experts: mixtures in which every value of every option occurs.
MIXTURES = (
    dict(gate="prob", gate_at="output", feature_scaling="mean"),
    dict(gate="renorm", gate_at="code", feature_scaling="mean_lp", tie_biases=True),
    dict(gate="softmax_probs", gate_at="code", topk_scope="batch", input_scale=True),
    dict(gate="softmax_logits", topk_scope="expert", feature_scaling="gain", balance_rate=1e-3),
    dict(gate="one", topk_scope="batch", feature_scaling="none", encoder_bias=False),
    dict(gate="prob", gate_at="code", input_scale=True, balance_rate=1e-3, feature_scaling="mean"),
)


def plain(name, **changes):
    config = preset(name, latents=L, experts=1, active=1, k=K)
    return filled(dataclasses.replace(config, **changes))


def experts(active=2, k=6, **options):
    config = preset("paper", latents=L, experts=5, active=active, k=k)
    return filled(dataclasses.replace(config, **options))


@lru_cache
def filled(config, seed=0):
    """(autoencoder, parameters, x [T, D] float32)."""
    rng = np.random.default_rng(seed)
    x = (2 * rng.normal(size=(T, D)) + 1).astype(np.float32)
    sae = build(config, D)
    params = {
        name: np.float32(0.4 * rng.normal(size=leaf.shape) if leaf.ndim else rng.uniform(0.3, 1))
        for name, leaf in jax.eval_shape(sae.init, jax.random.key(0)).items()
    }
    if "log_threshold" in params:
        threshold = rng.uniform(0.5, 2, L)
        params["log_threshold"] = np.float32(np.log(threshold) / SPEED)
    return sae, jax.tree.map(jnp.asarray, params), x


@partial(jax.jit, static_argnums=0)
def run(sae, params, x):
    """(codes [T, L], reconstructions [T, D])."""
    values, ids = codes = sae.encode(params, x)
    dense = jnp.zeros((len(x), sae.latents)).at[jnp.arange(len(x))[:, None], ids].add(values)
    return dense, sae.decode(params, codes)


def assert_same(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1e-6, np.abs(expected).max())


def assert_same_function(one, other, x):
    """Two (autoencoder, parameters) give the same codes and reconstructions."""
    codes, x_hat = run(*one, x)
    found, found_x_hat = run(*other, x)
    assert (np.asarray(codes) != 0).any()
    assert_same(found, codes)
    assert_same(found_x_hat, x_hat)
