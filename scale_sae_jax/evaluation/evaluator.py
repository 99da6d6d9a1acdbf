"""The evaluator: one pass over held-out batches, then every key of the results in one flat dict.

A batch costs one call of a jitted function, and one more for the language model; the host keeps
float64 sums per document and a few integers per token.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from scale_sae_jax.activations.masks import largest_norm
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation import experts, reconstruction, redundancy, sparsity, splice
from scale_sae_jax.evaluation.bootstrap import (
    interval,
    merge_documents,
    ratio,
    resample,
    sum_by_document,
)
from scale_sae_jax.evaluation.flops import forward_flops
from scale_sae_jax.parallel import processes

WITH_INTERVAL = ("mse", "fvu", "delta_ce", "l0")
CODES = 2**25  # see `few_rows`
TRAINING_KEYS = (
    "tokens_seen", "train_seconds", "tokens_per_second", "seconds_per_step", "trained_together",
)


@runtime_checkable
class SparseAutoencoder(Protocol):
    """What the evaluator asks of an autoencoder, of whatever architecture."""

    width: int
    latents: int
    experts: int
    active: int
    k: int
    sparse_codes: bool  # decoding reads k rows a token, else all active latents

    def encode(self, params: PyTree, x: Array) -> Any: ...
    def decode(self, params: PyTree, codes: Any) -> Array: ...
    def route(self, params: PyTree, x: Array) -> Any: ...
    def decoder(self, params: PyTree) -> Array: ...
    def n_params(self, params: PyTree) -> int: ...


@runtime_checkable
class SplicedModel(Protocol):
    """What it asks of a language model.

    without_params: the same, with None for `params`, equal by value: what is compiled for it stays
    in memory, and must not keep parameters there.
    """

    params: PyTree
    vocab: int

    def without_params(self) -> "SplicedModel": ...
    def run_from(self, params: PyTree, hidden: Array, segments: Array, layer: int) -> Array: ...


class EvalBatch(NamedTuple):
    """B rows of S held-out tokens. Rows of a plain array of activations come with S = 1."""

    x: Array | np.ndarray  # [B, S, D] float32 activations
    tokens: np.ndarray | None  # [B, S] int32 token ids, None for an array of activations
    segments: np.ndarray  # [B, S] int32: 0 padding, equal numbers one piece of a document
    documents: np.ndarray  # [B, S] int64 document, -1 padding; blocks of rows of an array
    scored: np.ndarray  # [B, S] bool: counts unless it is an outlier
    real: np.ndarray  # [B, S] bool: not padding
    ablated: splice.AblationTerms | None = None  # see `with_ablations`


def few_rows(sae: SparseAutoencoder, batches: Iterable[EvalBatch]) -> Iterator[EvalBatch]:
    """Batches in equal parts, of rows whose codes take no more than `CODES` values and ids.

    For those who take codes to the host: without k slots, a token has one for every active latent.
    """
    slots = sae.k if sae.sparse_codes else sae.active * (sae.latents // sae.experts)
    for batch in batches:
        rows, length = batch.segments.shape
        most = max(CODES // (length * slots), 1)
        size = max(n for n in range(1, min(most, rows) + 1) if rows % n == 0)
        for start in range(0, rows, size):
            yield jax.tree.map(lambda array: array[start : start + size], batch)


class TokenTerms(NamedTuple):
    """Terms that are summed per document beside those of the splice, arrays of one shape."""

    reconstruction: reconstruction.ReconstructionTerms
    l0: Array | np.ndarray
    router_entropy: Array | np.ndarray  # nats


class BatchResult(NamedTuple):
    """What the device computes from one batch without the language model."""

    reconstructed: Array  # [B, S, D]
    kept: Array  # [B, S] scored and no outlier
    terms: TokenTerms  # [B, S] each
    experts: Array  # [B, S, e]
    firing: Array  # [L] kept tokens that each latent fires for


def measure(
    sae: SparseAutoencoder,
    params: PyTree,
    x: Float[Array, "B S D"],
    scored: Bool[Array, "B S"],
    real: Bool[Array, "B S"],
    mean: Float[Array, " D"],
    max_norm: Float[Array, ""],
) -> BatchResult:
    """Encodes and decodes one batch; scored tokens with a norm over `max_norm` are not kept."""
    flat = x.reshape(-1, x.shape[-1])
    codes, routing = sae.encode(params, flat), sae.route(params, flat)
    reconstructed = sae.decode(params, codes).reshape(x.shape)
    kept = kept_tokens(x, scored, max_norm)
    fired = (codes.values != 0) & kept.reshape(-1, 1)
    entropy = jax.scipy.special.entr(routing.probs).sum(axis=-1).reshape(kept.shape)
    terms = TokenTerms(
        reconstruction=reconstruction.token_terms(x, reconstructed, mean, kept, real),
        l0=fired.sum(axis=-1).reshape(kept.shape),
        router_entropy=jnp.where(kept, entropy, 0.0),
    )
    return BatchResult(
        reconstructed=reconstructed,
        kept=kept,
        terms=terms,
        experts=routing.experts.reshape(*kept.shape, -1),
        firing=sparsity.firing_counts(codes.ids, fired, sae.latents),
    )


def kept_tokens(
    x: Float[Array, "B S D"], scored: Bool[Array, "B S"], max_norm: Float[Array, ""]
) -> Bool[Array, "B S"]:
    """Scored tokens that are no outliers."""
    return scored & (jnp.linalg.norm(x, axis=-1) <= max_norm)


@partial(jax.jit, static_argnums=(0, 1))
def measure_splice(
    lm: SplicedModel,
    layer: int,
    lm_params: PyTree,
    rows: splice.Rows,
    reconstructed: Float[Array, "B S D"],
    real: Bool[Array, "B S"],
) -> splice.SpliceTerms:
    """Terms [B, S] of the language model run on from the output of block `layer`."""
    terms_of = partial(splice.splice_terms, _run_on(lm, layer, lm_params))
    return splice.by_rows(terms_of, lm.vocab, rows, reconstructed, real)


def with_ablations(
    batch: EvalBatch,
    lm: SplicedModel,
    layer: int,
    mean: Float[np.ndarray | Array, " D"],
    max_norm: float,
) -> EvalBatch:
    """The batch with what the language model loses to mean and zero ablation on it.

    No autoencoder changes that: a batch which several are measured on is given it once. `mean` and
    `max_norm` must be those of `evaluate`.
    """
    inputs = batch.x, batch.tokens, batch.segments, batch.scored
    over = np.asarray(mean), np.float32(max_norm)
    terms = _ablate(lm.without_params(), layer, lm.params, *over, *inputs)
    return batch._replace(ablated=jax.device_get(terms))


@partial(jax.jit, static_argnums=(0, 1))
def _ablate(
    lm: SplicedModel,
    layer: int,
    lm_params: PyTree,
    mean: Float[Array, " D"],
    max_norm: Float[Array, ""],
    x: Float[Array, "B S D"],
    tokens: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    scored: Bool[Array, "B S"],
) -> splice.AblationTerms:
    rows = splice.Rows(x, tokens, segments, kept_tokens(x, scored, max_norm))
    terms_of = partial(splice.ablation_terms, _run_on(lm, layer, lm_params), mean)
    return splice.by_rows(terms_of, lm.vocab, rows)


def _run_on(lm: SplicedModel, layer: int, lm_params: PyTree) -> splice.RunOn:
    return lambda hidden, segments: lm.run_from(lm_params, hidden, segments, layer)


def count_tokens(batch: EvalBatch, kept: Bool[np.ndarray, "B S"]) -> dict[str, int]:
    """Real tokens by what became of them: the first four add up to the fifth.

    `eval_position_0` counts excluded tokens at the start of a segment, `eval_special` all other
    excluded ones.
    """
    starts = np.diff(batch.segments, axis=1, prepend=0) != 0
    excluded = batch.real & ~batch.scored
    return {
        "eval_tokens": int(kept.sum()),
        "eval_outliers": int((batch.scored & ~kept).sum()),
        "eval_position_0": int((excluded & starts).sum()),
        "eval_special": int((excluded & ~starts).sum()),
        "eval_tokens_all": int(batch.real.sum()),
    }


def cost_metrics(
    sae: SparseAutoencoder, params: PyTree
) -> dict[str, int]:
    """Compute and size of the autoencoder."""
    flops = forward_flops(
        sae.width,
        sae.latents,
        sae.experts,
        sae.active,
        sae.k,
        sparse_decoder=sae.sparse_codes,
    )
    return {
        "flops_per_token": flops.total,
        "flops_encoder": flops.encoder,
        "flops_router": flops.router,
        "flops_decoder": flops.decoder,
        "active_width": sae.active * (sae.latents // sae.experts),
        "total_width": sae.latents,
        "params": sae.n_params(params),
    }


def sum_metrics(
    sums: tuple[TokenTerms, splice.SpliceTerms, splice.AblationTerms]
) -> dict[str, np.ndarray]:
    """Every metric that is a function of sums over tokens, of the shape of the sums."""
    terms, spliced, ablated = sums
    tokens = terms.reconstruction.tokens
    return {
        **reconstruction.reconstruction_metrics(terms.reconstruction),
        "l0": ratio(terms.l0, tokens),
        **splice.splice_metrics(spliced, ablated),
        "router_entropy": ratio(terms.router_entropy, tokens),
    }


def json_value(value: Any) -> float | int | list | str | None:
    """A value as JSON holds it: NumPy scalars as numbers, undefined (not finite) ones as None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


class Tally(NamedTuple):
    """What was found in all batches.

    documents [C]: those that had real tokens. sums: of the terms of their tokens, arrays [C].
    counts: see `count_tokens`. firing [L]: kept tokens that each latent fires for. Of each of the n
    kept tokens: l0 [n], experts [n, e], tokens [n] (ids, None where a batch had none).
    """

    documents: np.ndarray
    sums: tuple[TokenTerms, splice.SpliceTerms, splice.AblationTerms]
    counts: Counter
    firing: np.ndarray
    l0: np.ndarray
    experts: np.ndarray
    tokens: np.ndarray | None


def tally(
    sae: SparseAutoencoder,
    params: PyTree,
    batches: Iterable[EvalBatch],
    mean: Float[np.ndarray, " D"],
    max_norm: float,
    lm: SplicedModel | None,
    layer: int | None,
    progress: Callable[[int], object] | None,
) -> Tally:
    """Runs the autoencoder over all batches, and the language model; arguments as of `evaluate`.

    Raises UserError if no token is left to evaluate.
    """
    run, limit = jax.jit(partial(measure, sae)), np.float32(max_norm)
    parts, counts, firing = [], Counter(), np.zeros(sae.latents, np.int64)
    l0, selected, token_ids = [], [], []
    for batch in batches:
        on_devices = run(params, batch.x, batch.scored, batch.real, mean, limit)
        result = processes.everywhere(on_devices)
        if lm is None:
            spliced, ablated = splice.no_terms(batch.real.shape)
        else:
            rows = splice.Rows(batch.x, batch.tokens, batch.segments, result.kept)
            arrays = rows, result.reconstructed, batch.real
            spliced = measure_splice(lm.without_params(), layer, lm.params, *arrays)
            if batch.ablated is None:
                batch = with_ablations(batch, lm, layer, mean, max_norm)
            ablated = batch.ablated
        kept, terms = result.kept, (result.terms, spliced, ablated)
        terms = jax.tree.map(lambda t: np.asarray(t)[batch.real], terms)
        parts.append(sum_by_document(batch.documents[batch.real], terms))
        counts.update(count_tokens(batch, kept))
        firing += result.firing
        l0.append(result.terms.l0[kept])
        selected.append(result.experts[kept])
        token_ids.append(None if batch.tokens is None else batch.tokens[kept])
        if progress is not None:
            progress(int(batch.real.sum()))
    if not counts["eval_tokens"]:
        raise UserError(
            "evaluation: none of the held-out tokens counts: position 0, special tokens and norms "
            f"over {max_norm:.3g} (max_norm_ratio times the median) do not; give more held-out text"
        )
    known = all(ids is not None for ids in token_ids)
    return Tally(
        *merge_documents(parts),
        counts,
        firing,
        np.concatenate(l0),
        np.concatenate(selected),
        np.concatenate(token_ids) if known else None,
    )


def evaluate(
    sae: SparseAutoencoder,
    params: PyTree,
    batches: Iterable[EvalBatch],
    *,
    mean: Float[np.ndarray | Array, " D"],
    median_norm: float,
    max_norm_ratio: float,
    lm: SplicedModel | None = None,
    layer: int | None = None,
    training: Mapping[str, float | int | None],
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float | int | list | str | None]:
    """Measures an autoencoder on held-out activations.

    Sparsity, routing, redundancy and all metrics without `_all` look at tokens that are scored and
    no outliers. A key that cannot be defined is None.

    Args:
      sae: the autoencoder; `params` are its parameters.
      batches: held-out batches, all of one shape if they are to compile once. The ablations are
        run for those that come without them.
      mean: mean activation of the training stream.
      median_norm: median activation norm of the training stream.
      max_norm_ratio: tokens over this multiple of it are outliers; 0 means there are none.
      lm: the language model to splice into; None if there is none (an array of activations).
      layer: 0-based block whose output the activations are; needed with `lm`.
      training: `TRAINING_KEYS`, copied into the result.
      bootstrap: resamplings of the documents for the 95 % intervals; 0 for none.
      seed: of the resampling and of the shuffle for `expert_mi_null`.
      progress: called after each batch with its number of real tokens (`tqdm.update` fits).

    Raises:
      UserError: if no token is left to evaluate.
    """
    max_norm = float(largest_norm(median_norm, max_norm_ratio))
    mean = np.asarray(mean, np.float32)
    seen = tally(sae, params, batches, mean, max_norm, lm, layer, progress)
    totals = sum_metrics(jax.tree.map(np.sum, seen.sums))
    draws = sum_metrics(resample(seen.sums, bootstrap, seed))
    decoder = processes.everywhere(sae.decoder(params))
    results = {
        **totals,
        **{f"{key}_ci95": interval(draws[key]) for key in WITH_INTERVAL},
        **sparsity.l0_percentiles(seen.l0),
        **sparsity.density_metrics(seen.firing, seen.counts["eval_tokens"]),
        **redundancy.redundancy_metrics(decoder, seen.firing > 0, sae.experts),
        **experts.expert_metrics(seen.tokens, seen.experts, sae.experts, seed),
        **cost_metrics(sae, params),
        **{key: training.get(key) for key in TRAINING_KEYS},
        **seen.counts,
        "eval_documents": len(seen.documents),
    }
    return {key: json_value(value) for key, value in results.items()}
