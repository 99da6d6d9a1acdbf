"""Architectures with one dictionary: outputs, losses and gradients against NumPy, and training."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saes import MIXTURES, PLAIN, experts, plain

from scale_sae_jax.config import OptimConfig, SAEConfig, check
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import build, selection
from scale_sae_jax.sae.jumprelu import SPEED, TANH_SLOPE, fires, jump
from scale_sae_jax.sae.losses import orthogonality
from scale_sae_jax.sae.matryoshka import prefix_sizes
from scale_sae_jax.sae.presets import PRESETS, preset
from scale_sae_jax.sae.registry import ARCHITECTURES, without_effect
from scale_sae_jax.sae.sparsity import steer
from scale_sae_jax.training import state
from scale_sae_jax.training.optim import optimiser, schedule
from scale_sae_jax.training.step import make_steps

D, L, K, T = 12, 40, 5, 24
NAMES = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
JAX_TOP_K = jax.jit(jax.lax.top_k, static_argnums=1)


def config_of(name, **changes):
    sizes = dict(latents=L, experts=1, active=1, k=K)
    config = preset(name, **sizes)
    return dataclasses.replace(config, **{"auxk_latents": 6, "prefixes": 3, **changes})


def setting(config, seed=0):
    """(sae, parameters away from their starting values, x [T, D], dead [L])."""
    rng = np.random.default_rng(seed)
    sae = build(config, D)
    x = (2 * rng.normal(size=(T, D)) + 1).astype(np.float32)
    params = sae.init(jax.random.key(seed), jnp.asarray(x))
    params = {
        name: leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)
        if leaf.ndim
        else jnp.abs(leaf) + 0.3
        for name, leaf in params.items()
    }
    if "log_threshold" in params:
        threshold = rng.uniform(0.5, 2, L)
        params["log_threshold"] = jnp.asarray(np.log(threshold) / SPEED, jnp.float32)
    return sae, params, x, rng.random(L) < 0.3


def double(params):
    return {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}


def largest(values, k):
    """The k largest of each row, the rest 0; of equal ones the first."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., :k]
    out = np.zeros_like(values)
    np.put_along_axis(out, order, np.take_along_axis(values, order, -1), -1)
    return out


# Each architecture once more, in NumPy: latents f [T, L] in training, before `scale`.


def products(p, x):
    return (x - p["b_dec"]) / p["scale"] @ p["w_enc"].T


def relu(p, x):
    return np.maximum(products(p, x) + p["b_enc"], 0)


def gated(p, x):
    gate = products(p, x) + p["b_enc"]
    return (gate > 0) * np.maximum(np.exp(p["r_mag"]) * products(p, x) + p["b_mag"], 0)


def jumprelu(p, x):
    pre = products(p, x) + p["b_enc"]
    return pre * (pre > np.exp(SPEED * p["log_threshold"]))


def topk(p, x):
    return largest(relu(p, x), K)


def batchtopk(p, x):
    return largest(relu(p, x).reshape(1, -1), K * len(x)).reshape(len(x), -1)


LATENTS = dict(
    relu=relu, gated=gated, jumprelu=jumprelu, topk=topk, batchtopk=batchtopk, matryoshka=batchtopk
)


def error(p, x, f, rows=slice(None), b_dec=None):
    decoded = p["scale"] * f[:, rows] @ p["w_dec"][rows] + p["b_dec"]
    return ((x - decoded) ** 2).sum(-1).mean()


def auxk(config, p, x, f, dead):
    residual = x - p["scale"] * f @ p["w_dec"] - p["b_dec"]
    revived = p["scale"] * largest(np.where(dead, relu(p, x), 0), config.auxk_latents)
    return ((residual - revived @ p["w_dec"]) ** 2).sum(-1).mean()


def pressure(f):
    return np.clip((f > 0).sum(-1).mean() / K, 0.25, 4) ** 3


def objective(config, p, x, dead):
    """The loss, and mean_t |x - x_hat|^2."""
    f = LATENTS[config.architecture](p, x)
    mse = error(p, x, f)
    if config.architecture == "relu":
        norms = np.linalg.norm(p["w_dec"], axis=1)
        weight = p["penalty"] * pressure(f) * p["scale"] ** 2
        return mse + weight * (f @ norms).mean(), mse
    if config.architecture == "gated":
        through = np.maximum(products(p, x) + p["b_enc"], 0)
        weight = p["penalty"] * pressure(f) * p["scale"] ** 2
        return mse + weight * through.sum(-1).mean() + error(p, x, through), mse
    if config.architecture == "jumprelu":
        weight = p["penalty"] * D * p["scale"] ** 2
        if config.l0_loss == "quadratic":
            return mse + weight * ((f > 0).sum(-1).mean() / K - 1) ** 2, mse
        strength = np.tanh(TANH_SLOPE * f * np.linalg.norm(p["w_dec"], axis=1)).sum(-1).mean() / K
        return mse + weight * pressure(f) * strength, mse
    main = mse
    if config.architecture == "matryoshka":
        main = np.mean([error(p, x, f, slice(end)) for end in (L // 4, L // 2, L)])
    return main + config.auxk_weight * auxk(config, p, x, f, dead), mse


VARIANTS = [config_of(name) for name in NAMES] + [config_of("jumprelu", l0_loss="tanh")]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.architecture}-{c.l0_loss}")
def test_loss_matches_numpy(config):
    sae, params, x, dead = setting(config)
    loss = jax.jit(sae.loss)(params, x, dead)
    expected, mse = objective(config, double(params), x, dead)
    f = LATENTS[config.architecture](double(params), x)
    assert 0 < (f > 0).mean() < 0.9
    np.testing.assert_allclose(loss.total, expected, rtol=2e-5)
    np.testing.assert_allclose(loss.mse, mse, rtol=2e-5)
    np.testing.assert_array_equal(loss.firing, (f > 0).sum(0))
    np.testing.assert_allclose(loss.expert_load, [1.0])


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_reconstruction_match_numpy(name):
    config = config_of(name)
    sae, params, x, _ = setting(config)
    if "threshold" in params:  # of one token alone, not of the batch
        params["threshold"] = jnp.asarray(0.4)
    p = double(params)
    f = relu(p, x) * (relu(p, x) > 0.4) if "threshold" in p else LATENTS[name](p, x)
    codes = sae.encode(params, x)
    dense = np.zeros((T, L))
    np.add.at(dense, (np.arange(T)[:, None], np.asarray(codes.ids)), np.asarray(codes.values))
    np.testing.assert_allclose(dense, p["scale"] * f, rtol=1e-4, atol=1e-5)
    x_hat = p["scale"] * f @ p["w_dec"] + p["b_dec"]
    np.testing.assert_allclose(sae.reconstruct(params, x), x_hat, rtol=1e-4, atol=1e-4)
    assert sae.route(params, x).experts.shape == (T, 1)
    assert sae.decoder(params).shape == (L, D)


@pytest.mark.parametrize("name", ("relu", "gated", "topk", "batchtopk", "matryoshka"))
def test_gradient_is_that_of_finite_differences(name):
    """Directional derivatives of the NumPy loss in float64; what is held constant stays so."""
    config = config_of(name, auxk=False)
    sae, params, x, dead = setting(config, seed=3)
    grads = jax.jit(jax.grad(lambda p: sae.loss(p, x, None).total))(params)
    p, rng = double(params), np.random.default_rng(0)
    no_auxk = dataclasses.replace(config, auxk_weight=0.0)

    def value(changed):
        if name != "gated":
            return objective(no_auxk, changed, x, dead)[0]
        # The auxiliary reconstruction decodes with the weights as they are.
        f, through = gated(changed, x), np.maximum(products(changed, x) + changed["b_enc"], 0)
        frozen = changed | {"w_dec": p["w_dec"]}
        decoded = changed["scale"] * through @ frozen["w_dec"] + p["b_dec"]
        auxiliary = ((x - decoded) ** 2).sum(-1).mean()
        weight = p["penalty"] * pressure(f) * p["scale"] ** 2
        return error(changed, x, f) + weight * through.sum(-1).mean() + auxiliary

    for leaf in set(params) - {"scale", "penalty", "threshold"}:
        along = rng.normal(size=p[leaf].shape)
        step = 1e-6
        ahead, behind = (value(p | {leaf: p[leaf] + s * along}) for s in (step, -step))
        slope = (ahead - behind) / (2 * step)
        ours = float((np.asarray(grads[leaf]) * along).sum())
        assert abs(slope) > 1e-3
        assert ours == pytest.approx(slope, rel=2e-3), leaf
    for leaf in {"scale", "penalty", "threshold"} & set(grads):
        assert float(grads[leaf]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_without_encoder_bias_there_is_none_at_the_start(name):
    sae, params, x, _ = setting(config_of(name, encoder_bias=False))
    assert "b_enc" not in params and params.keys() == sae.init(jax.random.key(0)).keys()
    assert jnp.isfinite(sae.loss(params, x, None).total)


def test_topk_gradient_is_the_dense_one_with_auxk_and_for_the_activations():
    """The sparse gradients against autodiff through dense products and a mask."""
    config = config_of("topk")
    sae, params, x, dead = setting(config)

    def dense(p, x):
        acts = jax.nn.relu((x - p["b_dec"]) / params["scale"] @ p["w_enc"].T + p["b_enc"])

        def kept(candidates, k):
            ids = jax.lax.top_k(candidates, k)[1]
            mask = jnp.zeros(acts.shape).at[jnp.arange(T)[:, None], ids].set(1)
            return acts * mask * (candidates > 0) * params["scale"]

        residual = x - kept(acts, K) @ p["w_dec"] - p["b_dec"]
        revived = kept(jnp.where(dead, acts, 0), 6) @ p["w_dec"]
        aux = jnp.square(jax.lax.stop_gradient(residual) - revived).sum(-1).mean()
        return jnp.square(residual).sum(-1).mean() + config.auxk_weight * aux

    ours = jax.jit(jax.grad(lambda p, x: sae.loss(p, x, dead).total, argnums=0))(params, x)
    theirs = jax.jit(jax.grad(dense))(params, x)
    for leaf in ("w_enc", "b_enc", "w_dec", "b_dec"):
        scale = np.abs(theirs[leaf]).max()
        np.testing.assert_allclose(ours[leaf], theirs[leaf], atol=2e-5 * scale)
    d_x = jax.jit(jax.grad(lambda x: jnp.sin(sae.reconstruct(params, x)).sum()))(x)

    def masked(x):
        acts = jax.nn.relu((x - params["b_dec"]) / params["scale"] @ params["w_enc"].T
                           + params["b_enc"])
        kept = jnp.where(acts >= jax.lax.top_k(acts, K)[0].min(-1, keepdims=True), acts, 0)
        return jnp.sin(params["scale"] * kept @ params["w_dec"] + params["b_dec"]).sum()

    np.testing.assert_allclose(d_x, jax.jit(jax.grad(masked))(x), atol=1e-4)


def test_jumprelu_gradients_are_those_of_the_paper():
    """Equations 11 and 12: a rectangle of width `bandwidth` around the threshold."""
    rng = np.random.default_rng(0)
    pre = rng.normal(1, 1, (200, 7)).astype(np.float32)
    threshold = rng.uniform(0.5, 1.5, 7).astype(np.float32)
    weight, width = rng.normal(size=pre.shape).astype(np.float32), 0.4
    near = np.abs(pre - threshold) < width / 2
    assert near.any() and not near.all()

    def total(function):
        return lambda z, t: (weight * function(z, t, width)).sum()

    pre, threshold = jnp.asarray(pre), jnp.asarray(threshold)
    d_pre, d_threshold = jax.grad(total(jump), argnums=(0, 1))(pre, threshold)
    np.testing.assert_allclose(d_pre, weight * (pre > threshold))
    expected = (-threshold / width * near * weight).sum(0)
    np.testing.assert_allclose(d_threshold, expected, rtol=1e-4, atol=1e-4)
    d_pre, d_threshold = jax.grad(total(fires), argnums=(0, 1))(pre, threshold)
    assert not np.any(d_pre)
    np.testing.assert_allclose(d_threshold, -(near * weight).sum(0) / width, rtol=1e-4, atol=1e-4)


def test_jumprelu_threshold_gradient_is_that_of_the_expected_loss():
    """On many samples the estimate agrees with finite differences of the mean itself."""
    pre = np.random.default_rng(0).normal(size=(400_000, 1)).astype(np.float32)

    def mean(t):
        return (pre * (pre > t)).mean(dtype=np.float64) + 3 * (pre > t).mean(dtype=np.float64)

    def ours(t):
        samples = jnp.asarray(pre)
        return jump(samples, t, 0.1).mean() + 3 * fires(samples, t, 0.1).mean()

    slope = (mean(0.75) - mean(0.65)) / 0.1
    assert float(jax.grad(ours)(jnp.full(1, 0.7))[0]) == pytest.approx(slope, rel=0.02)


# Training


@pytest.fixture(scope="module")
def activations():
    """Sums of three of 24 directions, some 40 from 0."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    chosen = rng.random((4096, 24)).argsort(1)[:, :3]
    strength = rng.uniform(1, 2, (4096, 3, 1))
    return (30 * (features[chosen] * strength).sum(1) + 10).astype(np.float32)


@pytest.mark.parametrize("name", NAMES + ("jumprelu-tanh", "ortho"))
def test_training_lowers_fvu_and_ends_at_the_target_l0(name, activations):
    tanh, ortho = {"l0_loss": "tanh", "penalty": 0.05}, {"orthogonality": 0.1}
    changes = {"jumprelu-tanh": tanh, "ortho": ortho}
    base = {"jumprelu-tanh": "jumprelu", "ortho": "topk"}.get(name, name)
    config = dataclasses.replace(
        preset(base, latents=48, experts=1, active=1, k=4), auxk_latents=8, **changes.get(name, {})
    )
    steps, calls, batch = 800, 100, 256
    sae, optim = build(config, 16), OptimConfig(lr=3e-3)
    tx = optimiser(optim, 48, steps, config.decoder_norm)
    run = make_steps(sae, tx, schedule(optim, 48, steps), 50_000)
    now = state.create(sae, tx, optim, 0, jnp.asarray(activations[:batch]))
    mean, rng = jnp.asarray(activations.mean(0)), np.random.default_rng(1)
    first = sae.loss(now.params, activations[:batch], None, jax.random.key(0))
    for _ in range(steps // calls):
        batches = jnp.asarray(activations[rng.integers(0, 4096, (calls, batch))])
        now, values = run(now, batches, calls, mean)
    x = activations[:2048]
    codes = sae.encode(now.params, x)
    held = np.square(x - np.asarray(sae.decode(now.params, codes))).sum()
    fvu = held / np.square(x - np.asarray(mean)).sum()
    start = float(first.mse) / np.square(x - np.asarray(mean)).sum(-1).mean()
    assert fvu < 0.5 * start and fvu < 0.35
    assert float((codes.values != 0).sum(-1).mean()) == pytest.approx(4, rel=0.1)
    assert all(np.isfinite(value) for value in values.values())


def test_penalty_is_steered_by_the_batch_and_not_by_a_gradient():
    assert float(steer(jnp.asarray(2.0), jnp.asarray(64.0), 32, 0.0)) == 2.0
    assert float(steer(jnp.asarray(2.0), jnp.asarray(48.0), 32, 0.1)) == pytest.approx(
        2 * 1.5**0.1, rel=1e-5
    )
    assert float(steer(jnp.asarray(2.0), jnp.asarray(0.0), 32, 0.1)) == pytest.approx(
        2 * np.exp(-0.1), rel=1e-5
    )


# Selection


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 24), rest=st.integers(0, 1), k=st.integers(1, 3), seed=st.integers(0, 99),
    values=st.integers(1, 40),
)
def test_two_stage_top_k_is_top_k(groups, rest, k, seed, values):
    """Few distinct values: most of them are ties."""
    width = max(groups * selection.GROUP + rest, k)
    rows = np.random.default_rng(seed).integers(0, values, (7, width)).astype(np.float32)
    ours, theirs = selection.top_k(jnp.asarray(rows), k), JAX_TOP_K(rows, k)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("tokens", (1, 63, 64, 100, 3000))
def test_top_k_in_pieces_is_top_k(tokens):
    """Ties, infinities and NaN included; 63 rows are one piece, 3000 are 64 of unequal length."""
    rows = np.random.default_rng(0).integers(-3, 9, (tokens, 40)).astype(np.float32)
    rows[rows == 8], rows[rows == -3], rows[:, 7] = np.inf, -np.inf, np.nan
    ours, theirs = selection.top_k(jnp.asarray(rows), 24), JAX_TOP_K(rows, 24)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.parametrize("kind", ("even", "ties", "one token has all", "nothing positive"))
def test_batch_winners_are_the_largest_of_the_batch(kind):
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.normal(size=(16, 64)), 0).astype(np.float32)
    if kind == "ties":
        acts = np.round(acts)
    if kind == "one token has all":
        acts[3] += 10
    if kind == "nothing positive":
        acts[:] = 0
    kept = np.asarray(jax.jit(selection.batch_winners, static_argnums=1)(acts, 3))
    expected = largest(acts.reshape(1, -1), 3 * 16).reshape(acts.shape)
    np.testing.assert_array_equal(kept, expected > 0)


def test_a_batch_with_more_places_than_an_int32_counts_is_refused():
    acts = jax.ShapeDtypeStruct((2**15, 2**16), jnp.float32)
    with pytest.raises(UserError, match="32768 x 65536 latents"):
        jax.eval_shape(lambda acts: selection.batch_winners(acts, 3), acts)


# Orthogonality


def test_orthogonality_is_the_mean_squared_largest_cosine():
    rows = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit.T - 9 * np.eye(10)
    value = orthogonality(jnp.asarray(rows), jax.random.key(0), 32)
    assert float(value) == pytest.approx((cosines.max(1) ** 2).mean(), rel=1e-5)

    order = np.asarray(jax.random.permutation(jax.random.key(5), 10))[:8].reshape(2, 4)
    by_chunk = [
        ((unit[c] @ unit[c].T - 9 * np.eye(4)).max(1) ** 2).mean() for c in order
    ]
    value = orthogonality(jnp.asarray(rows), jax.random.key(5), 4)
    assert float(value) == pytest.approx(np.mean(by_chunk), rel=1e-5)
    assert orthogonality(jnp.asarray(rows[:1]), jax.random.key(5), 4) == 0  # alike to no other


def test_orthogonality_pushes_equal_rows_apart_in_every_architecture():
    for name in ("paper", "topk"):
        config = preset(name, latents=L, experts=1, active=1, k=K)
        sae = build(dataclasses.replace(config, orthogonality=2.0, orthogonality_chunk=20), D)
        plain = build(config, D)
        params = sae.init(jax.random.key(0))
        x, key = jnp.ones((T, D)) * jnp.arange(D), jax.random.key(3)
        with_term, without = (s.loss(params, x + params["b_dec"], None, key) for s in (sae, plain))
        assert with_term.terms["orthogonality"] > 0
        variance = np.square(np.asarray(x) - np.asarray(x).mean(0)).sum(-1).mean()
        expected = without.total + 2 * variance * with_term.terms["orthogonality"]
        assert float(with_term.total) == pytest.approx(float(expected), rel=1e-5)
    rows = jnp.asarray([[1.0, 0.1], [1.0, -0.1]])
    down = rows - 0.1 * jax.grad(lambda r: orthogonality(r, jax.random.key(0), 2))(rows)
    cosine = [float(r[0] @ r[1] / jnp.linalg.norm(r[0]) / jnp.linalg.norm(r[1]))
              for r in (rows, down)]
    assert cosine[1] < cosine[0]


# Sizes


def test_match_sets_the_width_from_the_many_expert_autoencoder():
    sizes = dict(latents=4096, experts=16, active=2, k=32)
    widths = {
        match: build(preset("topk", **sizes, match=match), D).latents
        for match in ("active", "width")
    }
    assert widths == {"active": 512, "width": 4096}
    assert preset("topk", **sizes).match == "active"
    regrouped = preset("switch", **sizes, match="active")
    assert (regrouped.experts, regrouped.active, regrouped.latents) == (8, 1, 4096)
    kept = preset("switch", **sizes, match="width")
    assert (kept.experts, kept.active, kept.latents) == (16, 1, 4096)
    assert preset("paper", **sizes, match="active") == preset("paper", **sizes)


def test_sizes_and_options_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="one dictionary; set experts and active to 1"):
        build(SAEConfig(architecture="topk"), D)
    with pytest.raises(UserError, match="measured by experiments.train"):
        build(SAEConfig(architecture="topk", match="time"), D)
    for match in ("active", "width", "time"):
        with pytest.raises(UserError, match=f"match = '{match}' .* 'scale' has experts"):
            build(SAEConfig(match=match), D)
    with pytest.raises(UserError, match="cannot be regrouped"):
        preset("switch", latents=60, experts=15, active=2, k=4, match="active")
    with pytest.raises(UserError, match="is for one dictionary"):
        preset("paper", latents=64, experts=4, active=2, k=4, match="time")
    with pytest.raises(UserError, match="architecture = 'sigmoid' is unknown"):
        build(SAEConfig(architecture="sigmoid"), D)


def test_prefixes_double_up_to_the_dictionary():
    assert prefix_sizes(4096, 5) == [256, 512, 1024, 2048, 4096]
    assert prefix_sizes(6, 9) == [1, 3, 6]


def test_every_preset_is_a_good_config():
    from scale_sae_jax.config import ActivationsConfig, Config

    for name in PRESETS:
        sae = preset(name, latents=64, experts=4, active=0, k=4)
        check(Config(activations=ActivationsConfig(path="acts.npy"), sae=sae))


# SAELens, where it is installed (extra `peers`)


@pytest.mark.parametrize("name", ("topk", "gated"))
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_gives_the_same_codes_and_reconstruction(name):
    sae_lens = pytest.importorskip("sae_lens")
    import torch

    config = config_of(name)
    sae, params, x, _ = setting(config)
    p = double(params)
    common = dict(d_in=D, d_sae=L, apply_b_dec_to_input=True, dtype="float32", device="cpu")
    tensors = {"W_enc": p["w_enc"].T, "W_dec": p["w_dec"], "b_dec": p["b_dec"]}
    if name == "topk":
        theirs = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(k=K, **common))
        tensors["b_enc"] = p["scale"] * p["b_enc"]
    else:
        theirs = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**common))
        tensors |= {"b_gate": p["scale"] * p["b_enc"], "b_mag": p["scale"] * p["b_mag"]}
        tensors["r_mag"] = p["r_mag"]
    theirs.load_state_dict({n: torch.tensor(t, dtype=torch.float32) for n, t in tensors.items()})
    with torch.no_grad():
        codes = theirs.encode(torch.tensor(x))
        codes = (codes.to_dense() if codes.is_sparse else codes).numpy()
        x_hat = theirs.decode(theirs.encode(torch.tensor(x))).numpy()
    ours = sae.encode(params, x)
    dense = np.zeros((T, L), np.float32)
    np.add.at(dense, (np.arange(T)[:, None], np.asarray(ours.ids)), np.asarray(ours.values))
    np.testing.assert_allclose(dense, codes, atol=1e-5 * np.abs(codes).max())
    np.testing.assert_allclose(sae.decode(params, ours), x_hat, atol=1e-5 * np.abs(x_hat).max())


@pytest.mark.parametrize("name", [*PLAIN, *range(len(MIXTURES))])
def test_no_activations_have_no_codes(name):
    sae, params, x = plain(name) if name in PLAIN else experts(**MIXTURES[name])
    slots = sae.encode(params, x).values.shape[-1]
    for leading in ((0,), (2, 0)):
        nothing = np.zeros((*leading, x.shape[-1]), np.float32)
        codes = sae.encode(params, nothing)
        assert codes.values.shape == codes.ids.shape == (*leading, slots)
        assert sae.decode(params, codes).shape == nothing.shape
        assert jax.jit(sae.reconstruct)(params, nothing).shape == nothing.shape
        assert sae.route(params, nothing).probs.shape == (*leading, sae.experts)


OTHER = dict(
    gate="one", gate_at="code", feature_scaling="gain", load_balance=0.5,
    load_balance_from="selected", balance_rate=0.1, input_scale=True, tie_biases=True,
    topk_scope="batch", auxk_weight=0.5, auxk_latents=3, penalty=2.5, penalty_rate=0.3,
    l0_loss="tanh", bandwidth=0.2, prefixes=2,
)


def program(config):
    """What the start, the loss and its gradient compute, as text."""
    sae = build(config, D)
    x, dead = jnp.ones((T, D)), jnp.zeros(sae.latents, bool)

    def start_and_loss(key, x, dead):
        params = sae.init(key, x)
        return params, jax.value_and_grad(lambda p: sae.loss(p, x, dead).total)(params), (
            sae.loss(params, x, dead).tracked
        )

    jaxpr = str(jax.make_jaxpr(start_and_loss)(jax.random.key(0), x, dead))
    return re.sub(r" at 0x[0-9a-f]+", "", jaxpr)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_say_which_options_they_have(name):
    """Each changes the program, and all others together do not."""
    many = name == "scale"
    config = SAEConfig(
        architecture=name, latents=L, experts=5 if many else 1, active=2 if many else 1, k=4
    )
    steered = dataclasses.replace(config, l0_loss="tanh")  # jumprelu has a penalty_rate with it
    own, same = ARCHITECTURES[name].options, program(config)
    for option in own:
        base = steered if option == "penalty_rate" else config
        changed = dataclasses.replace(base, **{option: OTHER[option]})
        assert program(changed) != program(base), option
    others = {option: value for option, value in OTHER.items() if option not in own}
    changed = dataclasses.replace(config, **others)
    assert program(changed) == same
    assert without_effect(changed) == sorted(others) and without_effect(config) == []
