"""The training step against NumPy, and the loop: resuming, crashing, refusing NaN."""

import dataclasses
import json
from dataclasses import dataclass
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sums import sums_of_three

import scale_sae_jax
from scale_sae_jax import workdir as folders
from scale_sae_jax.activations.batches import batch_ids
from scale_sae_jax.config import Config, LMConfig, OptimConfig, SAEConfig, TextConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import build
from scale_sae_jax.sae.selection import THRESHOLD_DECAY
from scale_sae_jax.training import loop, metrics, precision, state
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.loop import _calls, longest_call, train
from scale_sae_jax.training.optim import optimiser, schedule
from scale_sae_jax.training.step import make_step, make_steps

WIDTH, ROWS, BATCH = 16, 320, 32
SAE = SAEConfig(latents=64, experts=4, active=2, k=4, auxk_latents=8, load_balance=0.1)
CONFIG = Config(
    mesh="data:1,expert:1",
    seed=3,
    steps=12,
    batch_size=BATCH,
    log_every=2,
    checkpoint_every=5,
    lm=LMConfig(path="model"),
    text=TextConfig(path="text.jsonl"),
    sae=SAE,
    optim=OptimConfig(lr=3e-3),
)


@dataclass(frozen=True)
class Rows:
    """Activations in memory."""

    data: np.ndarray

    n = property(lambda self: len(self.data))
    d = property(lambda self: self.data.shape[1])
    mean = property(lambda self: np.nan_to_num(self.data).mean(0))

    def rows(self, ids):
        return self.data[ids]


@pytest.fixture(scope="module")
def activations():
    return Rows(sums_of_three(ROWS))


def step_of(config, dead_after):
    """(sae, state, step function) of one setting."""
    sae = build(config, WIDTH)
    tx = optimiser(CONFIG.optim, config.latents, 100, config.decoder_norm)
    rate = schedule(CONFIG.optim, config.latents, 100)
    step = jax.jit(make_step(sae, tx, rate, dead_after))
    return sae, state.create(sae, tx, CONFIG.optim, 0), step


def leaves(train_state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(train_state)]


def records(folder):
    timing = ("seconds", "tokens_per_second")
    lines = metrics.read_lines(folder / "metrics.jsonl")
    return [{name: v for name, v in line.items() if name not in timing} for line in lines]


# Several steps


def test_steps_in_one_call_are_the_steps_one_by_one(activations):
    config = dataclasses.replace(SAE, topk_scope="batch")
    sae = build(config, WIDTH)
    tx = optimiser(CONFIG.optim, config.latents, 100, config.decoder_norm)
    rate = schedule(CONFIG.optim, config.latents, 100)
    steps = make_steps(sae, tx, rate, 50)
    batches = jnp.asarray(activations.data[: 4 * BATCH]).reshape(4, BATCH, WIDTH)
    mean = jnp.asarray(activations.mean)

    together, metrics_together = steps(state.create(sae, tx, CONFIG.optim, 0), batches, 3, mean)
    now = state.create(sae, tx, CONFIG.optim, 0)
    for batch in batches[:3]:
        now, values = steps(now, jnp.stack(4 * [batch]), 1, mean)
    assert int(together.step) == 3
    for ours, theirs in zip(leaves(together), leaves(now), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert {n: float(v) for n, v in metrics_together.items()} == {
        n: float(v) for n, v in values.items()
    }


@pytest.mark.parametrize("every", ((2, 5, 8), (3, 0, 4), (50, 50, 1)))
def test_calls_end_where_a_record_or_a_checkpoint_is_due(every):
    log, checkpoint, most = every
    config = dataclasses.replace(
        CONFIG, steps=12, log_every=log, checkpoint_every=checkpoint, steps_per_call=most
    )
    assert longest_call(config) == {2: 2, 3: 3, 50: 1}[log]
    for start in (0, 1, 7, 12):
        calls = list(_calls(config, start))
        steps = [step for first, last in calls for step in range(first, last)]
        assert steps == list(range(start, 12))
        assert all(last - first <= most for first, last in calls)
        ends = {last for _, last in calls}
        every = [count for count in (log, checkpoint) if count]
        due = {s for s in range(start + 1, 13) if any(s % count == 0 for count in every)}
        assert due <= ends and (start > 0 or 1 in ends)


def test_stochastic_rounding_is_to_a_neighbour_and_exact_on_average():
    x = jnp.asarray([1.0, 1 + 2**-9, -3.3, 1e-20, 0.0, jnp.inf, jnp.nan], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(precision.stochastic_round, (None, 0))(x, keys)
    assert draws.dtype == jnp.bfloat16
    draws = np.asarray(draws, np.float32)
    assert (draws[:, 0] == 1).all() and (draws[:, 4] == 0).all()
    assert set(draws[:, 1]) == {1.0, 1 + 2**-7}
    assert (draws[:, 5] == np.inf).all() and np.isnan(draws[:, 6]).all()
    np.testing.assert_allclose(draws[:, 1:4].mean(0), x[1:4], rtol=2e-4)
    assert all(len(set(column)) == 2 for column in draws[:, 1:4].T)


def test_bfloat16_everywhere_trains_to_the_fvu_of_float32(activations, tmp_path):
    """Products, parameters and moments in bfloat16: FVU within 1 %, half the memory.

    So long as both are on one path: after three times as many steps the FVU at this size, of one
    seed, moves by 2 % with any rounding.
    """
    runs = {}
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(
            CONFIG,
            steps=100,
            log_every=100,
            checkpoint_every=0,
            sae=dataclasses.replace(SAE, dtype=dtype),
            optim=dataclasses.replace(CONFIG.optim, param_dtype=dtype, moment_dtype=dtype),
        )
        runs[dtype] = train(config, activations, tmp_path / dtype, Event())
    wide, narrow = runs["float32"].state, runs["bfloat16"].state
    assert narrow.params["w_enc"].dtype == jnp.bfloat16
    assert narrow.opt_state[2].nu["w_dec"].dtype == jnp.bfloat16
    assert abs(float(narrow.fvu) / float(wide.fvu) - 1) < 0.01, (narrow.fvu, wide.fvu)
    assert float(wide.fvu) < 0.7
    sae = build(SAE, WIDTH)
    with Checkpoints(tmp_path / "bfloat16/checkpoints") as checkpoints:
        restored = checkpoints.restore(100, state.abstract(sae, optimiser(
            config.optim, SAE.latents, 100, SAE.decoder_norm), config.optim))
    for ours, theirs in zip(leaves(restored), leaves(narrow), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# One step


@pytest.mark.optimised
def test_metrics_of_a_step_by_numpy(activations):
    sae, now, step = step_of(SAE, dead_after=3 * BATCH)
    encode, reconstruct, route = map(jax.jit, (sae.encode, sae.reconstruct, sae.route))
    for number in range(5):
        x = activations.rows(np.arange(number * BATCH, (number + 1) * BATCH))
        before = jax.tree.map(jnp.copy, now)  # the step donates its state
        now, values = step(now, jnp.asarray(x), jnp.asarray(activations.mean))

        codes = encode(before.params, x)
        used, ids = np.asarray(codes.values) != 0, np.asarray(codes.ids)
        errors = np.square(x - np.asarray(reconstruct(before.params, x))).sum(1)
        fvu = errors.sum() / np.square(x - activations.mean).sum()
        dead = np.asarray(before.since_fired) >= 3 * BATCH
        load = np.bincount(np.asarray(route(before.params, x).experts).ravel(), minlength=4)
        expected = {
            "mse": errors.mean(),
            "fvu": fvu,
            "l0": used.sum() / BATCH,
            "dead": dead.mean(),
            "load_cv": load.std() / load.mean(),
            "lr": 3e-3,
        }
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, rel=1e-4), name
        total = values["mse"] + 0.1 * values["load_balance"] + values["auxk"] / 32
        assert values["loss"] == pytest.approx(float(total), rel=1e-5)
        assert bool(values["auxk"] > 0) == dead.any()

        since = np.asarray(before.since_fired) + BATCH
        since[np.unique(ids[used])] = 0
        np.testing.assert_array_equal(now.since_fired, since)
        assert now.fvu == pytest.approx(0.98 * float(before.fvu) + 0.02 * fvu, rel=1e-5)
        assert now.step == number + 1 and now.bad_step == -1
    assert 0 < dead.sum() < len(dead)  # or the count of the dead was not tested


def test_tokens_since_firing_do_not_overflow(activations):
    _, now, step = step_of(SAE, dead_after=10)
    top = np.iinfo(np.int32).max
    now = now._replace(since_fired=jnp.full_like(now.since_fired, top))
    now, _ = step(now, jnp.asarray(activations.data[:BATCH]), jnp.asarray(activations.mean))
    assert set(np.asarray(now.since_fired).tolist()) == {0, top}


def test_threshold_is_a_running_mean_from_its_first_value_on(activations):
    config = dataclasses.replace(SAE, topk_scope="batch", k=3)
    sae, now, step = step_of(config, dead_after=10**6)
    x, mean = jnp.asarray(activations.data[:BATCH]), jnp.asarray(activations.mean)
    smallest = []
    for number in range(3):
        if number == 2:  # a batch in which no latent is positive has no smallest survivor
            bias = jnp.full_like(now.params["b_enc"], -1e6)
            now = now._replace(params=now.params | {"b_enc": bias})
        fresh = now.params | {"threshold": jnp.zeros(())}
        tracked = sae.loss(fresh, x, now.since_fired > 0).tracked
        smallest.append(float(tracked["threshold"]))
        now, values = step(now, x, mean)
        if number == 0:
            assert now.params["threshold"] == pytest.approx(smallest[0])
            assert values["l0"] == pytest.approx(3, rel=0.01)
    followed = THRESHOLD_DECAY * smallest[0] + (1 - THRESHOLD_DECAY) * smallest[1]
    assert smallest[0] != smallest[1] and smallest[2] == 0
    assert now.params["threshold"] == pytest.approx(followed, rel=1e-5)


def test_dead_latents_get_a_gradient_from_auxk_and_only_then(activations):
    sae, now, _ = step_of(SAE, dead_after=1)
    x = jnp.asarray(activations.data[:8])
    codes = sae.encode(now.params, x)
    fired = np.zeros(SAE.latents, bool)
    fired[np.asarray(codes.ids)[np.asarray(codes.values) != 0]] = True

    @jax.jit
    def gradients(dead):
        grads = jax.grad(lambda params: sae.loss(params, x, dead).total)(now.params)
        by_latent = {
            "w_dec": grads["w_dec"].reshape(SAE.latents, -1),
            "w_enc": grads["w_enc"].swapaxes(1, 2).reshape(SAE.latents, -1),
        }
        return {name: jnp.abs(grad).max(1) > 0 for name, grad in by_latent.items()}

    alive, revived = gradients(jnp.zeros_like(fired)), gradients(jnp.asarray(~fired))
    assert not alive["w_dec"][~fired].any() and alive["w_dec"][fired].all()
    assert revived["w_dec"][~fired].mean() > 0.3
    assert revived["w_enc"][~fired].mean() > 0.3


def test_the_keys_of_steps_come_from_the_seed(activations):
    """Stochastic rounding draws from them: seeds that share their draws are not independent."""
    optim = dataclasses.replace(CONFIG.optim, param_dtype="bfloat16")
    sae, _, step = step_of(SAE, dead_after=10**6)
    tx = optimiser(CONFIG.optim, SAE.latents, 100, SAE.decoder_norm)
    x, mean = jnp.asarray(activations.data[:BATCH]), jnp.asarray(activations.mean)
    now = state.create(sae, tx, optim, 0)
    same, other = (now._replace(key=state.create(sae, tx, optim, seed).key) for seed in (0, 1))
    w_enc = [np.asarray(step(each, x, mean)[0].params["w_enc"]) for each in (now, same, other)]
    np.testing.assert_array_equal(w_enc[0], w_enc[1])
    assert (w_enc[0] != w_enc[2]).mean() > 0.1


# The loop


def test_training_lowers_fvu(activations, tmp_path):
    config = dataclasses.replace(CONFIG, steps=200, log_every=100, checkpoint_every=0)
    summary = train(config, activations, tmp_path, Event())
    first, *_, last = records(tmp_path)
    assert summary.finished and summary.step == 200
    assert [line["step"] for line in records(tmp_path)] == [1, 100, 200]
    assert last["fvu"] < 0.3 < 0.5 < first["fvu"]
    assert last["tokens"] == 200 * BATCH and last["l0"] <= SAE.k
    assert list((tmp_path / "tensorboard").iterdir())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps == [200]  # the last state is saved without checkpoint_every


@pytest.fixture(scope="module")
def whole(activations, tmp_path_factory):
    """An uninterrupted run: its folder and its final state."""
    folder = tmp_path_factory.mktemp("whole")
    folders.claim(CONFIG, folder)
    return folder, leaves(train(CONFIG, activations, folder, Event()).state)


def assert_same_run(summary, folder, whole):
    for ours, theirs in zip(leaves(summary.state), whole[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert records(folder) == records(whole[0])


@pytest.mark.optimised
def test_stopped_and_resumed_is_bit_identical(activations, tmp_path, whole):
    stop, shown = Event(), []

    def show(record):
        shown.append(record["step"])
        if record["step"] == 6:
            stop.set()

    one_by_one = dataclasses.replace(CONFIG, steps_per_call=1)
    summary = train(one_by_one, activations, tmp_path, stop, show)
    assert (summary.step, summary.finished, summary.last["step"]) == (7, False, 7)
    assert shown == [1, 2, 4, 6, 7]
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 4, 6]
    again = train(CONFIG, activations, tmp_path, Event())
    assert again.finished
    assert_same_run(again, tmp_path, whole)


def test_several_processes_stop_where_a_record_or_checkpoint_is_due(
    activations, tmp_path, monkeypatch
):
    """Asking each other, they wait for their devices; there they do so anyway."""
    asked, stop = [], Event()

    class Others:
        several, leads = staticmethod(lambda: True), staticmethod(lambda: True)

        @staticmethod
        def any_of(flag):
            asked.append(flag)
            return flag

    def show(record):
        if record["step"] == 5:
            stop.set()

    monkeypatch.setattr(loop, "processes", Others)
    settings = dataclasses.replace(CONFIG, steps_per_call=1, log_every=5, checkpoint_every=3)
    summary = train(settings, activations, tmp_path, stop, show)
    assert asked == [False, False, False, True]  # after steps 1, 3, 5, and 6
    assert (summary.step, summary.finished) == (6, False)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest == 6


def test_all_time_counts_after_a_stop_and_without_the_records(activations, tmp_path):
    rare = dataclasses.replace(CONFIG, log_every=100, checkpoint_every=0, steps_per_call=1)
    checks = iter(range(100))

    class Later(Event):
        def is_set(self):
            return next(checks) >= 2

    summary = train(rare, activations, tmp_path, Later())
    (first,) = metrics.read_lines(tmp_path / "metrics.jsonl")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.latest, first["step"]) == (3, 1)
        assert checkpoints.seconds(3) >= summary.last["seconds"] > first["seconds"]
    measured = tmp_path / "checkpoints" / "3" / "metrics" / "metrics"
    values = json.loads(measured.read_text())
    measured.write_text(json.dumps(values | {"seconds": 1000.0}))
    (tmp_path / "metrics.jsonl").unlink()
    last = train(rare, activations, tmp_path, Event()).last
    assert 1000 < last["seconds"] < 2000
    assert [line["step"] for line in records(tmp_path)] == [12]
    since = (12 - 3) * BATCH / (last["seconds"] - 1000)
    assert last["tokens_per_second"] == pytest.approx(since, rel=1e-3)


def test_a_crash_costs_the_steps_since_the_last_checkpoint(activations, tmp_path, whole):
    def crash(record):
        if record["step"] == 8:
            raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power failure"):
        train(CONFIG, activations, tmp_path, Event(), crash)
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 4, 6, 8]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    shown = []
    again = train(CONFIG, activations, tmp_path, Event(), lambda r: shown.append(r["step"]))
    assert shown == [6, 8, 10, 12]  # from checkpoint 5
    assert_same_run(again, tmp_path, whole)


def test_a_finished_run_takes_no_more_steps(activations, whole):
    before = records(whole[0])
    shown = []
    summary = train(CONFIG, activations, whole[0], Event(), shown.append)
    assert summary.finished and not shown and records(whole[0]) == before
    assert summary.last["step"] == 12


def test_not_finite_is_refused_with_the_step_and_the_good_checkpoint_stays(activations, tmp_path):
    config = dataclasses.replace(CONFIG, log_every=3, checkpoint_every=6)
    folders.claim(config, tmp_path)
    data = activations.data.copy()
    data[batch_ids(config.seed, 6, BATCH, ROWS)[5]] = np.nan  # the batch of step 7
    with pytest.raises(UserError, match="step 7: .* checkpoint 6 is kept"):
        train(config, Rows(data), tmp_path, Event())
    assert [line["step"] for line in records(tmp_path)] == [1, 3, 6]
    _, params = scale_sae_jax.load(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_not_finite_before_any_checkpoint(activations, tmp_path):
    data = np.full_like(activations.data, np.nan)
    with pytest.raises(UserError, match="step 1: .* no checkpoint"):
        train(CONFIG, Rows(data), tmp_path, Event())
