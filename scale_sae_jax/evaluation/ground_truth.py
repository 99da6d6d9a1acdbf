"""How well latents recover known features.

A latent's match is the feature with the largest |cosine| to its decoder row; the latent is then a
detector of that feature, right where both fire. All latents count, dead ones too, as in
SynthSAEBench: a ratio without any case is 0. `_live` keys look at latents that fired at least once.

    mcc                      mean |cosine| of the best one-to-one matching of latents with features
                             (exact, Hungarian); of min(L, F) pairs
    match_cosine             mean |cosine| of a latent with its match
    uniqueness               distinct matches / latents; `_live` likewise over live latents
    precision, recall, f1    means over latents; `_live` over live ones
    features_found           share of features that are the match of a latent with f1 > 0.5
    duplicates               share of live latents whose match is also that of another live latent;
                             `_intra` in the same expert, `_inter` in another; a latent can be both
    uniqueness_intra         mean over experts with a live latent of distinct matches / live latents
    uniqueness_inter         distinct matches / sum over experts of each one's distinct matches:
                             1 if no two experts share a feature
    precision_intra, ...     of a whole expert: a feature counts as detected where any of the
                             expert's latents with that match fires; means over the (expert,
                             feature) pairs. `_inter`: where any latent at all with that match
                             fires; means over features that are matches.

So `recall` below `recall_intra` says that latents of one expert share a feature's samples, and
`recall_intra` below `recall_inter` that experts do: the feature is learnt once in each.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from scale_sae_jax.activations.synthetic import SyntheticActivations
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.bootstrap import ratio
from scale_sae_jax.parallel import processes
from scale_sae_jax.sae.codes import Codes

ROWS = 1024  # samples in memory at once
FOUND = 0.5  # f1


class Detectors(NamedTuple):
    """G detectors: the detector that each latent belongs to [L], and the feature of each [G]."""

    of_latent: np.ndarray
    feature: np.ndarray


class Counts(NamedTuple):
    """Samples [G] in which the detector and its feature fire, the detector, and the feature."""

    both: Array | np.ndarray
    detector: Array | np.ndarray
    feature: Array | np.ndarray


def measure_ground_truth(
    sae: Any, params: Any, heldout: SyntheticActivations, tokens: int
) -> dict[str, float]:
    """The metrics of an autoencoder on the first `tokens` held-out samples (all, if fewer).

    Args:
      sae: what `evaluate` takes; its codes may be dense (K = L).
    """
    encode = jax.jit(sae.encode)

    def batches() -> Iterator[tuple[Codes, Codes]]:
        tokens_here = min(tokens, heldout.n)
        for start in range(0, tokens_here, ROWS):
            ids = np.arange(start, min(start + ROWS, tokens_here))
            yield processes.everywhere(encode(params, heldout.rows(ids))), heldout.codes(ids)

    decoder = np.asarray(processes.everywhere(sae.decoder(params)))
    features = np.asarray(heldout.features)
    return ground_truth_metrics(decoder, sae.experts, features, batches())


def ground_truth_metrics(
    decoder: Float[np.ndarray, "L D"],
    n_experts: int,
    features: Float[np.ndarray, "F D"],
    batches: Iterable[tuple[Codes, Codes]],
) -> dict[str, float]:
    """Every key above. Needs memory for 12 bytes a pair of latent and feature.

    Args:
      decoder: rows of any length, by latent id = expert * (L / N) + latent.
      features: true directions of any length.
      batches: the autoencoder's codes and the true ones of the same samples.

    Raises UserError where the decoder holds a NaN or an infinity.
    """
    if not np.isfinite(decoder).all():
        raise UserError("the decoder holds NaN or infinity: load an earlier checkpoint")
    cosines = np.abs(_unit(decoder) @ _unit(features).T)  # [L, F]
    pairs = linear_sum_assignment(cosines, maximize=True)
    match = cosines.argmax(axis=1)
    expert = np.arange(len(decoder)) // (len(decoder) // n_experts)
    detectors = (
        Detectors(np.arange(len(decoder)), match),
        _grouped(expert * len(features) + match, match),
        _grouped(match, match),
    )
    counts = count_firing(detectors, len(features), batches)
    latent = _rates(counts[0])
    live = counts[0].detector > 0
    scopes = {"": latent, "_intra": _rates(counts[1]), "_inter": _rates(counts[2])}
    results = {
        "mcc": cosines[pairs].mean(),
        "match_cosine": cosines.max(axis=1).mean(),
        "uniqueness": len(np.unique(match)) / len(match),
        "uniqueness_live": ratio(len(np.unique(match[live])), live.sum()),
        "features_found": len(np.unique(match[latent["f1"] > FOUND])) / len(features),
        **{key + scope: rates[key].mean() for scope, rates in scopes.items() for key in rates},
        **{f"{key}_live": ratio(rates[live].sum(), live.sum()) for key, rates in latent.items()},
        **_duplicates(expert[live], match[live], len(features)),
    }
    return {key: float(value) for key, value in results.items()}


def count_firing(
    detectors: tuple[Detectors, ...], features: int, batches: Iterable[tuple[Codes, Codes]]
) -> tuple[Counts, ...]:
    """Counts of each set of detectors; one fires where a latent of it does."""

    @partial(jax.jit, static_argnames="columns")
    def fired(ids: Array, fires: Array, columns: int) -> Array:  # [T, columns] bool
        rows = jnp.arange(len(ids))[:, None]
        return jnp.zeros((len(ids), columns), bool).at[rows, ids].max(fires)

    @jax.jit
    def count(codes: Codes, true: Codes) -> tuple[Counts, ...]:
        truth = fired(true.ids, true.values > 0, features)
        found = []
        for of_latent, feature in detectors:
            detected = fired(jnp.asarray(of_latent)[codes.ids], codes.values != 0, len(feature))
            present = truth[:, feature]
            terms = Counts(detected & present, detected, present)
            found.append(jax.tree.map(lambda fires: fires.sum(axis=0), terms))
        return tuple(found)

    totals = tuple(Counts(*np.zeros((3, len(d.feature)), np.int64)) for d in detectors)
    for codes, true in batches:
        totals = jax.tree.map(lambda total, n: total + np.asarray(n), totals, count(codes, true))
    return totals


def _unit(rows: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, np.finfo(rows.dtype).tiny)


def _grouped(key: Int[np.ndarray, " L"], match: Int[np.ndarray, " L"]) -> Detectors:
    """A detector for each distinct key; latents with the same key have the same match."""
    _, first, of_latent = np.unique(key, return_index=True, return_inverse=True)
    return Detectors(of_latent, match[first])


def _rates(counts: Counts) -> dict[str, Float[np.ndarray, " G"]]:
    """Precision, recall and f1 of each detector; 0 without any case."""
    share = lambda top, bottom: np.nan_to_num(ratio(top, bottom))  # noqa: E731
    return {
        "precision": share(counts.both, counts.detector),
        "recall": share(counts.both, counts.feature),
        "f1": share(2 * counts.both, counts.detector + counts.feature),
    }


def _duplicates(
    expert: Int[np.ndarray, " n"], match: Int[np.ndarray, " n"], features: int
) -> dict[str, Float[np.ndarray, ""] | float]:
    """Shares of live latents that double another, and uniqueness inside and across experts."""
    key = expert * features + match
    distinct, of_latent, inside = np.unique(key, return_inverse=True, return_counts=True)
    inside = inside[of_latent]  # latents of the same expert and match, itself included
    everywhere = np.bincount(match, minlength=features)[match]
    live = len(match)
    per_expert = np.bincount(distinct // features), np.bincount(expert)
    return {
        "duplicates": ratio(np.sum(everywhere > 1), live),
        "duplicates_intra": ratio(np.sum(inside > 1), live),
        "duplicates_inter": ratio(np.sum(everywhere > inside), live),
        "uniqueness_intra": np.nanmean(ratio(*per_expert)) if live else np.nan,
        "uniqueness_inter": ratio(len(np.unique(match)), len(distinct)),
    }
