"""EleutherAI delphi's cache of latents, out: which latent fires where, for automatic explanations.

FOLDER/HOOKPOINT/{start}_{end}.safetensors for the latents start to end, both included:

    locations [n, 3] (row, position, latent - start), activations [n] float16, tokens [B, S]

and config.json beside them. delphi drops activations of at most 1e-5, and so does this.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.evaluation.evaluator import EvalBatch, few_rows, kept_tokens
from scale_sae_jax.interop import files
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.codes import Codes

LEAST = 1e-5
MOST = float(np.finfo(np.float16).max)
SHORT = 2**16  # what uint16 can count


class Firings(NamedTuple):
    """Non-zero codes in the order of row, position, latent."""

    locations: Int[np.ndarray, "F 3"]  # int64
    activations: Float[np.ndarray, " F"]  # float16


def firings(codes: Codes, keep: Bool[np.ndarray, "B S"], first_row: int) -> Firings:
    """The codes of the positions to keep; rows count from `first_row`.

    Args:
      codes: values and ids [B, S, K].

    Raises UserError for a value beyond float16.
    """
    values, ids = (np.asarray(part) for part in codes)
    row, position, slot = np.nonzero((np.abs(values) > LEAST) & keep[..., None])
    activations, latent = values[row, position, slot], ids[row, position, slot]
    if activations.size and np.abs(activations).max() > MOST:
        raise UserError(
            f"latent {latent[np.abs(activations).argmax()]} has an activation of "
            f"{np.abs(activations).max():.4g}, and delphi's float16 ends at {MOST:.0f}: it cannot "
            "hold this text's codes; take other text, or train on activations in a smaller unit"
        )
    order = np.lexsort((latent, position, row))
    locations = np.stack([row + first_row, position, latent], -1)[order]
    return Firings(locations.astype(np.int64), activations[order].astype(np.float16))


def split_edges(latents: int, splits: int) -> list[tuple[int, int]]:
    """First and last latent of each of `splits` runs of nearly equal length."""
    bounds = [i * latents // splits for i in range(splits + 1)]
    return [(start, end - 1) for start, end in zip(bounds, bounds[1:])]


class CacheWriter:
    """Takes batches of rows; on leaving the `with` block without an error the files are written.

    Firings wait on disk in the meantime, token ids in memory; one split at a time is read back.

    Args:
      hookpoint: delphi's name of the module that is read, such as 'layers.8'.
      settings: for config.json: model_name, and where the text comes from.
    """

    def __init__(
        self,
        folder: Path,
        hookpoint: str,
        latents: int,
        splits: int = 5,
        settings: Mapping[str, Any] | None = None,
    ):
        if not 0 < splits <= latents:
            raise UserError(f"{splits} splits of {latents} latents: take 1 to {latents}")
        self._folder = files.fresh(files.inside(folder, hookpoint, "hookpoint"))
        self._edges, self._settings = split_edges(latents, splits), dict(settings or {})
        self._tokens: list[np.ndarray] = []
        self.rows = self.fired = 0

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for path in self._folder.glob("*.partial"):
                path.unlink()

    def add(
        self,
        tokens: Int[np.ndarray, "B S"],
        codes: Codes,
        keep: Bool[np.ndarray, "B S"] | None = None,
    ) -> None:
        """Appends B rows.

        Args:
          codes: values and global ids [B, S, K]. keep: positions whose codes count; all if None.
        """
        tokens = np.asarray(tokens, np.int64)
        if self._tokens and tokens.shape[1] != self._tokens[0].shape[1]:
            raise UserError(f"rows of {tokens.shape[1]} tokens cannot join the rows before them")
        keep = np.ones(tokens.shape, bool) if keep is None else keep
        locations, activations = firings(codes, keep, self.rows)
        for edges in self._edges:
            start, end = edges
            mine = (locations[:, 2] >= start) & (locations[:, 2] <= end)
            self._append(edges, "locations", (locations[mine] - (0, 0, start)).astype(np.uint32))
            self._append(edges, "activations", activations[mine])
        self._tokens.append(tokens)
        self.rows += len(tokens)
        self.fired += len(activations)

    def _append(self, edges: tuple[int, int], name: str, array: np.ndarray) -> None:
        path = self._partial(edges, name)
        with telling(f"{path} cannot be written", "make room, or name another folder"):
            with path.open("ab") as file:
                file.write(array.tobytes())

    def _partial(self, edges: tuple[int, int], name: str) -> Path:
        start, end = edges
        return self._folder / f"{start}_{end}.{name}.partial"

    def _finish(self) -> None:
        if not self._tokens:
            raise UserError("there is no row of tokens to write: give more text")
        tokens = np.concatenate(self._tokens)
        for edges in self._edges:
            start, end = edges
            locations = np.fromfile(self._partial(edges, "locations"), np.uint32).reshape(-1, 3)
            if max(*tokens.shape, end - start + 1) <= SHORT:
                locations = locations.astype(np.uint16)
            tensors = {
                "locations": locations,
                "activations": np.fromfile(self._partial(edges, "activations"), np.float16),
                "tokens": tokens,
            }
            files.write_tensors(self._folder / f"{start}_{end}.safetensors", tensors)
        known = {
            "n_splits": len(self._edges),
            "n_tokens": tokens.size,
            "cache_ctx_len": tokens.shape[1],
        }
        files.write_object(self._folder / "config.json", self._settings | known)


def save(
    sae: Autoencoder,
    params: Params,
    batches: Iterable[EvalBatch],
    folder: Path,
    hookpoint: str,
    settings: Mapping[str, Any],
    splits: int = 5,
    max_norm: float = np.inf,
) -> CacheWriter:
    """Encodes held-out batches and writes their cache; returns the writer with its counts.

    Only scored positions count, no outliers: neither padding nor what training leaves out.

    Args:
      batches: as `evaluation.heldout.text_batches` gives them.
      hookpoint, settings: as `CacheWriter` takes them.
      max_norm: activations with a larger norm are outliers.

    Raises UserError for batches without tokens, values beyond float16, a folder in use.
    """

    @jax.jit
    def encode(params: Params, x: Array, scored: Array, limit: Array) -> tuple[Codes, Array]:
        return sae.encode(params, x), kept_tokens(x, scored, limit)

    with CacheWriter(folder, hookpoint, sae.latents, splits, settings) as writer:
        for batch in few_rows(sae, batches):
            if batch.tokens is None:
                raise UserError("a cache needs tokens, and these activations come from an array")
            codes, keep = encode(params, batch.x, batch.scored, np.float32(max_norm))
            writer.add(batch.tokens, codes, np.asarray(keep))
    return writer
