"""Metrics against known features: brute force, and dictionaries whose flaws are known."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from scale_sae_jax.activations.synthetic import open_synthetic
from scale_sae_jax.config import SyntheticConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.ground_truth import ground_truth_metrics, measure_ground_truth
from scale_sae_jax.sae.codes import Codes

SAMPLES = 60


def as_codes(dense):
    """A code with every column in a slot, as dense architectures have it."""
    ids = np.broadcast_to(np.arange(dense.shape[1], dtype=np.int32), dense.shape)
    return Codes(jnp.asarray(dense, jnp.float32), jnp.asarray(ids))


def sparse_codes(dense, slots):
    """The same in `slots` slots, unused ones with value 0 and id 0."""
    values, ids = np.zeros((2, len(dense), slots))
    for t, row in enumerate(dense):
        (on,) = np.nonzero(row)
        values[t, : len(on)], ids[t, : len(on)] = row[on], on
    return Codes(jnp.asarray(values, jnp.float32), jnp.asarray(ids, jnp.int32))


def scores(both, detector, feature):
    precision = both / detector if detector else 0.0
    recall = both / feature if feature else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return precision, recall, f1


def brute_force(decoder, n_experts, features, fires, truth):
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    cosines = np.abs(unit(decoder) @ unit(features).T)
    match, size = cosines.argmax(1), len(decoder) // n_experts
    expert = np.arange(len(decoder)) // size
    live = fires.any(axis=0)

    def means(groups):
        table = []
        for group in groups:
            detected, present = fires[:, group].any(axis=1), truth[:, match[group[0]]]
            table.append(scores((detected & present).sum(), detected.sum(), present.sum()))
        return np.mean(table, axis=0)

    latents = range(len(decoder))
    groups = {
        "": [[i] for i in latents],
        "_live": [[i] for i in latents if live[i]],
        "_intra": [
            [i for i in latents if expert[i] == e and match[i] == f]
            for e, f in sorted(set(zip(expert, match, strict=True)))
        ],
        "_inter": [[i for i in latents if match[i] == f] for f in sorted(set(match))],
    }
    results = {}
    for scope, members in groups.items():
        for key, value in zip(("precision", "recall", "f1"), means(members), strict=True):
            results[key + scope] = value

    def twins(i, same):
        return any(
            live[j] and j != i and match[j] == match[i] and same(expert[i] == expert[j])
            for j in latents
        )

    alive = [i for i in latents if live[i]]
    results["duplicates"] = np.mean([twins(i, lambda same: True) for i in alive])
    results["duplicates_intra"] = np.mean([twins(i, lambda same: same) for i in alive])
    results["duplicates_inter"] = np.mean([twins(i, lambda same: not same) for i in alive])
    by_expert = [[match[i] for i in alive if expert[i] == e] for e in range(n_experts)]
    by_expert = [m for m in by_expert if m]
    results["uniqueness"] = len(set(match)) / len(match)
    results["uniqueness_live"] = len({match[i] for i in alive}) / len(alive)
    results["uniqueness_intra"] = np.mean([len(set(m)) / len(m) for m in by_expert])
    results["uniqueness_inter"] = len({match[i] for i in alive}) / sum(
        len(set(m)) for m in by_expert
    )
    results["match_cosine"] = cosines.max(1).mean()
    good = {match[i] for i in latents if scores(
        (fires[:, i] & truth[:, match[i]]).sum(), fires[:, i].sum(), truth[:, match[i]].sum()
    )[2] > 0.5}
    results["features_found"] = len(good) / len(features)
    return results


@pytest.mark.parametrize("seed", range(2))
def test_metrics_are_those_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(7, 5)).astype(np.float32)
    near = features[rng.integers(0, 4, 12)] * rng.choice([-2, 1], (12, 1))
    decoder = (near + 0.2 * rng.normal(size=near.shape)).astype(np.float32)
    truth = rng.random((SAMPLES, 7)) < 0.3
    fires = rng.random((SAMPLES, 12)) < 0.3
    fires[:, [2, 9]] = False  # dead
    halves = [slice(0, 40), slice(40, SAMPLES)]
    batches = [(sparse_codes(-1.0 * fires[h], 12), sparse_codes(truth[h], 7)) for h in halves]
    got = ground_truth_metrics(decoder, 3, features, batches)
    expected = brute_force(decoder, 3, features, fires, truth)
    assert set(got) == set(expected) | {"mcc"}
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-6), key
    dense = ground_truth_metrics(decoder, 3, features, [(as_codes(fires), as_codes(truth))])
    assert dense == got


def test_mcc_is_the_best_one_to_one_matching():
    """Both latents prefer feature 0; only one may have it."""
    features = np.eye(3, dtype=np.float32)
    decoder = np.array([[0.8, 0.6, 0], [-0.96, 0, 0.28]], np.float32)
    nothing = (as_codes(np.zeros((2, 2))), as_codes(np.zeros((2, 3))))
    got = ground_truth_metrics(decoder, 1, features, [nothing])
    assert got["mcc"] == pytest.approx((0.6 + 0.96) / 2)
    assert got["match_cosine"] == pytest.approx((0.8 + 0.96) / 2)
    assert got["uniqueness"] == 0.5
    assert got["f1"] == 0 and np.isnan(got["f1_live"]) and np.isnan(got["uniqueness_intra"])


WORLD = SyntheticConfig(
    features=48, d=64, samples=2000, heldout=2000, min_rate=0.05, roots=2, branching=2, depth=2
)


def oracle(heldout, copies, experts):
    """An 'autoencoder' that knows the true codes, with every feature `copies` times over.

    Its codes are read off x, for directions are orthogonal where d exceeds their number.
    """
    decoder = jnp.tile(heldout.features, (copies, 1))
    return SimpleNamespace(
        experts=experts,
        decoder=lambda params: decoder,
        encode=lambda params, x: as_codes_traced((x - heldout.world.bias) @ decoder.T),
    )


def as_codes_traced(values):
    ids = jnp.broadcast_to(jnp.arange(values.shape[1]), values.shape)
    return Codes(jnp.where(values > 0.05, values, 0), ids)


@pytest.fixture(scope="module")
def heldout():
    return open_synthetic(WORLD)[1]


def test_a_perfect_dictionary(heldout):
    got = measure_ground_truth(oracle(heldout, 1, 4), None, heldout, 1500)
    for key in ("mcc", "f1", "precision", "recall", "f1_intra", "f1_inter", "match_cosine"):
        assert got[key] == pytest.approx(1, abs=1e-3), key
    for key in ("uniqueness", "uniqueness_live", "uniqueness_intra", "uniqueness_inter"):
        assert got[key] == 1, key
    assert got["features_found"] == 1
    assert got["duplicates"] == got["duplicates_intra"] == got["duplicates_inter"] == 0


@pytest.mark.parametrize("experts, intra", [(1, 1.0), (2, 0.0)])
def test_a_dictionary_learnt_twice(heldout, experts, intra):
    """In one expert the copies are inside it; in two, across."""
    got = measure_ground_truth(oracle(heldout, 2, experts), None, heldout, 500)
    assert got["uniqueness"] == 0.5 and got["duplicates"] == 1
    assert got["duplicates_intra"] == intra and got["duplicates_inter"] == 1 - intra
    assert got["uniqueness_intra"] == 1 - intra / 2
    assert got["uniqueness_inter"] == (1 if intra else 0.5)


def test_a_broken_decoder_is_refused():
    with pytest.raises(UserError, match="NaN or infinity"):
        ground_truth_metrics(np.full((2, 2), np.nan, np.float32), 1, np.eye(2, dtype="f4"), [])
