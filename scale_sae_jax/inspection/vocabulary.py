"""Which next tokens a latent speaks for and against: its decoder direction through the unembedding.

`LanguageModel.direct_logits` of a direction, less its mean over the vocabulary (which no softmax
sees). It tells what the latent adds to the residual stream means to the unembedding if later blocks
only pass it on; of a latent in an early layer that is a hint and no more.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scale_sae_jax.lm.load import LanguageModel

BLOCK = 256  # latents whose logits [., V] are in memory at a time


class Words(NamedTuple):
    """Token ids [L, k] that each latent promotes and suppresses most, with their logits."""

    promoted: Int[np.ndarray, "L k"]
    promoted_logits: Float[np.ndarray, "L k"]
    suppressed: Int[np.ndarray, "L k"]
    suppressed_logits: Float[np.ndarray, "L k"]


def words(lm: LanguageModel, decoder: Float[Array | np.ndarray, "L D"], k: int) -> Words:
    """The k most promoted and suppressed tokens of the tokenizer's vocabulary for each latent."""
    find = jax.jit(partial(_words_of, lm, min(k, lm.tokenizer.vocab)))
    blocks = range(0, len(decoder), BLOCK)
    parts = [find(lm.params, jnp.asarray(decoder[start : start + BLOCK])) for start in blocks]
    return Words(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _words_of(lm: LanguageModel, k: int, lm_params: dict, rows: Float[Array, "n D"]) -> Words:
    logits = lm.direct_logits(lm_params, rows)[:, : lm.tokenizer.vocab]
    logits = logits - logits.mean(-1, keepdims=True)
    best, worst = jax.lax.top_k(logits, k), jax.lax.top_k(-logits, k)
    return Words(best[1], best[0], worst[1], -worst[0])
