"""Runs that train in one vmapped step: each takes the steps that it takes alone."""

import dataclasses
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import sums_of_three
from test_stream import config_of as on_a_stream
from test_stream import stream_of
from test_training import BATCH, CONFIG, ROWS, SAE, Rows, leaves, records

import scale_sae_jax
from scale_sae_jax import workdir as folders
from scale_sae_jax.activations.synthetic import open_synthetic
from scale_sae_jax.config import OptimConfig, SyntheticConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import build, kernels, selection
from scale_sae_jax.training.loop import train
from scale_sae_jax.training.together import shape, train_together

ONE = {"experts": 1, "active": 1}
ARCHITECTURES = {
    "scale": {},
    "top-k in each expert": {"topk_scope": "expert"},
    "top-k over the batch": {"topk_scope": "batch"},
    "topk": {"architecture": "topk", **ONE},
    "batchtopk": {"architecture": "batchtopk", **ONE},
    "matryoshka": {"architecture": "matryoshka", **ONE},
    "jumprelu": {"architecture": "jumprelu", **ONE},
    "gated": {"architecture": "gated", **ONE},
    "relu": {"architecture": "relu", **ONE},
}


@pytest.fixture(scope="module")
def activations():
    return Rows(sums_of_three(ROWS))


def configs_of(runs=2, **sae):
    """Runs that differ in all that they may, some of whose latents die."""
    sae = dataclasses.replace(SAE, dead_after=2 * BATCH, **sae)
    differ = ((1, 3e-3, 8), (-3, 1e-3, 2), (3, 3e-3, 4), (4, 2e-3, 8))[:runs]
    return [
        dataclasses.replace(
            CONFIG, seed=seed, sae=dataclasses.replace(sae, k=k), optim=OptimConfig(lr=lr)
        )
        for seed, lr, k in differ
    ]


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """Lets runs see so many devices; one, to begin with."""

    def see(count):
        monkeypatch.setattr(jax, "device_count", lambda: count)

    see(1)
    return see


def folders_of(configs, folder):
    made = [folder / str(place) for place in range(len(configs))]
    for config, here in zip(configs, made, strict=True):
        folders.claim(config, here)
    return made


def together(configs, activations, folder):
    """Trains in company; returns the folders and the final states, as `train` finds them."""
    own = folders_of(configs, folder)
    assert train_together(configs, activations, folder / "group", own, Event())
    found = [
        train(config, activations, here, Event())
        for config, here in zip(configs, own, strict=True)
    ]
    assert all(summary.finished for summary in found)
    return own, [summary.state for summary in found]


def assert_near(ours, theirs):
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def assert_equal(ours, theirs):
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_takes_the_steps_that_it_takes_alone(name, activations, tmp_path):
    configs = configs_of(**ARCHITECTURES[name])
    assert shape(configs[0]) == shape(configs[1])
    own, states = together(configs, activations, tmp_path)
    for config, folder, state in zip(configs, own, states, strict=True):
        alone = tmp_path / f"alone-{folder.name}"
        folders.claim(config, alone)
        assert_near(state, train(config, activations, alone, Event()).state)
        lines = records(folder)
        assert [line.pop("together") for line in lines] == len(lines) * [2]
        for ours, theirs in zip(lines, records(alone), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        if build(config.sae, 16).sparse_codes:
            assert 0.9 * config.sae.k < lines[-1]["l0"] <= config.sae.k
        if build(config.sae, 16).revives and config.sae.k == 2:
            assert lines[-1]["dead"] > 0
    sae, params = scale_sae_jax.load(own[1])
    assert sae.k == 2 and np.isfinite(sae.reconstruct(params, activations.data[:3])).all()


def test_parameters_in_bfloat16_are_rounded_as_alone(activations, tmp_path):
    """By the same draws: the ones that differ were on the edge between two."""
    narrow = {"param_dtype": "bfloat16", "moment_dtype": "bfloat16"}
    configs = [
        dataclasses.replace(config, steps=4, optim=dataclasses.replace(config.optim, **narrow))
        for config in configs_of()
    ]
    _, (state, _) = together(configs, activations, tmp_path)
    alone = tmp_path / "alone"
    folders.claim(configs[0], alone)
    other = train(configs[0], activations, alone, Event()).state
    for name in ("w_enc", "w_dec"):
        ours, theirs = (np.asarray(s.params[name], np.float32) for s in (state, other))
        assert state.params[name].dtype == jnp.bfloat16
        assert (ours == theirs).mean() > 0.99
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=2e-3)


def test_runs_are_spread_over_devices(activations, tmp_path, devices):
    configs = configs_of(4)
    _, on_one = together(configs, activations, tmp_path / "one")
    devices(2)
    _, on_two = together(configs, activations, tmp_path / "two")
    assert_near(on_two, on_one)
    seen = []
    devices(3)
    train_together(
        configs, activations, tmp_path / "group", folders_of(configs, tmp_path / "three"), Event(),
        lambda _: seen.extend(jax.live_arrays()),
    )
    shape_of_all = (4, *on_one[0].params["w_enc"].shape)
    (where,) = {len(a.sharding.device_set) for a in seen
                if not a.is_deleted() and a.shape == shape_of_all}
    assert where == 2  # as many as divide the runs


def test_runs_on_a_stream_share_the_batches_that_each_draws_alone(tmp_path):
    config = dataclasses.replace(on_a_stream(tmp_path), mesh="data:1,expert:1")
    assert shape(config) != shape(dataclasses.replace(config, seed=1))
    configs = [
        dataclasses.replace(
            config, sae=dataclasses.replace(config.sae, k=k), optim=OptimConfig(lr=lr)
        )
        for k, lr in ((2, 1e-3), (4, 3e-3))
    ]
    assert shape(configs[0]) == shape(configs[1])
    _, states = together(configs, stream_of(config, config.mesh), tmp_path)
    for place, own in enumerate(configs):
        alone = tmp_path / f"alone-{place}"
        folders.claim(own, alone)
        assert_near(states[place], train(own, stream_of(own, own.mesh), alone, Event()).state)


def test_runs_on_synthetic_activations_take_the_steps_that_they_take_alone(tmp_path):
    source, _ = open_synthetic(SyntheticConfig(features=64, d=16, roots=8, branching=2, depth=2))
    configs = configs_of()
    _, states = together(configs, source, tmp_path)
    (tmp_path / "alone").mkdir()
    assert_near(states[1], train(configs[1], source, tmp_path / "alone", Event()).state)


def test_stopped_and_resumed_is_bit_identical(activations, tmp_path):
    configs = configs_of()
    expected, whole = together(configs, activations, tmp_path / "whole")
    stop = Event()

    def show(record):
        if record["step"] == 6:
            stop.set()

    one_by_one = [dataclasses.replace(config, steps_per_call=1) for config in configs]
    broken = tmp_path / "broken"
    own = folders_of(configs, broken)
    assert not train_together(one_by_one, activations, broken / "group", own, stop, show)
    assert not any((folder / "checkpoints").exists() for folder in own)
    _, states = together(configs, activations, broken)
    assert_equal(states, whole)
    assert [records(folder) for folder in own] == [records(folder) for folder in expected]


def test_one_that_is_not_finite_is_left_out_and_fails_alone(activations, tmp_path):
    configs = configs_of()
    configs[1] = dataclasses.replace(configs[1], optim=OptimConfig(lr=1e30))
    own = folders_of(configs, tmp_path)
    assert train_together(configs, activations, tmp_path / "group", own, Event())
    assert [(folder / "checkpoints").exists() for folder in own] == [True, False]
    with pytest.raises(UserError, match="not finite"):
        train(configs[1], activations, own[1], Event())
    _, states = together(configs_of(), activations, tmp_path / "clean")
    assert_equal(train(configs[0], activations, own[0], Event()).state, states[0])


def test_none_that_is_finite_is_refused(activations, tmp_path):
    configs = configs_of()
    data = np.full_like(activations.data, np.nan)
    with pytest.raises(UserError, match="step 1: .* not finite"):
        train_together(
            configs, Rows(data), tmp_path / "group", folders_of(configs, tmp_path), Event()
        )


# Under jax.vmap


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_loss_and_gradients_of_several_are_those_of_each(kernel):
    """At any load: a large router sends all tokens to the same experts."""
    count, tokens, latents = 3, 20, 24
    sae = build(dataclasses.replace(
        SAE, latents=latents, experts=6, active=2, k=3, auxk_latents=4, kernel=kernel
    ), 16)

    def gradient(params, x, dead):
        return jax.value_and_grad(lambda p: sae.loss(p, x, dead).total)(params)

    start = jax.jit(jax.vmap(sae.init))
    several, one = jax.jit(jax.vmap(gradient)), jax.jit(gradient)

    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 999), st.sampled_from([1.0, 100.0]))
    def check(seed, steepness):
        key = jax.random.key(seed)
        x = jax.random.normal(key, (count, tokens, 16))
        dead = jax.random.bernoulli(key, 0.5, (count, latents))
        params = start(jax.random.split(key, count), x)
        params["w_router"] = params["w_router"].at[0].multiply(steepness)
        ours = several(params, x, dead)
        for place in range(count):
            theirs = one(jax.tree.map(lambda a: a[place], params), x[place], dead[place])
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a[place], b, rtol=1e-4, atol=1e-5)

    check()


def test_codes_of_one_batch_by_several_and_of_several_by_one(activations):
    sae = build(SAE, 16)
    x = jnp.asarray(activations.data[:40])
    params = jax.vmap(sae.init, (0, None))(jax.random.split(jax.random.key(0), 3), x)
    each = [jax.tree.map(lambda a, place=place: a[place], params) for place in range(3)]
    rebuilt = jax.vmap(sae.reconstruct, (0, None))(params, x)
    for ours, own in zip(rebuilt, each, strict=True):
        np.testing.assert_allclose(ours, sae.reconstruct(own, x), rtol=1e-5, atol=1e-5)
    batches = x.reshape(2, 2, 10, 16)
    nested = jax.vmap(jax.vmap(sae.reconstruct, (None, 0)), (None, 0))(each[0], batches)
    np.testing.assert_allclose(
        nested.reshape(40, 16), sae.reconstruct(each[0], x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("l0", (1, 2, 5))
def test_a_lower_l0_marks_the_first_winners_of_a_batch(l0):
    acts = jax.nn.relu(jax.random.normal(jax.random.key(0), (20, 64)))
    marked = selection.batch_winners(acts, 5, jnp.asarray(l0))
    np.testing.assert_array_equal(marked, selection.batch_winners(acts, l0))
