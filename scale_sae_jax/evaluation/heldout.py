"""Held-out batches for the evaluator, from documents or from an array of activations."""

from collections.abc import Iterable, Iterator
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from scale_sae_jax.activations.array import ActivationArray
from scale_sae_jax.activations.masks import evaluated, keep, token_flags
from scale_sae_jax.activations.synthetic import SyntheticActivations
from scale_sae_jax.config import Config
from scale_sae_jax.evaluation.evaluator import EvalBatch
from scale_sae_jax.lm.load import LanguageModel
from scale_sae_jax.text.packing import pack, row_batches
from scale_sae_jax.text.sources import Document

ARRAY_ROWS = 2048
ARRAY_BLOCK = 128  # neighbouring rows that stand in for a document in the intervals


def text_batches(
    config: Config, lm: LanguageModel, documents: Iterable[Document]
) -> Iterator[EvalBatch]:
    """Batches of about `config.eval.tokens` real tokens, run to `config.lm.layer`."""
    run_to = jax.jit(lambda *row: lm.run_to(*row).astype(jnp.float32), static_argnums=3)
    text = config.text
    wanted = -(-config.eval.tokens // text.context)
    rows = islice(pack(documents, lm.tokenizer, text.context, text.packing, text.bos), wanted)
    masks = evaluated(config.activations)
    for batch in row_batches(rows, min(config.lm.rows_per_batch, wanted)):
        flags = token_flags(batch.tokens, batch.segments, lm.tokenizer.special_ids)
        yield EvalBatch(
            x=run_to(lm.params, batch.tokens, batch.segments, config.lm.layer),
            tokens=batch.tokens,
            segments=batch.segments,
            documents=batch.documents,
            scored=keep(flags, masks),
            real=~flags.padding,
        )


def array_batches(
    array: ActivationArray | SyntheticActivations, tokens: int
) -> Iterator[EvalBatch]:
    """The first `tokens` rows of a held-out array, each a row of one position."""
    for start in range(0, min(tokens, array.n), ARRAY_ROWS):
        ids = np.arange(start, start + ARRAY_ROWS)
        real = ids < min(tokens, array.n)
        x = array.rows(np.where(real, ids, 0))
        yield EvalBatch(
            x=x[:, None],
            tokens=None,
            segments=real[:, None].astype(np.int32),
            documents=np.where(real, ids // ARRAY_BLOCK, -1)[:, None],
            scored=real[:, None],
            real=real[:, None],
        )
