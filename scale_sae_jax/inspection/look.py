"""Everything that a dashboard shows of an autoencoder, from one pass over text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import sparse

from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.evaluator import EvalBatch, few_rows, kept_tokens
from scale_sae_jax.inspection import contexts, directions, profiles, vocabulary
from scale_sae_jax.lm.load import LanguageModel
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.codes import Codes

WORDS, NEIGHBOURS, PROFILE = 10, 6, 24


@dataclass(frozen=True)
class Findings:
    """What was found of L latents in N experts; plan: how much of each was kept."""

    plan: contexts.Plan
    contexts: contexts.Contexts
    words: vocabulary.Words
    nearest: directions.Nearest
    plane: directions.Plane
    profiles: list[profiles.Profile]


def look(
    lm: LanguageModel,
    sae: Autoencoder,
    params: Params,
    batches: Iterable[EvalBatch],
    *,
    max_norm: float = np.inf,
    plan: contexts.Plan = contexts.Plan(),
    progress: Callable[[int], object] = lambda tokens: None,
) -> Findings:
    """Reads the batches once, one at a time, and then the decoder.

    Args:
      batches: rows of text with their activations (`evaluation.heldout.text_batches`).
      max_norm: activations with a larger norm do not count.
      progress: called after each batch with its number of real tokens.

    Raises UserError if no token is left to look at.
    """
    run = jax.jit(partial(_encode, sae))
    seen = contexts.nothing_read(sae.latents, plan)
    counts = sparse.csr_array((sae.experts, lm.vocab), dtype=np.int64)
    for batch in few_rows(sae, batches):
        codes, experts, kept = jax.tree.map(
            np.asarray, run(params, batch.x, batch.scored, np.float32(max_norm))
        )
        seen = contexts.read(seen, plan, *codes, kept, batch.tokens, batch.segments)
        counts = counts + profiles.routed(batch.tokens[kept], experts[kept], counts.shape)
        progress(int(batch.real.sum()))
    if not seen.tokens:
        raise UserError("none of the text's tokens is left after the masks: give more text")
    decoder, live = sae.decoder(params), seen.firing > 0
    return Findings(
        plan=plan,
        contexts=seen,
        words=vocabulary.words(lm, decoder, WORDS),
        nearest=directions.nearest(decoder, live, sae.experts, NEIGHBOURS),
        plane=directions.plane(decoder, live),
        profiles=profiles.profiles(counts, PROFILE),
    )


def _encode(
    sae: Autoencoder,
    params: Params,
    x: Float[Array, "B S D"],
    scored: Bool[Array, "B S"],
    max_norm: Float[Array, ""],
) -> tuple[Codes, Int[Array, "B S E"], Bool[Array, "B S"]]:
    """Codes, selected experts, and the positions that count."""
    kept = kept_tokens(x, scored, max_norm)
    return sae.encode(params, x), sae.route(params, x).experts, kept
