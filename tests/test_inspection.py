"""Contexts, neighbours, words and profiles of latents against brute force in NumPy."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import write_model

from scale_sae_jax import UserError
from scale_sae_jax.config import LMConfig, SAEConfig
from scale_sae_jax.evaluation import evaluator
from scale_sae_jax.evaluation.evaluator import EvalBatch
from scale_sae_jax.evaluation.redundancy import max_cosines
from scale_sae_jax.inspection import directions, look
from scale_sae_jax.inspection.contexts import OUTSIDE, Plan, nothing_read, read, spread
from scale_sae_jax.inspection.directions import nearest, plane
from scale_sae_jax.inspection.profiles import profiles, routed
from scale_sae_jax.inspection.vocabulary import words
from scale_sae_jax.lm import LanguageModel, llama, load_language_model
from scale_sae_jax.sae import build

PLAN = Plan(top=3, sampled=4, before=2, after=1, bins=8)
LATENTS, K, S = 7, 3, 9
SEGMENTS = np.array([[1] * 9, [1, 1, 1, 1, 2, 2, 2, 3, 3], [1] * 5 + [0] * 4])


def text(seed, rows=12):
    """Codes whose values often tie and span several octaves, and rows of pieces and padding."""
    rng = np.random.default_rng(seed)
    segments = SEGMENTS[rng.integers(len(SEGMENTS), size=rows)]
    values = rng.integers(0, 4, (rows, S, K)) * 2.0 ** rng.integers(-6, 6, (rows, S, 1))
    ids = rng.random((rows, S, LATENTS - 1)).argsort(-1)[..., :K]  # the last never fires
    kept = (segments > 0) & (rng.random((rows, S)) < 0.8)
    tokens = np.where(segments > 0, rng.integers(1, 50, (rows, S)), 0)
    return values.astype(np.float32), ids, kept, tokens, segments


def by_hand(latent, values, ids, kept, tokens, segments):
    """All activations of a latent, and each piece's peak (value, row, position, window, acts)."""
    acts = (np.where(ids == latent, values, 0).sum(-1) * kept).astype(np.float32)
    peaks = []
    for row in range(len(acts)):
        for piece in set(segments[row]) - {0}:
            inside = np.flatnonzero(segments[row] == piece)
            best = inside[acts[row, inside].argmax()]
            if acts[row, best] == 0:
                continue
            window = [(t, p) for p in range(best - 2, best + 2)
                      for t in [tokens[row, p] if p in inside else OUTSIDE]]
            shading = [acts[row, p] if p in inside else 0 for _, p in window]
            peaks.append((acts[row, best], row, best, [t for t, _ in window], shading))
    return acts[acts > 0], peaks


def listed(peaks):
    return [
        (v, r, p, t.tolist(), a.tolist())
        for v, r, p, t, a in zip(*peaks[1:], strict=True)
    ]


@pytest.mark.parametrize("batch", [12, 5, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_contexts_against_brute_force_however_the_text_is_cut(seed, batch):
    whole = text(seed)
    seen = nothing_read(LATENTS, PLAN)
    for start in range(0, 12, batch):
        seen = read(seen, PLAN, *(array[start : start + batch] for array in whole))
    assert (seen.tokens, seen.rows) == (whole[2].sum(), 12)
    for latent in range(LATENTS):
        acts, peaks = by_hand(latent, *whole)
        assert (seen.firing[latent], seen.pieces[latent]) == (len(acts), len(peaks))
        top = sorted(peaks, key=lambda peak: (-peak[0], peak[1], peak[2]))[:3]
        assert listed(seen.top.of(latent)) == top
        places = np.array([peak[1:3] for peak in peaks], int).reshape(-1, 2)
        order = np.argsort(spread(*places.T, np.full(len(peaks), latent)))[:4]
        assert listed(seen.sample.of(latent)) == [peaks[i] for i in order]
        if not len(acts):
            assert latent == LATENTS - 1 and not seen.histogram[latent].any()
            continue
        top_edge = 2.0 ** seen.exponent[latent]
        assert top_edge / 2 <= acts.max() < top_edge
        edges = np.linspace(0, top_edge, PLAN.bins + 1)
        assert seen.histogram[latent].tolist() == np.histogram(acts, edges)[0].tolist()


def test_the_sample_is_uniform_over_all_peaks():
    """Of 400 peaks with values in order of the text, the mean of 100 drawn is that of all."""
    rows = 400
    values = np.arange(1, rows + 1, dtype=np.float32)[:, None, None]
    ones = np.ones((rows, 1), int)
    plan = Plan(top=1, sampled=100, before=0, after=0)
    seen = read(nothing_read(2, plan), plan, values, ones[..., None], ones > 0, ones, ones)
    drawn = seen.sample.of(1).value
    assert len(set(drawn)) == 100
    assert np.mean(drawn) == pytest.approx(200.5, abs=4 * 115 / np.sqrt(100))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_nearest_latents_by_hand(experts, size, k, seed):
    rng = np.random.default_rng(seed)
    n = experts * size
    decoder, live = rng.normal(size=(n, 4)).astype(np.float32), rng.random(n) < 0.7
    found = nearest(decoder, live, experts, k)
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for i in range(n):
        for ids, cosines, same in ((found.intra, found.intra_cosine, True),
                                   (found.inter, found.inter_cosine, False)):
            others = [j for j in range(n)
                      if live[j] and j != i and (j // size == i // size) == same]
            others = sorted(others, key=lambda j: -(unit[i] @ unit[j]))[: ids.shape[1]]
            padded = others + [-1] * (ids.shape[1] - len(others))
            assert ids[i].tolist() == padded
            expected = [unit[i] @ unit[j] if j >= 0 else 0 for j in padded]
            np.testing.assert_allclose(cosines[i], expected, atol=1e-5)


def test_nearest_agrees_with_the_evaluators_redundancy_over_several_blocks():
    rng = np.random.default_rng(0)
    decoder = jnp.asarray(rng.normal(size=(700, 8)), jnp.float32)
    found = nearest(decoder, np.ones(700, bool), 7, 2)
    best = max_cosines(decoder, jnp.arange(700) // 100)
    np.testing.assert_allclose(found.intra_cosine[:, 0], best.intra, atol=1e-6)
    np.testing.assert_allclose(found.inter_cosine[:, 0], best.inter, atol=1e-6)


def test_the_plane_keeps_two_principal_axes_and_puts_twins_together(monkeypatch):
    monkeypatch.setattr(directions, "BLOCK", 7)  # of 30 live ones
    rng = np.random.default_rng(0)
    decoder = rng.normal(size=(40, 6)) * np.array([3, 2, 1, 1, 1, 1])
    decoder[1] = 5 * decoder[0]
    live = np.arange(40) < 30
    found = plane(decoder, live)
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    centred = unit - unit[live].mean(0)
    axes, powers = np.linalg.svd(centred[live])[2], np.linalg.svd(centred[live])[1] ** 2
    expected = centred @ axes[:2].T
    for axis in range(2):
        ours, theirs = found.xy[:, axis], expected[:, axis]
        np.testing.assert_allclose(ours * np.sign(ours @ theirs), theirs / np.abs(expected).max(),
                                   atol=1e-5)
    assert found.share == pytest.approx(powers[:2].sum() / powers.sum(), rel=1e-5)
    np.testing.assert_allclose(found.xy[0], found.xy[1], atol=1e-6)
    assert np.abs(found.xy).max() == pytest.approx(1)


def test_profiles_name_what_an_expert_gets_more_than_others():
    tokens = np.array([3, 3, 3, 3, 4, 4, 5, 5, 6])
    experts = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [1, 2], [1, 2], [1, 2], [0, 2], [0, 1]])
    counts = routed(tokens, experts, (4, 8))
    dense = np.zeros((4, 8), int)
    for token, pair in zip(tokens, experts, strict=True):
        dense[pair, token] += 1
    np.testing.assert_array_equal(counts.toarray(), dense)
    found = profiles(counts, 2)
    everywhere = dense.sum(0) / dense.sum()
    for expert, profile in enumerate(found[:3]):
        assert profile.load == pytest.approx(dense[expert].sum() / dense.sum())
        share = dense[expert] / dense[expert].sum()
        scores = {v: share[v] * np.log(share[v] / everywhere[v])
                  for v in np.flatnonzero(share) if share[v] > everywhere[v]}
        assert profile.tokens == sorted(scores, key=lambda v: -scores[v])[:2]
        np.testing.assert_allclose(profile.shares, share[profile.tokens])
        lifts = share[profile.tokens] / everywhere[profile.tokens]
        np.testing.assert_allclose(profile.lifts, lifts)
    assert found[3] == (0.0, [], [], [])


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    write_model(folder, ["a few words of text, and a few more of them"])
    return load_language_model(LMConfig(path=str(folder)))


def llama_of(lm):
    config = llama.Config(
        width=16, layers=1, heads=2, kv_heads=1, head_width=8, ffn=24, vocab=400, max_context=32,
        norm_eps=1e-6, frequencies=(1.0, 0.1, 0.01, 0.001), tied=False,
    )
    module, row = llama.Model(config), jnp.ones((1, 2), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), row, row)["params"]
    return LanguageModel(module, params, "llama", lm.tokenizer, "")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_direct_logits_are_the_derivative_of_the_logits_along_a_direction(lm, family):
    """For a direction at right angles to the stream (else its norm changes), times that norm."""
    model = lm if family == "gpt2" else llama_of(lm)
    rng = np.random.default_rng(0)
    gain = jnp.asarray(rng.normal(size=model.width), jnp.float32)
    norm = model.params["final_norm"] | {"scale": gain}
    params = model.params | {"final_norm": norm}
    x, d = rng.normal(size=(2, model.width)).astype(np.float32)
    centre = (lambda v: v - v.mean()) if family == "gpt2" else (lambda v: v)
    d = d - centre(x) * (centre(d) @ centre(x)) / (centre(x) @ centre(x))

    def logits(x):
        arrays = {"params": params}, x[None, None]
        return model.module.apply(*arrays, method="unembed")[0, 0]

    change = jax.jvp(logits, (x,), (d,))[1]
    spread = np.sqrt(np.mean(centre(x) ** 2) + 1e-5)
    ours = model.direct_logits(params, d[None])[0]
    np.testing.assert_allclose(ours, change * spread, rtol=2e-3, atol=2e-3)


def test_words_are_the_ends_of_the_centred_direct_logits(lm):
    rng = np.random.default_rng(0)
    decoder = rng.normal(size=(5, lm.width)).astype(np.float32)
    found = words(lm, decoder, 4)
    logits = np.asarray(lm.direct_logits(lm.params, decoder))[:, : lm.tokenizer.vocab]
    logits = logits - logits.mean(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    np.testing.assert_array_equal(found.promoted, order[:, :4])
    np.testing.assert_array_equal(found.suppressed, order[:, ::-1][:, :4])
    ends = np.take_along_axis(logits, found.suppressed, 1)
    np.testing.assert_allclose(found.suppressed_logits, ends, atol=1e-5)


def batch_of(lm, scored):
    tokens = np.arange(2 * S, dtype=np.int32).reshape(2, S) + 20
    ones = np.ones((2, S), np.int32)
    x = lm.run_to(lm.params, tokens, ones, 0)
    documents = np.zeros((2, S), np.int64)
    return EvalBatch(x, tokens, ones, documents, np.broadcast_to(scored, (2, S)), ones > 0)


@pytest.mark.parametrize("rows", (1, 3))
def test_look_leaves_out_what_the_evaluator_does(lm, rows, monkeypatch):
    monkeypatch.setattr(evaluator, "CODES", rows * S * 4)
    sae = build(SAEConfig(latents=24, experts=3, active=2, k=4, auxk=False), lm.width)
    params, scored = sae.init(jax.random.key(0)), np.arange(S) > 0
    batch = batch_of(lm, scored)
    norms = np.linalg.norm(batch.x, axis=-1)
    limit = np.sort(norms[:, 1:].ravel())[-2:].mean()
    found = look(lm, sae, params, [batch], max_norm=float(limit))
    kept = scored & (norms <= limit)
    codes, routing = (call(params, batch.x) for call in (sae.encode, sae.route))
    counts = np.zeros((2, S, 24), int)
    np.add.at(counts, (*np.indices(codes.ids.shape)[:2], codes.ids), codes.values != 0)
    np.testing.assert_array_equal(found.contexts.firing, counts[kept].sum(0))
    assert found.contexts.tokens == kept.sum() == 2 * (S - 1) - 1
    loads = np.bincount(np.asarray(routing.experts)[kept].ravel(), minlength=3) / (2 * kept.sum())
    np.testing.assert_allclose([profile.load for profile in found.profiles], loads)
    with pytest.raises(UserError, match="none of the text's tokens"):
        look(lm, sae, params, [batch_of(lm, False)])


def test_hashes_do_not_warn_when_they_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spread(*(np.array([2**40]),) * 2, np.array([5]))
