"""Experts and tokens on meshes of 8 forced devices: the same numbers as on one."""

import dataclasses
import re
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import sums_of_three

import scale_sae_jax
import scale_sae_jax.run
import scale_sae_jax.training.interrupts
from scale_sae_jax.config import ActivationsConfig, Config, OptimConfig, SAEConfig, TextConfig
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel.experts import ShardedAutoencoder, on_mesh
from scale_sae_jax.parallel.mesh import (
    EVERYWHERE,
    TOKENS,
    make_mesh,
    param_specs,
    parse_mesh,
    placed,
)
from scale_sae_jax.run import run
from scale_sae_jax.sae import build, kernels, selection
from scale_sae_jax.sae.shards import Shards
from scale_sae_jax.training import state
from scale_sae_jax.training.loop import train
from scale_sae_jax.training.optim import optimiser

MESHES = ("data:8", "expert:8", "data:2,expert:4", "data:4,expert:2")
D, T = 24, 64
SAE = SAEConfig(latents=256, experts=8, active=2, k=6, auxk_latents=16, load_balance=0.3)
OPTIONS = {
    "paper": {},
    "batch": {"topk_scope": "batch", "input_scale": True, "gate_at": "code"},
    "expert": {"topk_scope": "expert", "feature_scaling": "gain", "balance_rate": 0.01},
    "authors": {"gate": "softmax_probs", "gate_at": "code", "feature_scaling": "mean_lp",
                "load_balance_from": "selected", "tie_biases": True},
}
RUN = Config(
    mesh="data:1,expert:1", steps=20, batch_size=64, steps_per_call=4, log_every=10,
    checkpoint_every=10, optim=OptimConfig(lr=1e-3),
    sae=SAEConfig(latents=64, experts=8, active=2, k=4, auxk_latents=8, dead_after=200),
)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """A run on an array of sums of three of 24 directions."""
    path = tmp_path_factory.mktemp("array") / "x.npy"
    np.save(path, sums_of_three(1024))
    activations = ActivationsConfig(path=str(path))
    text = TextConfig(heldout_fraction=0.25)
    return dataclasses.replace(RUN, activations=activations, text=text)


def on(spec, sae, params):
    """The autoencoder and its parameters on a mesh."""
    mesh = make_mesh(spec, sae.experts)
    return on_mesh(sae, mesh), jax.device_put(
        params, placed(mesh, param_specs(params, sae.module.by_expert))
    )


def start(config):
    """An autoencoder, parameters off their starting values, and a batch with dead latents."""
    sae = build(config, D)
    x = np.asarray(jax.random.normal(jax.random.key(1), (T, D)))
    params = sae.init(jax.random.key(0), jnp.asarray(x))
    moved = {name: params[name] + 0.1 for name in ("omega", "b_enc") if name in params}
    return sae, params | moved, x, np.arange(sae.latents) % 3 == 0


def loss_and_gradient(sae, params, x, dead):
    def objective(params):
        loss = sae.loss(params, x, dead)
        return loss.total, loss

    (_, loss), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return jax.device_get((loss, gradient))


def assert_close(ours, theirs, tolerance=1e-5):
    """Each leaf to `tolerance` of its largest value."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6), (a, b)


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_gradients_and_codes_are_those_of_one_device(option):
    """On all meshes for the paper's options, on the mixed one for the others."""
    sae, params, x, dead = start(dataclasses.replace(SAE, **OPTIONS[option]))
    expected = loss_and_gradient(sae, params, x, dead)
    assert expected[0].terms["auxk"] > 0
    codes, routing = jax.jit(sae.encode)(params, x), sae.route(params, x)
    dense = np.zeros((T, sae.latents))
    np.add.at(dense, (np.arange(T)[:, None], codes.ids), codes.values)
    for spec in MESHES if option == "paper" else MESHES[2:3]:
        sharded, placed_params = on(spec, sae, params)
        assert isinstance(sharded, ShardedAutoencoder)
        assert_close(loss_and_gradient(sharded, placed_params, x, dead), expected)
        found = jax.jit(sharded.encode)(placed_params, x)
        theirs = np.zeros((T, sae.latents))
        np.add.at(theirs, (np.arange(T)[:, None], found.ids), found.values)
        assert_close(theirs, dense)
        assert_close(jax.jit(sharded.decode)(placed_params, found), sae.decode(params, codes))
        assert_close(sharded.route(placed_params, x), routing)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_every_kernel_leaves_other_devices_pairs_out(kernel):
    sae, params, x, dead = start(dataclasses.replace(SAE, kernel=kernel))
    expected = loss_and_gradient(sae, params, x, dead)
    sharded, placed_params = on("data:2,expert:4", sae, params)
    assert_close(loss_and_gradient(sharded, placed_params, x, dead), expected)
    codes = jax.jit(sae.encode)(params, x)

    def decoder_gradient(sae, params):
        return jax.jit(jax.grad(lambda p: (x * sae.decode(p, codes)).sum()))(params)["w_dec"]

    assert_close(decoder_gradient(sharded, placed_params), decoder_gradient(sae, params))


def test_all_tokens_may_go_to_the_experts_of_one_device():
    sae, params, x, dead = start(SAE)
    params["c_router"] = params["c_router"].at[jnp.array([2, 3])].set(50.0)
    expected = loss_and_gradient(sae, params, x, dead)
    assert expected[0].expert_load.tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    assert_close(loss_and_gradient(*on("data:2,expert:4", sae, params), x, dead), expected)


@pytest.mark.parametrize("name", ("topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu"))
def test_one_dictionary_splits_its_batch(name):
    """What travels are gradients and counts, none of it larger than the dictionary."""
    config = SAEConfig(architecture=name, latents=64, experts=1, active=1, k=4)
    sae, params, x, dead = start(config)
    expected = loss_and_gradient(sae, params, x, dead)
    sharded, everywhere = on("", sae, params)
    assert dict(sharded.mesh.shape) == {"data": 8, "expert": 1}
    assert_close(loss_and_gradient(sharded, everywhere, x, dead), expected)
    codes, found = sae.encode(params, x), sharded.encode(everywhere, x)
    assert_close(found, codes)
    assert_close(sharded.decode(everywhere, found), sae.decode(params, codes))

    def gradient(params, x):
        return jax.grad(lambda params: sharded.loss(params, x, dead).total)(params)

    split = jax.device_put(np.tile(x, (64, 1)), placed(sharded.mesh, TOKENS))
    text = jax.jit(gradient).lower(everywhere, split).compile().as_text()
    assert max(sizes(text, "all-reduce")) == 64 * D
    assert not sizes(text, "all-to-all|collective-permute")
    assert max(sizes(text, "all-gather"), default=0) <= 8  # counts before a tie, by device


WINNERS = jax.jit(
    lambda acts, most: jax.shard_map(
        lambda acts, most: selection.batch_winners_of_all(acts, most, Shards(4, 2)),
        mesh=make_mesh("data:4,expert:2", 2),
        in_specs=(TOKENS, EVERYWHERE),
        out_specs=TOKENS,
        check_vma=False,
    )(acts, most)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0]), min_size=16, max_size=16), st.integers(1, 4))
def test_winners_over_devices_are_the_most_there_can_be(values, k):
    """Ties may fall to another token than on one device; number and values may not differ."""
    acts = np.array(values, np.float32).reshape(8, 2)
    winners = WINNERS(acts, 4 * k)
    expected = np.sort(np.asarray(values))[::-1][: 4 * k]
    found = np.sort(acts[np.asarray(winners)])[::-1]
    np.testing.assert_array_equal(found, expected[expected > 0])


def sizes(text, collectives):
    """Elements of each result of such collectives in a compiled program."""
    shapes = re.findall(rf"= (.*?) (?:{collectives})\(", text)
    return [int(np.prod([int(n) for n in dims.split(",") if n]))
            for shape in shapes for dims in re.findall(r"\w+\[([\d,]*)\]", shape)]


def test_weights_of_experts_never_travel():
    """No collective of the compiled step moves more than a fraction of an expert's weights."""
    config = dataclasses.replace(SAE, latents=8192, auxk=False)  # 8 experts of 1024 x 24
    sae, params, x, _ = start(config)
    sharded, placed_params = on("data:2,expert:4", sae, params)

    def objective(params, x):
        return sharded.loss(params, x, None).total

    compiled = jax.jit(jax.value_and_grad(objective)).lower(placed_params, x).compile()
    text = compiled.as_text()
    moved = sizes(text, "all-gather|all-to-all|collective-permute")
    assert moved and max(moved) < config.latents // config.experts * D
    # What is summed over `data` are gradients, on each device of its own experts only.
    assert max(sizes(text, "all-reduce")) == config.latents // 4 * D


@pytest.fixture(scope="module")
def one_device(run_config, tmp_path_factory):
    """20 steps on one device."""
    folder = tmp_path_factory.mktemp("one")
    return run(run_config, folder, Event()), scale_sae_jax.load(folder)[1]


@pytest.mark.parametrize("spec", MESHES)
def test_twenty_steps_end_at_the_parameters_of_one_device(
    spec, run_config, one_device, tmp_path
):
    results, params = one_device
    ours = run(dataclasses.replace(run_config, mesh=spec), tmp_path, Event())
    assert_close(scale_sae_jax.load(tmp_path)[1], params)
    for name in ("fvu", "l0", "dead", "load_cv"):
        assert ours[name] == pytest.approx(results[name], rel=1e-4), name


def test_a_run_goes_on_on_other_meshes(run_config, one_device, tmp_path):
    """8 devices for a while, then 2, then 1."""
    _, params = one_device
    for spec, until in (("data:2,expert:4", 7), ("expert:2", 13), ("data:1,expert:1", 20)):
        stop = Event()

        class Watch(Console):
            def step(self, record, total, until=until, stop=stop):
                if record["step"] >= until:
                    stop.set()

        config = dataclasses.replace(run_config, mesh=spec, log_every=1, checkpoint_every=1)
        if until < RUN.steps:
            with pytest.raises(scale_sae_jax.training.interrupts.Interrupted):
                run(config, tmp_path, stop, Watch())
        else:
            run(config, tmp_path, stop)
    assert_close(scale_sae_jax.load(tmp_path)[1], params)
    mesh = make_mesh("data:2,expert:4", 8)
    sae, on_eight = scale_sae_jax.load(tmp_path, mesh=mesh)
    assert on_eight["w_enc"].sharding.shard_shape(on_eight["w_enc"].shape)[0] == 2
    x = np.ones((8, 16), np.float32)
    assert_close(sae.reconstruct(on_eight, x), one_reconstruction(tmp_path, x))


def one_reconstruction(folder, x):
    sae, params = scale_sae_jax.load(folder)
    return sae.reconstruct(params, x)


def test_each_device_holds_its_share_of_parameters_moments_and_counters():
    sae = build(SAE, D)
    tx = optimiser(OptimConfig(), SAE.latents, 10, SAE.decoder_norm)
    mesh = make_mesh("data:2,expert:4", 8)
    target = state.abstract(sae, tx, OptimConfig(), mesh)
    for leaf in (target.params["w_enc"], target.params["w_dec"], target.opt_state[2].mu["w_enc"],
                 target.opt_state[2].nu["b_enc"], target.params["omega"], target.since_fired):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // 4
    assert target.params["w_router"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("spec", "experts", "sizes"),
    [
        ("", 16, (1, 8)),
        ("", 12, (2, 4)),
        ("", 1, (8, 1)),
        ("data:-1,expert:2", 16, (4, 2)),
        ("expert:-1", 16, (1, 8)),
        ("data:2", 16, (2, 1)),
    ],
)
def test_mesh_by_its_text(spec, experts, sizes):
    assert tuple(parse_mesh(spec, experts, 8).values()) == sizes
    assert tuple(make_mesh(spec, experts).shape.values()) == sizes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data", "is not understood"),
        ("data:2,data:4", "is not understood"),
        ("model:2", "is not understood"),
        ("data:-1,expert:-1", "one of them may be -1"),
        ("data:0", "at least 1"),
        ("data:-2", "at least 1"),
        ("data:16", "does not fit 8 devices"),
        ("expert:8", "6 experts cannot be split over 8 devices: take expert:2"),
    ],
)
def test_meshes_that_cannot_be_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        make_mesh(spec, 6)


def test_batches_that_do_not_split_are_refused(run_config, tmp_path):
    config = dataclasses.replace(run_config, mesh="", batch_size=60)
    with pytest.raises(UserError, match="batch_size = 60 cannot be split over 8 devices: take 64"):
        run(config, tmp_path, Event())
    assert not list(tmp_path.iterdir())  # before any work
    sae, params, x, _ = start(SAE)
    sharded, there = on("data:2,expert:4", sae, params)
    with pytest.raises(UserError, match="batch of 3 activations cannot be split over 8 devices"):
        sharded.loss(there, x[:3], None)
    assert_close(sharded.reconstruct(there, x[:3]), sae.reconstruct(params, x[:3]))


def test_processes_share_what_the_others_read(tmp_path):
    """Each device's rows are read for themselves."""
    asked = []

    class Rows:
        n, d, mean = 512, 16, np.zeros(16, np.float32)

        def rows(self, ids):
            asked.append(len(ids))
            return np.random.default_rng(int(ids[0])).normal(size=(len(ids), 16)).astype(np.float32)

    config = dataclasses.replace(RUN, mesh="data:2,expert:4", steps=1)
    train(config, Rows(), tmp_path, Event())
    assert set(asked) == {64 // 8}
