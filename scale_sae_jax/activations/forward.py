"""The language model over batches of token rows, on all devices, up to one layer."""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from scale_sae_jax.activations.masks import Fate, fates, token_flags
from scale_sae_jax.activations.store import STORED
from scale_sae_jax.config import ActivationsConfig, LMConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel.mesh import TOKENS, local_mesh, model_specs, placed
from scale_sae_jax.text.packing import TokenRows


@runtime_checkable
class ReadableModel(Protocol):
    """What harvesting asks of a language model."""

    name: str
    sha256: str
    params: Any
    tokenizer: Any

    def run_to(self, params: Any, tokens: Any, segments: Any, layer: int) -> Any: ...


class Slab(NamedTuple):
    """The P positions of one batch of rows in order, without the rows that only fill it up."""

    x: np.ndarray  # [P, D] in the stored dtype
    norms: np.ndarray  # [P] float32
    fates: np.ndarray  # [P] int8
    documents: np.ndarray  # [P] int64 running index, -1 padding
    short: int  # pieces dropped by packing


def run_model(
    lm: ReadableModel,
    lm_config: LMConfig,
    batches: Iterable[TokenRows],
    config: ActivationsConfig,
) -> Iterator[Slab]:
    """The output of block `lm_config.layer` on each batch; no later block is run.

    The next batch is dispatched before a result is waited for. Rows are split over the devices of
    this process; other processes run their own. Raises UserError if a kept activation is not
    finite.
    """
    dtype = jnp.dtype(config.dtype)

    @jax.jit
    def run(params: Any, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = lm.run_to(params, tokens, segments, lm_config.layer).astype(jnp.float32)
        return hidden.astype(dtype), jnp.linalg.norm(hidden, axis=-1)

    def dispatch(batch: TokenRows) -> tuple[TokenRows, tuple[jax.Array, jax.Array]]:
        filled = [
            np.pad(array, ((0, -len(array) % mesh.size), (0, 0)))
            for array in (batch.tokens, batch.segments)
        ]
        return batch, run(params, *jax.device_put(filled, by_row))

    mesh = local_mesh()
    params = params_on(mesh, lm, lm_config)
    by_row = NamedSharding(mesh, TOKENS)
    for (batch, result), _ in pairwise(chain(map(dispatch, batches), (None,))):
        whole = (array[: len(batch.tokens)] for array in jax.device_get(result))
        yield _slab(batch, *whole, lm.tokenizer.special_ids, config)


def params_on(mesh: Mesh, lm: ReadableModel, config: LMConfig) -> Any:
    """The model's parameters on the devices that run it."""
    specs = model_specs(lm.params, mesh, config.split_params)
    return jax.device_put(lm.params, placed(mesh, specs))


def refuse_not_finite(norms: Float[np.ndarray, " T"]) -> None:
    """Raises UserError for norms of kept activations that are not all finite."""
    if not np.isfinite(norms).all():
        raise UserError(
            "the language model gives NaN or infinity at config.lm.layer: check its weights, or "
            "take --config.lm.dtype=float32"
        )


def _slab(
    batch: TokenRows,
    hidden: np.ndarray,
    norms: np.ndarray,
    special_ids: Collection[int],
    config: ActivationsConfig,
) -> Slab:
    rows = int((batch.segments[:, 0] > 0).sum())
    flags = token_flags(batch.tokens[:rows], batch.segments[:rows], special_ids)
    fate, norms = fates(flags, config).reshape(-1), norms[:rows].reshape(-1)
    refuse_not_finite(norms[fate == Fate.KEPT])
    x = hidden[:rows].reshape(-1, hidden.shape[-1]).view(STORED[config.dtype])
    return Slab(x, norms, fate, batch.documents[:rows].reshape(-1), batch.short)
