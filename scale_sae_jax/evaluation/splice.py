"""What the reconstruction does to the language model: next-token loss with x̂ in place of x.

The residual stream x after a block is replaced by x̂, by the training mean or by zero, and the rest
of the model runs on from there. As in `reconstruction`, device terms first, metrics from sums.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.evaluation.bootstrap import ratio

# Three or four float32 arrays of so many logits are alive at a time: 128 MiB each.
MAX_LOGITS = 2**25

RunOn = Callable[[Array, Array], Array]  # hidden [B, S, D], segments [B, S] -> logits [B, S, V]


class Rows(NamedTuple):
    """B rows to run the rest of the model on."""

    x: Array | np.ndarray  # [B, S, D] residual stream
    tokens: Array | np.ndarray  # [B, S] int32
    segments: Array | np.ndarray  # [B, S] int32: 0 padding, equal numbers one piece of text
    kept: Array | np.ndarray  # [B, S] bool: positions where x is replaced


class AblationTerms(NamedTuple):
    """Additive terms that no autoencoder changes, arrays of one shape; losses in nats."""

    ce_mean: Array | np.ndarray
    ce_zero: Array | np.ndarray


class SpliceTerms(NamedTuple):
    """Additive terms of a reconstruction, arrays of one shape; losses and divergence in nats."""

    predictions: Array | np.ndarray
    ce_clean: Array | np.ndarray
    ce_spliced: Array | np.ndarray
    ce_spliced_all: Array | np.ndarray
    kl: Array | np.ndarray  # KL(clean ‖ spliced) over the vocabulary


def no_terms(shape: tuple[int, ...]) -> tuple[SpliceTerms, AblationTerms]:
    """Terms where there is no language model: no predictions, so every metric is undefined."""
    void = np.zeros(shape, np.float32)
    return SpliceTerms(*[void] * len(SpliceTerms._fields)), AblationTerms(void, void)


def predicted_positions(segments: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Positions t whose next token t + 1 belongs to the same segment."""
    continues = (segments[:, :-1] > 0) & (segments[:, :-1] == segments[:, 1:])
    return jnp.pad(continues, ((0, 0), (0, 1)))


def ablation_terms(run_on: RunOn, mean: Float[Array, " D"], rows: Rows) -> AblationTerms:
    """Terms [B, S] with the training mean, and with zero, in place of x where it is kept."""

    def loss(value: Array) -> Array:
        return _loss(_log_probs(run_on, rows, _replaced(rows.x, rows.kept, value)), rows)

    values = jnp.stack([mean, jnp.zeros_like(mean)])
    return _where_predicted(rows, AblationTerms(*jax.lax.map(loss, values)))


def splice_terms(
    run_on: RunOn,
    rows: Rows,
    reconstructed: Float[Array, "B S D"],
    real: Bool[Array, "B S"],
) -> SpliceTerms:
    """Terms [B, S] of predicting token t + 1 at position t, zero where there is no such token.

    Args:
      run_on: the model from the spliced layer on.
      reconstructed: x̂. The clean and the spliced logits [B, S, V] are in memory together.
      real: positions where `ce_spliced_all` replaces x.
    """
    hidden = jnp.stack([rows.x, _replaced(rows.x, rows.kept, reconstructed)])
    clean, spliced = jax.lax.map(partial(_log_probs, run_on, rows), hidden)
    everywhere = _replaced(rows.x, real, reconstructed)
    ce_clean = _loss(clean, rows)
    return _where_predicted(rows, SpliceTerms(
        predictions=jnp.ones_like(ce_clean),
        ce_clean=ce_clean,
        ce_spliced=_loss(spliced, rows),
        ce_spliced_all=_loss(_log_probs(run_on, rows, everywhere), rows),
        kl=jnp.sum(jnp.exp(clean) * (clean - spliced), axis=-1),
    ))


def _replaced(x: Array, mask: Array, value: Array) -> Array:
    return jnp.where(mask[..., None], value, x)


def _log_probs(run_on: RunOn, rows: Rows, hidden: Array) -> Float[Array, "B S V"]:
    return jax.nn.log_softmax(run_on(hidden, rows.segments), axis=-1)


def _loss(log_p: Array, rows: Rows) -> Float[Array, "B S"]:
    following = jnp.roll(rows.tokens, -1, axis=1)[..., None]  # [B, S, 1]
    return -jnp.take_along_axis(log_p, following, axis=-1)[..., 0]


def _where_predicted(rows: Rows, terms: Any) -> Any:
    predicted = predicted_positions(rows.segments)
    return jax.tree.map(lambda term: jnp.where(predicted, term, 0.0), terms)


def rows_per_call(rows: int, logits_per_row: int) -> int:
    """The largest divisor of `rows` that keeps within MAX_LOGITS, at least 1."""
    most = max(1, min(rows, MAX_LOGITS // logits_per_row))
    return next(r for r in range(most, 0, -1) if rows % r == 0)


def by_rows(terms_of: Callable[..., Any], vocab: int, *arrays: Any) -> Any:
    """`terms_of(*arrays)`, a few rows at a time so that the logits [rows, S, V] fit into memory.

    Args:
      arrays: trees of arrays [B, S, ...]; the terms are [B, S].
    """
    rows, positions = jax.tree.leaves(arrays)[0].shape[:2]
    chunk = rows_per_call(rows, positions * vocab)
    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), arrays)
    terms = jax.lax.map(lambda parts: terms_of(*parts), chunks)
    return jax.tree.map(lambda term: term.reshape(rows, positions), terms)


def splice_metrics(sums: SpliceTerms, ablated: AblationTerms) -> dict[str, np.ndarray]:
    """Metrics by key, each of the shape of the sums; NaN where undefined.

    `recovered` is the share of the loss between ablation and clean that x̂ wins back: 1 if the
    model does not notice, 0 if x̂ is as bad as zeros (or as the mean: `recovered_mean`).
    """
    clean, spliced, spliced_all, kl, mean, zero = (
        ratio(term, sums.predictions) for term in (*sums[1:], *ablated)
    )
    return {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_mean": mean,
        "ce_zero": zero,
        "ce_spliced_all": spliced_all,
        "delta_ce": spliced - clean,
        "delta_ce_all": spliced_all - clean,
        "recovered": ratio(zero - spliced, zero - clean),
        "recovered_mean": ratio(mean - spliced, mean - clean),
        "kl": kl,
    }
