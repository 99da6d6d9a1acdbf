"""The language model over batches of token rows, on all local devices, up to one layer."""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scale_sae_jax.activations.masks import Fate, fates, token_flags
from scale_sae_jax.activations.store import STORED
from scale_sae_jax.config import ActivationsConfig, LMConfig
from scale_sae_jax.errors import UserError
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

    The next batch is dispatched before a result is waited for. Rows are sharded over all local
    devices if they divide evenly, else one device does the work. Raises UserError if a kept
    activation is not finite.
    """
    dtype = jnp.dtype(config.dtype)

    @jax.jit
    def run(params: Any, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = lm.run_to(params, tokens, segments, lm_config.layer).astype(jnp.float32)
        return hidden.astype(dtype), jnp.linalg.norm(hidden, axis=-1)

    def dispatch(batch: TokenRows) -> tuple[TokenRows, tuple[jax.Array, jax.Array]]:
        return batch, run(params, *jax.device_put((batch.tokens, batch.segments), by_row))

    devices = jax.local_devices()
    if lm_config.rows_per_batch % len(devices):
        devices = devices[:1]
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    params = jax.device_put(lm.params, NamedSharding(mesh, PartitionSpec()))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    for (batch, result), _ in pairwise(chain(map(dispatch, batches), (None,))):
        yield _slab(batch, *jax.device_get(result), lm.tokenizer.special_ids, config)


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
    if not np.isfinite(norms[fate == Fate.KEPT]).all():
        raise UserError(
            "the language model gives NaN or infinity at config.lm.layer: check its weights, or "
            "take --config.lm.dtype=float32"
        )
    x = hidden[:rows].reshape(-1, hidden.shape[-1]).view(STORED[config.dtype])
    return Slab(x, norms, fate, batch.documents[:rows].reshape(-1), batch.short)
