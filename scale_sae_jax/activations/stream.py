"""Activations made as they are trained on: from the language model to the autoencoder on devices.

Training takes its batches from a buffer of `config.activations.buffer` batches (or of all that a
run takes, if these are fewer). The model fills it
from the next rows of text; each device shuffles the activations of its own rows, and gives batches
until the buffer is used up. It reads as many rows as fill it, judged by what the masks keep of the
first ones, and takes no activation of them twice; a text with fewer rows is read again. Of
several processes each reads its own documents, every P-th of the text. What a buffer holds is a
pure function of the text, the seed and its number, so a resumed run goes on with the same batches,
on the same mesh and processes. Nothing is written, and no activation passes through a host; tokens
that the masks leave out are never trained on.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int64, UInt64

from scale_sae_jax.activations.forward import ReadableModel, params_on, refuse_not_finite
from scale_sae_jax.activations.masks import keep, largest_norm, nothing_kept, token_flags
from scale_sae_jax.config import Config
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel import processes
from scale_sae_jax.parallel.mesh import EVERYWHERE, TOKENS
from scale_sae_jax.sae.shards import DATA, EXPERT
from scale_sae_jax.text.packing import TokenRow, TokenRows, pack, row_batches
from scale_sae_jax.text.splits import document_hash, training_documents

# A buffer reads rows for SPARE times the activations that it needs, as later text may keep less;
# and by chance a device's rows keep so many standard deviations less than they do on average.
SPARE, DEVIATIONS = 1.1, 4.0
BATCHES = PartitionSpec(None, *TOKENS)
FIRST_ROWS = -1  # in the place of a buffer's number
Progress = Callable[[int, int, int], None]


class ActivationStream:
    """The output of one block of a model on endless passes over the training text.

    mean, median_norm: of the kept activations of the first rows, which later ones are held
    against. n: activations that one run takes, counted as `batch_size * steps`. d: their width.

    Args:
      progress: called with (number of the buffer that is filled or `FIRST_ROWS`, positions that the
        model has read, positions in all), in every process alike. What it raises ends the filling.
    """

    def __init__(
        self, lm: ReadableModel, config: Config, mesh: Mesh,
        progress: Progress = lambda buffer, done, total: None,
    ):
        self._lm, self._config, self._mesh, self._progress = lm, config, mesh, progress
        self._params = params_on(mesh, lm, config.lm)
        self._rows_per_call = -(-config.lm.rows_per_batch // mesh.size) * mesh.size
        self._size = min(config.activations.buffer, config.steps)  # batches
        self._needed = self._size * (config.batch_size // mesh.size)  # by a device
        self._run, self._mix = jax.jit(self._forward), self._make_mix()
        self._number, self._buffer = -1, None
        self._rows: Iterator[TokenRows] = iter(())
        self.median_norm, self._limit, self.mean, self._calls = self._statistics()
        self.d, self.n = len(self.mean), config.batch_size * config.steps

    def documents(self) -> UInt64[np.ndarray, " H"]:
        """Sorted hashes of all documents that may be trained on."""
        hashes = (document_hash(d.text) for d in training_documents(self._config.text))
        return np.unique(np.fromiter(hashes, np.uint64))

    def batches(self, first: int, last: int, room: int) -> Float32[Array, "C T D"]:
        """The batches of steps first ... last - 1 on the mesh; the rest of `room` is void."""
        size = self._size
        steps = [min(step, last - 1) for step in range(first, first + room)]
        places = np.array([step % size for step in steps], np.int32)
        return _stack([self._buffer_of(step // size) for step in steps], places)

    def rows(self, ids: Int64[np.ndarray, " T"]) -> Float32[np.ndarray, "T D"]:
        """A sample of as many rows as there are ids, from the first buffer: for principal axes."""
        buffer, each = self._buffer_of(0), self._config.batch_size
        at = np.divmod(ids % (self._size * each), each)  # (batch, row in it)
        return np.asarray(_taken(buffer, *at, NamedSharding(self._mesh, EVERYWHERE)))

    def _forward(
        self, params: Any, tokens: Array, segments: Array, allowed: Array, limit: Array
    ) -> tuple[Array, Array, Array]:
        """Hidden states [R, S, D], which are kept, and their norms [R, S]."""
        layer, dtype = self._config.lm.layer, self._config.activations.dtype
        hidden = self._lm.run_to(params, tokens, segments, layer).astype(dtype)
        norms = jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1)
        return hidden, allowed & ~(norms > limit), norms

    def _calls_of(self, number: int) -> Iterator[tuple[Array, Array, Array]]:
        """The model on the rows of buffer `number`; goes on in the text if it is the next one."""
        if number != self._number + 1 or number == 0:
            self._rows = islice(self._endless_rows(), number * self._calls, None)
        rows, self._number = islice(self._rows, self._calls), FIRST_ROWS  # if this does not end
        yield from self._model_on(rows, self._calls, self._limit, number)
        self._number = number

    def _model_on(
        self, calls: Iterable[TokenRows], count: int, limit: float, buffer: int
    ) -> Iterator[tuple[Array, Array, Array]]:
        """What `_forward` returns for the rows of each of `count` calls, one ahead of progress."""
        by_row = NamedSharding(self._mesh, TOKENS)
        special = self._lm.tokenizer.special_ids
        a_call = self._rows_per_call * self._config.text.context
        before = None
        for done, rows in enumerate(calls):
            flags = token_flags(rows.tokens, rows.segments, special)
            inputs = rows.tokens, rows.segments, keep(flags, self._config.activations)
            here = (jax.make_array_from_process_local_data(by_row, array) for array in inputs)
            result = self._run(self._params, *here, np.float32(limit))
            jax.block_until_ready(before)
            self._progress(buffer, done * a_call, count * a_call)
            yield result
            before = result
        self._progress(buffer, count * a_call, count * a_call)

    def _endless_rows(self) -> Iterator[TokenRows]:
        """This process's rows of each call, passes over its documents one after the other.

        A call may end one pass and begin the next: rows of padding would leave a buffer short.
        """
        text, tokenizer = self._config.text, self._lm.tokenizer
        number, count = jax.process_index(), jax.process_count()

        def one_pass() -> Iterator[TokenRow]:
            documents = islice(training_documents(text), number, None, count)
            return pack(documents, tokenizer, text.context, text.packing, text.bos)

        if next(one_pass(), None) is None:
            raise UserError(f"{text.path} has no document to train on: give more text")
        rows = (row for _ in repeat(None) for row in one_pass())
        return row_batches(rows, self._rows_per_call // count)

    def _statistics(self) -> tuple[float, float, Float32[np.ndarray, " D"], int]:
        """Of the first rows: median norm, that of an outlier, mean without outliers, and calls that
        a buffer takes.

        They are as many rows as would fill a buffer if all of their positions were kept.
        """
        calls = self._calls_for(self._config.text.context - 1.0, 0.0)
        rows = islice(self._endless_rows(), calls)
        results = list(self._model_on(rows, calls, np.inf, FIRST_ROWS))
        kept = np.concatenate([processes.everywhere(r[1]) for r in results])
        norms = np.concatenate([processes.everywhere(r[2]) for r in results])
        if not kept.any():
            raise nothing_kept()
        refuse_not_finite(norms[kept])
        median = float(np.median(norms[kept]))
        limit = largest_norm(median, self._config.activations.max_norm_ratio)

        def add(hidden: Array, kept: Array, norms: Array) -> Array:
            inside = kept & (norms <= limit)
            return jnp.where(inside[..., None], hidden, 0).astype(jnp.float32).sum((0, 1))

        sums = [processes.everywhere(jax.jit(add)(*result)) for result in results]
        by_row = (kept & (norms <= limit)).sum(1)
        if not by_row.any():
            raise nothing_kept()
        mean = (np.sum(sums, axis=0, dtype=np.float64) / by_row.sum()).astype(np.float32)
        return median, limit, mean, self._calls_for(by_row.mean(), by_row.std())

    def _calls_for(self, mean: float, deviation: float) -> int:
        """Calls that fill a buffer with rows of which so many activations are kept.

        The least R rows a device with R mean - DEVIATIONS deviation sqrt(R) >= SPARE needed.
        """
        chance = DEVIATIONS * deviation
        root = (chance + np.sqrt(chance**2 + 4 * mean * SPARE * self._needed)) / (2 * mean)
        return int(np.ceil(root**2 * self._mesh.size / self._rows_per_call))

    def _buffer_of(self, number: int) -> Float32[Array, "B T D"]:
        """The batches of buffer `number`; the one used last is kept."""
        if self._buffer is None or self._buffer[0] != number:
            self._buffer = None
            self._buffer = number, self._fill(number)
        return self._buffer[1]

    def _fill(self, number: int) -> Float32[Array, "B T D"]:
        results = list(self._calls_of(number))
        hidden, kept = ([r[place] for r in results] for place in (0, 1))
        key = jax.random.fold_in(jax.random.key(self._config.seed), number)
        mixed, fewest = self._mix(hidden, kept, key)
        if int(fewest) < self._needed:
            raise UserError(
                f"config.activations.buffer: the rows of buffer {number} keep {int(fewest)} of the "
                f"{self._needed} activations that each device needs, far less than the first rows: "
                "shuffle the documents, take --config.text.packing=pack, or train from a store "
                "(buffer=0)"
            )
        return mixed

    def _make_mix(self) -> Any:
        """Jitted (hidden, kept, key) -> batches [B, T, D], and the least kept on any device."""
        batches = self._size
        own = self._config.batch_size // self._mesh.size

        def on_device(hidden: list[Array], kept: list[Array], key: Array) -> tuple[Array, Array]:
            flat = jnp.concatenate([h.reshape(-1, h.shape[-1]) for h in hidden])
            inside = jnp.concatenate([k.reshape(-1) for k in kept])
            key = jax.random.fold_in(key, jax.lax.axis_index((DATA, EXPERT)))
            order = jnp.where(inside, jax.random.uniform(key, inside.shape), 2.0).argsort()
            x = flat[order[: self._needed]].astype(jnp.float32).reshape(batches, own, -1)
            return x, jax.lax.pmin(inside.sum(), (DATA, EXPERT))

        return jax.jit(jax.shard_map(
            on_device, mesh=self._mesh, in_specs=(TOKENS, TOKENS, EVERYWHERE),
            out_specs=(BATCHES, EVERYWHERE), check_vma=False,
        ))


@partial(jax.jit, static_argnums=3)
def _taken(buffer: Array, batch: Array, row: Array, where: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(buffer[batch, row], where)


@jax.jit
def _stack(buffers: list[Array], places: Array) -> Array:
    """One batch of each buffer."""
    return jnp.stack([buffer[place] for buffer, place in zip(buffers, places, strict=True)])
