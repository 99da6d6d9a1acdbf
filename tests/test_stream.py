"""Activations made while training: the right ones, none twice in a pass, the same after a kill."""

import dataclasses
from threading import Event

import jax
import numpy as np
import pytest
from test_harvest import FAR, LM, SPECIAL, D, model, text_config

from scale_sae_jax.activations.stream import FIRST_ROWS, ActivationStream
from scale_sae_jax.config import ActivationsConfig, Config, OptimConfig, SAEConfig, check
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel.mesh import make_mesh
from scale_sae_jax.training.interrupts import Interrupted
from scale_sae_jax.training.loop import train

T, BUFFER = 64, 3


def config_of(tmp_path, **changes):
    return Config(
        mesh="data:2,expert:4", steps=9, batch_size=T, steps_per_call=2, log_every=3,
        checkpoint_every=3, lm=dataclasses.replace(LM, path="lm"), text=text_config(tmp_path),
        activations=ActivationsConfig(buffer=BUFFER, dtype="float32"),
        sae=SAEConfig(latents=32, experts=8, active=2, k=2, auxk=False),
        optim=OptimConfig(lr=1e-3), **changes,
    )


def stream_of(config, spec="data:2,expert:4"):
    return ActivationStream(model(), config, make_mesh(spec, 8))


def tokens_of(x):
    """The token of each activation of the tiny model."""
    embedding = np.asarray(model().params) + LM.layer
    nearest = np.square(x.reshape(-1, 1, D) - embedding).sum(-1)
    assert nearest.min(1).max() < 1e-6  # nothing but activations of single tokens
    return nearest.argmin(1)


def test_batches_hold_kept_activations_on_the_mesh(tmp_path):
    stream = stream_of(config_of(tmp_path))
    x = stream.batches(0, 3, 4)
    assert x.shape == (4, T, D) and x.dtype == np.float32
    assert x.sharding.shard_shape(x.shape) == (4, T // 8, D)
    found = tokens_of(np.asarray(x[:3]))
    assert not set(found) & {0, SPECIAL, FAR} and len(set(found)) > 30
    np.testing.assert_array_equal(x[3], x[2])  # void
    rows = np.asarray(stream.rows(np.arange(BUFFER * T)))
    assert abs(stream.mean - rows.mean(0)).max() < 0.2
    assert stream.median_norm == pytest.approx(np.median(np.linalg.norm(rows, axis=1)), rel=0.1)


def test_no_activation_of_a_buffer_is_seen_twice(tmp_path):
    """Each position gives its own number, in the place of an embedding."""

    class Counting(type(model())):
        def run_to(self, params, tokens, segments, layer):
            place = 64.0 * jax.numpy.arange(tokens.shape[0])[:, None] + np.arange(16)
            return place[..., None] + 1e-3 * tokens[..., None] * np.ones(D)

    base = model()
    config = config_of(tmp_path)
    config = dataclasses.replace(
        config, activations=dataclasses.replace(config.activations, buffer=1, max_norm_ratio=0.0),
        lm=dataclasses.replace(config.lm, rows_per_batch=64),
    )
    lm = Counting(base.params, base.tokenizer)
    x = ActivationStream(lm, config, make_mesh("data:2,expert:4", 8)).batches(0, 1, 1)
    assert len(np.unique(np.asarray(x)[0, :, 0])) == T


def write_documents(path, lengths):
    rng = np.random.default_rng(1)
    lines = (" ".join(f"w{i}" for i in rng.integers(2, 40, length)) for length in lengths)
    path.write_text("\n".join(lines))


def one_a_row(tmp_path, lengths, **changes):
    """Settings with rows of one document each, and documents of so many words."""
    write_documents(tmp_path / "text.txt", lengths)
    config = config_of(tmp_path, **changes)
    activations = dataclasses.replace(config.activations, max_norm_ratio=0.0)
    text = dataclasses.replace(config.text, packing="one")
    return dataclasses.replace(config, activations=activations, text=text)


@pytest.mark.parametrize("documents", (400, 70))
def test_rows_with_much_padding_fill_a_buffer_without_repeats(documents, tmp_path):
    """Each position gives the words of its document, and its number."""

    class Reading(type(model())):
        def run_to(self, params, tokens, segments, layer):
            words = jax.numpy.broadcast_to(tokens[:, None, :7], (*tokens.shape, 7))
            place = jax.numpy.broadcast_to(np.arange(16)[:, None], (*tokens.shape, 1))
            return jax.numpy.concatenate([words, place], -1).astype(np.float32)

    base, config = model(), one_a_row(tmp_path, documents * [6])
    stream = ActivationStream(
        Reading(base.params, base.tokenizer), config, make_mesh("data:2,expert:4", 8)
    )
    for number in range(3):  # the text of 70 documents begins again within the second
        buffer = np.asarray(stream.batches(BUFFER * number, BUFFER * (number + 1), BUFFER))
        assert len(np.unique(buffer.reshape(-1, D), axis=0)) == BUFFER * T


def test_a_buffer_that_later_text_does_not_fill_is_refused(tmp_path):
    config = one_a_row(tmp_path, 200 * [15] + 400 * [2])
    stream = stream_of(config)
    stream.batches(0, 1, 1)
    with pytest.raises(UserError, match=r"buffer 1\d keep \d+ of the 24 .*packing=pack"):
        for number in range(20):
            stream.batches(BUFFER * number, BUFFER * number + 1, 1)


def test_buffers_are_a_function_of_their_number(tmp_path):
    config = config_of(tmp_path)
    forward = stream_of(config)
    expected = [np.asarray(forward.batches(step, step + 1, 1)) for step in range(12)]
    late = stream_of(config)
    np.testing.assert_array_equal(late.batches(7, 8, 1), expected[7])
    np.testing.assert_array_equal(late.batches(11, 12, 1), expected[11])
    np.testing.assert_array_equal(late.batches(2, 4, 2), np.concatenate(expected[2:4]))
    assert not np.array_equal(expected[0], expected[3])
    other = stream_of(dataclasses.replace(config, seed=1))
    assert not np.array_equal(other.batches(0, 1, 1), expected[0])


def test_training_on_the_fly_stops_and_resumes_bit_for_bit(tmp_path):
    config = config_of(tmp_path)
    whole = train(config, stream_of(config), tmp_path / "whole", Event())
    stop = Event()

    def show(record):
        if record["step"] >= 4:
            stop.set()

    short = train(config, stream_of(config), tmp_path / "cut", stop, show)
    assert not short.finished
    rest = train(config, stream_of(config), tmp_path / "cut", Event())
    for ours, theirs in zip(jax.tree.leaves(rest.state), jax.tree.leaves(whole.state),
                            strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_stop_while_a_buffer_is_filled_saves_what_was_trained(tmp_path):
    config = dataclasses.replace(config_of(tmp_path), checkpoint_every=4)
    whole = train(config, stream_of(config), tmp_path / "whole", Event())
    seen = []

    def stopped(buffer, done, total):
        seen.append((buffer, done, total))
        if buffer == 2 and done:
            raise Interrupted("stopped")

    mesh = make_mesh("data:2,expert:4", 8)
    short = train(config, ActivationStream(model(), config, mesh, stopped), tmp_path / "cut",
                  Event())
    assert short.step == 2 * BUFFER and not short.finished
    for buffer in (FIRST_ROWS, 0, 1):
        done, totals = zip(*((d, t) for b, d, t in seen if b == buffer))
        assert done[0] == 0 and list(done) == sorted(done) and done[-1] == totals[0]
    rest = train(config, stream_of(config), tmp_path / "cut", Event())
    for ours, theirs in zip(jax.tree.leaves(rest.state), jax.tree.leaves(whole.state),
                            strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_buffer_is_not_larger_than_the_run(tmp_path):
    config, batches = dataclasses.replace(config_of(tmp_path), steps=5), []
    for size in (5, 10**6):
        buffer = dataclasses.replace(config.activations, buffer=size)
        batches.append(stream_of(dataclasses.replace(config, activations=buffer)).batches(0, 5, 5))
    np.testing.assert_array_equal(*batches)


def test_what_cannot_be_streamed_is_refused(tmp_path):
    config = config_of(tmp_path)
    both = dataclasses.replace(config.activations, path="store")
    with pytest.raises(UserError, match="leave one out"):
        check(dataclasses.replace(config, activations=both))
    nan = dataclasses.replace(model(), params=np.full((40, D), np.nan, np.float32))
    with pytest.raises(UserError, match="NaN or infinity"):
        ActivationStream(nan, config, make_mesh("", 8))
    empty = dataclasses.replace(config.text, heldout_fraction=0.9999999)
    with pytest.raises(UserError, match="no document to train on"):
        ActivationStream(model(), dataclasses.replace(config, text=empty), make_mesh("", 8))
