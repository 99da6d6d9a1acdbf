"""Sums per document, and percentile bootstrap intervals over documents.

The metrics with an interval are functions of sums over tokens. Tokens of one document are not
independent, so sums are kept per document and whole documents are drawn with replacement. "Sums"
is any pytree of float64 arrays of one shape: [n] documents, [] in total, [draws] resampled.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

DocumentSums = tuple[np.ndarray, PyTree]  # ids [n], sums [n]
Number = np.ndarray | np.number | float | int


def sum_by_document(documents: Int[np.ndarray, " T"], terms: PyTree) -> DocumentSums:
    """Adds up per-token terms, each leaf [T], in float64; returns sorted ids [n] and sums [n]."""
    ids, owner = np.unique(documents, return_inverse=True)
    return ids, jax.tree.map(lambda t: np.bincount(owner, weights=t, minlength=len(ids)), terms)


def merge_documents(parts: Sequence[DocumentSums]) -> DocumentSums:
    """Joins sums of several batches; a document may appear in any number of them."""
    ids, sums = zip(*parts, strict=True)
    return sum_by_document(np.concatenate(ids), jax.tree.map(lambda *s: np.concatenate(s), *sums))


def resample(sums: PyTree, draws: int, seed: int) -> PyTree:
    """Totals over `draws` resamplings of the documents: leaves [n] become [draws].

    All leaves share the draws, so that differences of two metrics are paired. A single document
    says nothing about the spread between documents: the result then has no draws.
    """
    leaves, tree = jax.tree.flatten(sums)
    table = np.stack(leaves, axis=1)  # [n, F]
    n = len(table)
    rng = np.random.default_rng(seed)
    totals = np.empty((draws if n > 1 else 0, len(leaves)))
    for total in totals:
        times_drawn = np.bincount(rng.integers(n, size=n), minlength=n)  # [n]
        total[:] = times_drawn @ table
    return jax.tree.unflatten(tree, list(totals.T))


def interval(samples: Float[np.ndarray, " draws"]) -> list[float] | None:
    """The central 95 % of the draws as [low, high]; undefined draws are left out."""
    defined = samples[np.isfinite(samples)]
    return [float(v) for v in np.percentile(defined, (2.5, 97.5))] if defined.size else None


def ratio(top: Number, bottom: Number) -> Float[np.ndarray, "*shape"]:
    """top / bottom in float64, broadcast; NaN (undefined) where bottom is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(top, np.float64), np.asarray(bottom, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
