"""Spliced losses against NumPy on a tiny causal language model."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scale_sae_jax.evaluation import splice

B, S, D, V = 4, 6, 3, 7
RNG = np.random.default_rng(0)
UNEMBED = RNG.normal(size=(D, V)).astype(np.float32)
MEAN = RNG.normal(size=D).astype(np.float32)
SEGMENTS = np.array(
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32
)


def run_on(hidden, segments):
    """Logits of the sum of the hidden states of the segment so far."""
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.where(same & jnp.tri(S, dtype=bool), 1.0, 0.0) @ hidden @ UNEMBED


class Inputs(NamedTuple):
    rows: splice.Rows
    reconstructed: jax.Array
    real: jax.Array


def inputs(**changes):
    rng = np.random.default_rng(1)
    real = SEGMENTS > 0
    kept = real.copy()
    kept[:, 0] = False
    x, reconstructed = (rng.normal(size=(B, S, D)).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    tokens = changes.get("tokens", tokens)
    reconstructed = changes.get("reconstructed", reconstructed)
    given = Inputs(splice.Rows(x, tokens, SEGMENTS, kept), reconstructed, real)
    return jax.tree.map(jnp.asarray, given)


def log_probs(hidden):
    out = np.zeros((B, S, V))
    for b in range(B):
        for t in range(S):
            seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
            logits = hidden[b, seen].astype(np.float64).sum(0) @ UNEMBED
            out[b, t] = logits - np.log(np.exp(logits).sum())
    return out


def totals(given, vocab=V):
    spliced = splice.by_rows(partial(splice.splice_terms, run_on), vocab, *given)
    ablate = partial(splice.ablation_terms, run_on, jnp.asarray(MEAN))
    terms = spliced, splice.by_rows(ablate, vocab, given.rows)
    return jax.tree.map(lambda t: np.asarray(t, np.float64).sum(), terms)


def metrics(given):
    return {k: float(v) for k, v in splice.splice_metrics(*totals(given)).items()}


def test_against_numpy():
    given = inputs()
    x, tokens, _, kept = (np.asarray(a) for a in given.rows)
    hat, real = np.asarray(given.reconstructed), np.asarray(given.real)
    variants = {
        "ce_clean": x,
        "ce_spliced": np.where(kept[..., None], hat, x),
        "ce_mean": np.where(kept[..., None], MEAN, x),
        "ce_zero": np.where(kept[..., None], 0, x),
        "ce_spliced_all": np.where(real[..., None], hat, x),
    }
    # Positions whose successor is in the same segment: 5 in row 0, 2 + 2 in row 1, 3 in row 2.
    positions = [(0, t) for t in range(5)] + [(1, t) for t in (0, 1, 3, 4)]
    positions += [(2, t) for t in range(3)]
    expected = {}
    for key, hidden in variants.items():
        p = log_probs(hidden)
        expected[key] = np.mean([-p[b, t, tokens[b, t + 1]] for b, t in positions])
    clean, spliced = log_probs(x), log_probs(variants["ce_spliced"])
    divergence = (np.exp(clean) * (clean - spliced)).sum(-1)
    expected["kl"] = np.mean([divergence[p] for p in positions])
    e = expected
    e["delta_ce"] = e["ce_spliced"] - e["ce_clean"]
    e["delta_ce_all"] = e["ce_spliced_all"] - e["ce_clean"]
    e["recovered"] = (e["ce_zero"] - e["ce_spliced"]) / (e["ce_zero"] - e["ce_clean"])
    e["recovered_mean"] = (e["ce_mean"] - e["ce_spliced"]) / (e["ce_mean"] - e["ce_clean"])
    assert metrics(given) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert totals(given)[0].predictions == len(positions)


def test_perfect_reconstruction_recovers_everything():
    x = inputs().rows.x
    got = metrics(inputs(reconstructed=x))
    assert got["ce_spliced"] == got["ce_spliced_all"] == got["ce_clean"]
    assert (got["delta_ce"], got["kl"], got["recovered"]) == (0, 0, 1)


@pytest.mark.parametrize(("value", "key"), [(np.zeros(D), "recovered"), (MEAN, "recovered_mean")])
def test_reconstruction_as_bad_as_the_ablation_recovers_nothing(value, key):
    hat = np.broadcast_to(value, (B, S, D)).astype(np.float32)
    got = metrics(inputs(reconstructed=hat))
    assert got[key] == pytest.approx(0, abs=1e-6)


def test_padding_is_never_read():
    given = inputs()
    tokens, hat = np.array(given.rows.tokens), np.array(given.reconstructed)
    tokens[SEGMENTS == 0] = V - 1
    hat[SEGMENTS == 0] = 1e6
    assert totals(inputs(tokens=tokens, reconstructed=hat)) == totals(given)


def test_few_rows_at_a_time_change_nothing(monkeypatch):
    whole = totals(inputs())
    monkeypatch.setattr(splice, "MAX_LOGITS", S * V)
    assert splice.rows_per_call(B, S * V) == 1
    for got, expected in zip(totals(inputs()), whole, strict=True):
        assert list(got) == pytest.approx(list(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "most", "expected"), [(16, 10, 8), (16, 0, 1), (7, 6, 1), (6, 9, 6)]
)
def test_rows_per_call(monkeypatch, rows, most, expected):
    monkeypatch.setattr(splice, "MAX_LOGITS", 100 * most)
    assert splice.rows_per_call(rows, 100) == expected


def test_no_language_model_leaves_everything_undefined():
    sums = jax.tree.map(np.sum, splice.no_terms((2, 3)))
    assert all(np.isnan(v) for v in splice.splice_metrics(*sums).values())
