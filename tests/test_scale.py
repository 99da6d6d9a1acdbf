"""The many-expert autoencoder against the dense reference, in value and gradient."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.config import CHOICES, SAEConfig
from scale_sae_jax.sae import build, gathered, kernels, reference
from scale_sae_jax.sae.presets import PRESETS, preset

WIDTH = 12
MANY_EXPERTS = [name for name, options in PRESETS.items() if "architecture" not in options]
SMALL = SAEConfig(latents=40, experts=5, active=2, k=6, auxk_latents=4)


def random_params(sae, seed=0):
    """Parameters away from their starting values, so that every option matters."""
    params = sae.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)]
    return jax.tree.unflatten(tree, noisy)


def setting(config, tokens=24, seed=0):
    sae = build(config, WIDTH)
    params = random_params(sae, seed)
    x = jax.random.normal(jax.random.key(seed + 2), (tokens, WIDTH)) * 2
    dead = jax.random.bernoulli(jax.random.key(seed + 3), 0.3, (config.latents,))
    return sae, params, x, dead


def dense(codes, latents):
    out = np.zeros((codes.values.shape[0], latents), np.float32)
    np.add.at(out, (np.arange(len(out))[:, None], np.asarray(codes.ids)), np.asarray(codes.values))
    return out


def assert_close(a, b, tolerance=1e-5):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= tolerance * max(1e-6, np.abs(b).max())


def assert_matches_reference(config, seed=0):
    sae, params, x, dead = setting(config, seed=seed)

    @jax.jit
    def both(p):
        def ours(p):
            loss = sae.loss(p, x, dead)
            return loss.total, loss.firing

        def theirs(p):
            codes = reference.forward(config, p, x).codes
            return reference.loss(config, p, x, dead), (codes != 0).sum(0)

        return [jax.value_and_grad(f, has_aux=True)(p) for f in (ours, theirs)]

    ((loss, firing), grads), ((expected_loss, expected_firing), expected_grads) = both(params)
    assert_close(loss, expected_loss)
    np.testing.assert_array_equal(firing, expected_firing)
    for name in set(grads) - {"threshold", "balance"}:
        assert_close(grads[name], expected_grads[name])


OPTIONS = [
    dataclasses.replace(SMALL, **{name.removeprefix("sae."): value})
    for name, values in CHOICES.items()
    if name.startswith("sae.") and name not in ("sae.dtype", "sae.match", "sae.l0_loss")
    for value in values
]
CROSSED = [
    dataclasses.replace(SMALL, gate=gate, gate_at=at, topk_scope=scope)
    for gate, at, scope in itertools.product(("renorm", "prob"), ("code",), ("batch", "expert"))
]
SWITCHES = [
    dataclasses.replace(SMALL, **change)
    for change in (
        {"encoder_bias": False},
        {"tie_biases": True},
        {"auxk": False},
        {"active": 1},
        {"active": 5},
        {"experts": 1, "active": 1},
        {"k": 16},
        {"balance_rate": 0.1},
        {"input_scale": True},
        {"input_scale": True, "topk_scope": "batch", "feature_scaling": "mean_lp"},
    )
]


@pytest.mark.parametrize("config", OPTIONS + CROSSED + SWITCHES, ids=str)
def test_option_matches_reference(config):
    assert_matches_reference(config)


@pytest.mark.optimised
@pytest.mark.parametrize("name", MANY_EXPERTS)
def test_preset_matches_reference(name):
    config = preset(name, latents=40, experts=5, active=0, k=6)
    assert_matches_reference(dataclasses.replace(config, auxk_latents=4))


@pytest.mark.parametrize("name", MANY_EXPERTS)
def test_decode_encode_is_reconstruct_and_inference_matches_reference(name):
    config = preset(name, latents=40, experts=5, active=0, k=6)
    config = dataclasses.replace(config, topk_scope="token")  # 'batch' has its own test
    sae, params, x, _ = setting(config)
    expected = jax.jit(lambda p: reference.forward(config, p, x).x_hat)(params)
    assert_close(jax.jit(sae.reconstruct)(params, x), expected)
    stacked = sae.encode(params, x.reshape(2, 12, WIDTH))
    flat = sae.encode(params, np.asarray(x, np.float16).astype(np.float32))
    assert stacked.values.shape == (2, 12, 6)
    assert sae.decode(params, stacked).shape == (2, 12, WIDTH)
    assert flat.ids.dtype == jnp.int32


@pytest.mark.parametrize("name", MANY_EXPERTS)
def test_gradient_for_the_activations_matches_reference(name):
    """Training never asks for it, attribution through a spliced model does."""
    config = preset(name, latents=40, experts=5, active=0, k=6)
    config = dataclasses.replace(config, topk_scope="token")  # 'batch' has its own test
    sae, params, x, _ = setting(config)

    def objective(reconstruct, x):
        return jnp.sin(reconstruct(x)).sum()

    ours = jax.jit(jax.grad(lambda x: objective(lambda x: sae.reconstruct(params, x), x)))(x)
    theirs = jax.jit(
        jax.grad(lambda x: objective(lambda x: reference.forward(config, params, x).x_hat, x))
    )(x)
    assert np.abs(theirs).max() > 1e-2
    assert_close(ours, theirs)


@pytest.mark.parametrize("gathered, scattered", ((0, 0), (0, 100), (100, 100)))
def test_every_way_of_decoding_matches_reference(gathered, scattered, monkeypatch):
    """Rows gathered and scattered, gathered and multiplied, multiplied both ways."""
    kernel = kernels.KERNELS["loop"]._replace(gathered_row=gathered, scattered_row=scattered)
    monkeypatch.setitem(kernels.KERNELS, "loop", kernel)
    for scope in CHOICES["sae.topk_scope"]:
        assert_matches_reference(dataclasses.replace(SMALL, topk_scope=scope))


@pytest.mark.parametrize("tokens", (1, 5, 1000))
def test_rows_scattered_in_chunks_match_reference(tokens, monkeypatch):
    """Chunks of one token, chunks of which the last is not full, and all tokens at once."""
    in_chunks = partial(gathered.scatter, tokens * SMALL.k * WIDTH)
    kernel = kernels.KERNELS["loop"]._replace(
        gathered_row=0, scattered_row=0, scatter=in_chunks
    )
    monkeypatch.setitem(kernels.KERNELS, "loop", kernel)
    assert_matches_reference(SMALL)


def test_bfloat16_is_near_float32():
    sae, params, x, dead = setting(SMALL)
    rounded = build(dataclasses.replace(SMALL, dtype="bfloat16"), WIDTH)
    loss, near = (s.loss(params, x, dead) for s in (sae, rounded))
    assert rounded.encode(params, x).values.dtype == jnp.float32
    assert loss.mse != near.mse
    assert abs(near.mse / loss.mse - 1) < 0.02


def temporaries(tokens, experts, size=32, width=32):
    """Bytes that XLA sets aside for one forward and backward pass, the gradients apart."""
    config = SAEConfig(latents=experts * size, experts=experts, active=2, k=4)
    sae = build(config, width)
    params = jax.eval_shape(sae.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    gradient = jax.jit(jax.grad(lambda p, x: sae.loss(p, x, None).total))
    return gradient.lower(params, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.optimised
def test_memory_grows_with_the_active_width_not_with_the_dictionary():
    """No [T, N m] array: that alone would be 2.1 MB for 64 experts and 512 tokens."""
    few, many, long = temporaries(512, 4), temporaries(512, 64), temporaries(2048, 64)
    assert many - few < 4 * 512 * 64 * 32 / 2
    assert many < 4 * 512 * 64 * 32
    gradients = 4 * 2 * 64 * 32 * 32  # bytes, where temporaries stand before they do
    assert long + gradients < 4 * (many + gradients)


@pytest.mark.optimised
def test_memory_is_four_arrays_of_the_active_width_and_the_gathered_inputs():
    tokens, size, width = 1024, 96, 192
    bound = 4 * (4 * tokens * 2 * size + tokens * 2 * width)
    assert temporaries(tokens, 16, size, width) <= bound


def test_one_expert_with_weight_one_gets_no_router_gradient():
    """Why e = 1 fails in the published code, and why gate='prob' does not."""
    base = dataclasses.replace(SMALL, active=1, load_balance=0.0, auxk=False)
    norms = {}
    for gate in CHOICES["sae.gate"]:
        sae, params, x, dead = setting(dataclasses.replace(base, gate=gate))
        grads = jax.jit(jax.grad(lambda p: sae.loss(p, x, dead).total))(params)
        norms[gate] = float(jnp.abs(grads["w_router"]).max())
    assert norms["prob"] > 1e-2
    assert all(norms[gate] < 1e-5 * norms["prob"] for gate in norms if gate != "prob")


def test_ties_go_to_the_lower_id_and_never_exceed_k():
    sae, params, x, dead = setting(SMALL)
    params = params | {
        "w_enc": jnp.zeros_like(params["w_enc"]),
        "b_enc": jnp.ones_like(params["b_enc"]),
    }
    codes = sae.encode(params, x)
    routed = sae.route(params, x)
    size = SMALL.latents // SMALL.experts
    expected = np.asarray(routed.experts)[:, :1] * size + np.arange(SMALL.k)
    assert (np.sort(np.asarray(codes.ids), -1) == expected).all()
    assert (np.asarray(codes.values) > 0).all()


def test_zero_latents_are_not_active():
    sae, params, x, _ = setting(SMALL)
    params = params | {"b_enc": jnp.full_like(params["b_enc"], -100.0)}
    codes = sae.encode(params, x)
    assert (codes.values == 0).all()
    assert_close(sae.decode(params, codes), jnp.broadcast_to(params["b_dec"], x.shape))


def test_batch_scope_has_a_threshold_at_inference():
    config = dataclasses.replace(SMALL, topk_scope="batch")
    sae, params, x, dead = setting(config)
    params = params | {"threshold": jnp.zeros(())}  # no batch seen yet
    loss = sae.loss(params, x, dead)
    assert 0 < int(loss.firing.sum()) <= config.k * len(x)
    params = params | {"threshold": loss.tracked["threshold"] - 1e-6}
    expected = jax.jit(lambda p: reference.forward(config, p, x).codes)(params)
    assert_close(dense(sae.encode(params, x), config.latents), expected)
    assert_close(dense(sae.encode(params, x[:1]), config.latents), expected[:1])


@settings(max_examples=8, deadline=None)
@given(
    experts=st.integers(1, 6),
    size=st.integers(1, 7),
    tokens=st.integers(1, 9),
    data=st.data(),
)
def test_any_shape_matches_reference(experts, size, tokens, data):
    active = data.draw(st.integers(1, experts))
    k = data.draw(st.integers(1, active * size))
    config = SAEConfig(latents=experts * size, experts=experts, active=active, k=k)
    sae, params, x, dead = setting(config, tokens=tokens, seed=k)
    out, ours, codes, loss = jax.jit(
        lambda p: (
            sae.loss(p, x, dead),
            sae.encode(p, x),
            reference.forward(config, p, x).codes,
            reference.loss(config, p, x, dead),
        )
    )(params)
    assert_close(dense(ours, config.latents), codes, 1e-4)
    assert_close(out.total, loss, 1e-4)
    assert int((ours.values != 0).sum(-1).max()) <= k


def test_experts_are_the_most_probable_where_float32_makes_probabilities_zero():
    config = SAEConfig(latents=16, experts=4, active=2, k=2)
    sae = build(config, 4)
    params = sae.init(jax.random.key(0)) | {"w_router": jnp.eye(4)}
    x = jnp.array([[0.0, 100, 150, 300]])
    routing = sae.route(params, x)
    assert routing.probs[0, 2] == 0
    assert routing.experts.tolist() == [[2, 3]]
    assert np.flatnonzero(reference.forward(config, params, x).selected[0]).tolist() == [2, 3]


def test_balance_follows_the_load_and_evens_it_out():
    """Without an auxiliary loss: a bias on the choice of experts, not on their weights."""
    config = dataclasses.replace(SMALL, active=1, load_balance=0.0, balance_rate=0.05, auxk=False)
    sae, params, x, _ = setting(config, tokens=400)
    params["w_router"] = params["w_router"] * 0.3
    params["c_router"] = jnp.asarray([2.0, 1.0, 0.0, 0.0, -1.0])
    params["balance"] = jnp.zeros(5)
    step = jax.jit(lambda p: sae.loss(p, x, None))
    first = loss = step(params)
    for _ in range(200):
        expected = params["balance"] + 0.05 * jnp.sign(0.2 - loss.expert_load)
        np.testing.assert_allclose(loss.tracked["balance"], expected, atol=1e-6)
        params = params | loss.tracked
        loss = step(params)
    assert float(first.expert_load.max()) > 0.5
    assert float(loss.expert_load.max()) < 0.3 and float(loss.expert_load.min()) > 0.1
    without = params | {"balance": jnp.zeros(5)}
    np.testing.assert_array_equal(*(sae.route(p, x).probs for p in (params, without)))
