"""What the reconstruction does to the language model: next-token loss with x̂ in place of x.

The residual stream x after a block is replaced by x̂, by the training mean or by zero, and the rest
of the model runs on from there. As in `reconstruction`, device terms first, metrics from sums.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.evaluation.bootstrap import ratio

# Three or four float32 arrays of so many logits are alive at a time: 128 MiB each.
MAX_LOGITS = 2**25

RunOn = Callable[[Array, Array], Array]  # hidden [B, S, D], segments [B, S] -> logits [B, S, V]


class SpliceInputs(NamedTuple):
    """B rows to run the rest of the model on."""

    x: Array | np.ndarray  # [B, S, D] residual stream
    reconstructed: Array | np.ndarray  # [B, S, D] x̂
    tokens: Array | np.ndarray  # [B, S] int32
    segments: Array | np.ndarray  # [B, S] int32: 0 padding, equal numbers one piece of text
    kept: Array | np.ndarray  # [B, S] bool: positions where x is replaced
    real: Array | np.ndarray  # [B, S] bool: positions where `ce_spliced_all` replaces x


class SpliceTerms(NamedTuple):
    """Additive terms, arrays of one shape; losses and divergence in nats."""

    predictions: Array | np.ndarray
    ce_clean: Array | np.ndarray
    ce_spliced: Array | np.ndarray
    ce_mean: Array | np.ndarray
    ce_zero: Array | np.ndarray
    ce_spliced_all: Array | np.ndarray
    kl: Array | np.ndarray  # KL(clean ‖ spliced) over the vocabulary


def no_terms(shape: tuple[int, ...]) -> SpliceTerms:
    """Terms where there is no language model: no predictions, so every metric is undefined."""
    return SpliceTerms(*(np.zeros(shape, np.float32) for _ in SpliceTerms._fields))


def predicted_positions(segments: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Positions t whose next token t + 1 belongs to the same segment."""
    continues = (segments[:, :-1] > 0) & (segments[:, :-1] == segments[:, 1:])
    return jnp.pad(continues, ((0, 0), (0, 1)))


def token_terms(run_on: RunOn, mean: Float[Array, " D"], inputs: SpliceInputs) -> SpliceTerms:
    """Terms [B, S] of predicting token t + 1 at position t, zero where there is no such token.

    Args:
      run_on: the model from the spliced layer on.
      mean: mean activation of the training stream, for the mean ablation.
      inputs: the rows; the clean and the spliced logits [B, S, V] are in memory together.
    """
    x, reconstructed, tokens, segments, kept, real = inputs
    following = jnp.roll(tokens, -1, axis=1)[..., None]  # [B, S, 1]

    def log_probs(hidden: Array) -> Array:
        return jax.nn.log_softmax(run_on(hidden, segments), axis=-1)

    def loss(log_p: Array) -> Array:
        return -jnp.take_along_axis(log_p, following, axis=-1)[..., 0]

    def replace(mask: Array, value: Array | float) -> Array:
        return jnp.where(mask[..., None], value, x)

    clean, spliced = jax.lax.map(log_probs, jnp.stack([x, replace(kept, reconstructed)]))
    ablated = [replace(kept, mean), replace(kept, 0.0), replace(real, reconstructed)]
    ce_mean, ce_zero, ce_spliced_all = jax.lax.map(
        lambda hidden: loss(log_probs(hidden)), jnp.stack(ablated)
    )
    terms = SpliceTerms(
        predictions=jnp.ones_like(ce_mean),
        ce_clean=loss(clean),
        ce_spliced=loss(spliced),
        ce_mean=ce_mean,
        ce_zero=ce_zero,
        ce_spliced_all=ce_spliced_all,
        kl=jnp.sum(jnp.exp(clean) * (clean - spliced), axis=-1),
    )
    predicted = predicted_positions(segments)
    return jax.tree.map(lambda term: jnp.where(predicted, term, 0.0), terms)


def rows_per_call(rows: int, logits_per_row: int) -> int:
    """The largest divisor of `rows` that keeps within MAX_LOGITS, at least 1."""
    most = max(1, min(rows, MAX_LOGITS // logits_per_row))
    return next(r for r in range(most, 0, -1) if rows % r == 0)


def token_terms_by_rows(
    run_on: RunOn, mean: Float[Array, " D"], inputs: SpliceInputs, vocab: int
) -> SpliceTerms:
    """`token_terms`, a few rows at a time so that the logits [rows, S, V] fit into memory."""
    rows, positions = inputs.tokens.shape
    chunk = rows_per_call(rows, positions * vocab)
    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), inputs)
    terms = jax.lax.map(partial(token_terms, run_on, mean), chunks)
    return jax.tree.map(lambda term: term.reshape(rows, positions), terms)


def splice_metrics(sums: SpliceTerms) -> dict[str, np.ndarray]:
    """Metrics by key, each of the shape of the sums; NaN where undefined.

    `recovered` is the share of the loss between ablation and clean that x̂ wins back: 1 if the
    model does not notice, 0 if x̂ is as bad as zeros (or as the mean: `recovered_mean`).
    """
    clean, spliced, mean, zero, spliced_all, kl = (
        ratio(term, sums.predictions) for term in sums[1:]
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
