"""From text to a store of activations: run the model on it, cut, shuffle, write shards.

The positions of the token rows form one fixed sequence, and a shard ends at a definite position of
it: `counts.tokens_seen` in the manifest is all that is needed to go on after a kill, and the files
come out byte for byte as without one.

Several processes read a text in parts, as many as there are processes when the harvest begins: part
p of P takes every P-th document, has a sequence of its own and is a store of its own, DIR/part-p.
When all are complete, DIR/manifest.json lists the shards of all. Every process reads the whole
text, tokenises its own documents alone, and waits for no other's activations; other processes, in
other numbers, can go on with the parts.
"""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scale_sae_jax.activations import store
from scale_sae_jax.activations.batches import permuted
from scale_sae_jax.activations.forward import ReadableModel, Slab, run_model
from scale_sae_jax.activations.masks import Fate, nothing_kept, outliers
from scale_sae_jax.activations.store import Counts, Manifest
from scale_sae_jax.config import ActivationsConfig, LMConfig, TextConfig, flatten
from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.parallel import processes
from scale_sae_jax.text import sources
from scale_sae_jax.text.packing import pack, row_batches
from scale_sae_jax.text.splits import document_hash, training_documents

MEDIAN_TOKENS = 4096


class _Block(NamedTuple):
    """The activations of one shard, in the order of the text."""

    x: np.ndarray  # [rows, D]
    documents: np.ndarray  # running indices of the documents read since the block before
    counts: Counts  # after this block


class _Moments(NamedTuple):
    """Sum [D] and sum of squared norms, float64."""

    total: np.ndarray | float = 0.0
    squares: float = 0.0


class _Part(NamedTuple):
    """Every `count`-th document of the training text, from document `number` on."""

    number: int
    count: int

    def folder(self, store_folder: Path) -> Path:
        return store_folder if self.count == 1 else store_folder / f"part-{self.number:05d}"

    def settings(self, of_store: dict[str, Any]) -> dict[str, Any]:
        return of_store | ({"part": f"{self.number} of {self.count}"} if self.count > 1 else {})

    def tokens(self, in_all: int) -> int:
        """Activations wanted from this part."""
        return in_all // self.count + (self.number < in_all % self.count)


def harvest(
    lm: ReadableModel,
    text_config: TextConfig,
    activations_config: ActivationsConfig,
    lm_config: LMConfig,
    path: str | Path,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Manifest:
    """Fills the store at `path` with the output of block `lm_config.layer` on the training text.

    Goes on where a killed harvest stopped and returns at once where the store is complete. Ends
    when `activations_config.tokens` are kept or the text ends, which the manifest then notes. Every
    process of a program calls this alike.

    Args:
      lm: the model; `run_to` is jitted, rows are split over the devices of each process.
      progress: called in every process with activations kept so far by all, and wanted.

    Raises:
      UserError: if the store holds something else or is damaged, nothing is left after the masks,
        or the model's output is not finite.
    """
    folder, wanted = Path(path), activations_config.tokens
    settings = content_settings(lm, text_config, activations_config, lm_config)
    processes.lead_alone(lambda: _start(lm, settings, folder, jax.process_count()))
    manifest = _start(lm, settings, folder, jax.process_count())
    if manifest.complete:
        return manifest
    configs = text_config, activations_config, lm_config
    parts = [_Part(number, manifest.parts) for number in range(manifest.parts)]
    own = parts[jax.process_index() :: jax.process_count()]
    filling = chain.from_iterable(_fill(lm, part, settings, folder, *configs) for part in own)
    kept, busy = 0, True
    while busy:  # in step, so that all processes stop together
        new = next(filling, None)
        kept += new or 0
        kept_by_all, busy_ones = processes.total(np.array([kept, new is not None]))
        busy = busy_ones > 0
        if busy:
            progress(int(kept_by_all), wanted)
    processes.lead_alone(lambda: _finish(folder, manifest, parts, wanted))
    return store.read_manifest(folder)


def _fill(
    lm: ReadableModel,
    part: _Part,
    store_settings: dict[str, Any],
    store_folder: Path,
    text_config: TextConfig,
    activations_config: ActivationsConfig,
    lm_config: LMConfig,
) -> Iterator[int]:
    """Harvests one part to its end; yields the activations kept since the yield before."""
    folder, wanted = part.folder(store_folder), part.tokens(activations_config.tokens)
    manifest = _start(lm, part.settings(store_settings), folder)
    yield manifest.counts.kept
    if manifest.complete:
        return
    moments, documents = _read_back(folder, manifest)
    batch_positions = lm_config.rows_per_batch * text_config.context
    done_batches, done_positions = divmod(manifest.counts.tokens_seen, batch_positions)

    hashes = array("Q")  # of every document that was opened, by running index
    own = islice(training_documents(text_config), part.number, None, part.count)
    texts = _noting_hashes(own, hashes)
    rows = pack(texts, lm.tokenizer, text_config.context, text_config.packing, text_config.bos)
    batches = islice(row_batches(rows, lm_config.rows_per_batch), done_batches, None)
    slabs = _without(done_positions, run_model(lm, lm_config, batches, activations_config))
    if not manifest.shards:
        median_norm, slabs = _median_norm(slabs)
        manifest = dataclasses.replace(manifest, median_norm=median_norm)
    slabs = _mark_outliers(slabs, manifest.median_norm, activations_config.max_norm_ratio)

    for new, block in _blocks(slabs, manifest.counts, activations_config.shard_rows, wanted):
        if block is not None:
            x, indices, counts = block
            shards = manifest.shards
            if len(x):
                x = x[permuted(np.arange(len(x)), len(x), seed=len(shards))]
                moments = _add(moments, x)
                shards = (*shards, store.write_shard(folder, len(shards), x))
            if not shards:
                raise nothing_kept()
            documents = np.union1d(documents, np.frombuffer(hashes.tobytes(), np.uint64)[indices])
            store.write_array(folder / store.DOCUMENTS, documents)
            counts = dataclasses.replace(
                counts,
                documents=len(documents),
                rows=-(-counts.tokens_seen // text_config.context),
            )
            manifest = dataclasses.replace(manifest, d=x.shape[1], shards=shards, counts=counts)
            store.write_manifest(folder, manifest)
        yield new

    store.write_array(folder / store.MEAN, (moments.total / manifest.n).astype(np.float32))
    manifest = dataclasses.replace(
        manifest, complete=True, mean_squared_norm=moments.squares / manifest.n,
        note=_note(manifest.n, wanted),
    )
    store.write_manifest(folder, manifest)


def _finish(folder: Path, manifest: Manifest, parts: list[_Part], wanted: int) -> None:
    """Makes one store of several complete parts, and prints its note, if there is one."""
    if len(parts) > 1:
        stores = [store.open_store(part.folder(folder)) for part in parts]
        made = [one.manifest for one in stores]
        weights = np.array([one.n for one in made]) / sum(one.n for one in made)
        documents = np.unique(np.concatenate([one.documents() for one in stores]))
        counts = [sum(values) for values in zip(*(dataclasses.astuple(m.counts) for m in made),
                                                strict=True)]
        shards = tuple(
            dataclasses.replace(shard, file=f"{one.path.name}/{shard.file}")
            for one in stores for shard in one.manifest.shards
        )
        store.write_array(folder / store.DOCUMENTS, documents)
        mean = sum(w * one.mean.astype(np.float64) for w, one in zip(weights, stores, strict=True))
        store.write_array(folder / store.MEAN, mean.astype(np.float32))
        store.write_manifest(folder, dataclasses.replace(
            manifest,
            complete=True,
            d=made[0].d,
            shards=shards,
            counts=dataclasses.replace(Counts(*counts), documents=len(documents)),
            median_norm=float(np.mean([one.median_norm for one in made])),
            mean_squared_norm=float(weights @ [one.mean_squared_norm for one in made]),
            note=_note(sum(one.n for one in made), wanted),
        ))


def _note(kept: int, wanted: int) -> str:
    return f"the text ended after {kept} of {wanted} activations" if kept < wanted else ""


def content_settings(
    lm: ReadableModel,
    text_config: TextConfig,
    activations_config: ActivationsConfig,
    lm_config: LMConfig,
) -> dict[str, Any]:
    """All that determines the content of a store, as JSON values. Paths count by what they hold."""

    def fields(config: Any, *left_out: str) -> dict[str, Any]:
        values = dataclasses.asdict(config)
        return {name: value for name, value in values.items() if name not in left_out}

    heldout = sources.heldout_source(text_config)
    tokenizer = lm.tokenizer.backend.to_str().encode()
    return {
        "model_sha256": lm.sha256,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "bos_id": lm.tokenizer.bos_id,
        "special_ids": sorted(lm.tokenizer.special_ids),
        "source": sources.identity(text_config),
        "heldout_source": sources.identity(heldout) if heldout.path else {},
        "lm": fields(lm_config, "path", "tokenizer", "split_params"),
        "text": fields(text_config, "path", "heldout_path"),
        "activations": fields(activations_config, "path", "buffer"),
    }


def _start(
    lm: ReadableModel, settings: dict[str, Any], folder: Path, parts: int = 1
) -> Manifest:
    """The manifest in `folder`, or that of an empty store. Refuses one made with other settings.

    Args:
      parts: of a store that is to begin; several are written down at once.
    """
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if not (folder / store.MANIFEST).exists():
        with telling(f"cannot make folder {folder}", "choose another --config.activations.path"):
            folder.mkdir(parents=True, exist_ok=True)
        dtype = settings["activations"]["dtype"]
        manifest = Manifest(lm.name, settings, fingerprint, dtype, parts=parts)
        if parts > 1:
            store.write_manifest(folder, manifest)
        return manifest
    manifest = store.read_manifest(folder)
    if manifest.fingerprint != fingerprint:
        there, here = flatten(manifest.settings), flatten(settings)
        name = next((n for n in {**here, **there} if there.get(n) != here.get(n)), "settings")
        ours = name.split(".")[0] in ("lm", "text", "activations")
        keep = f"take --config.{name}={there.get(name)}, " if ours else ""
        raise UserError(
            f"{folder} holds activations with {name} = {there.get(name)}, not {here.get(name)}: "
            f"{keep}choose another --config.activations.path, or delete the folder"
        )
    return manifest


def _read_back(folder: Path, manifest: Manifest) -> tuple[_Moments, np.ndarray]:
    """Sums over the shards written before a kill, checked on the way, and document hashes."""
    moments = _Moments()
    if not manifest.shards:
        return moments, np.array([], np.uint64)
    for shard in manifest.shards:
        x = store.load_shard(folder, manifest, shard)
        store.check_sum(folder, shard)
        moments = _add(moments, x)
    return moments, store.load_documents(folder)


def _add(moments: _Moments, x: np.ndarray) -> _Moments:
    """Adds stored rows, in float64."""
    total, squares = moments
    for start in range(0, len(x), 8192):
        chunk = store.to_float32(x[start : start + 8192])
        total = total + chunk.sum(axis=0, dtype=np.float64)
        squares += float(np.einsum("td,td->t", chunk, chunk).sum(dtype=np.float64))
    return _Moments(total, squares)


def _noting_hashes(documents: Iterable[sources.Document], hashes: array) -> Iterator[Any]:
    """The documents, with the hash of each appended to `hashes`."""
    for document in documents:
        hashes.append(document_hash(document.text))
        yield document


def _without(skip: int, slabs: Iterator[Slab]) -> Iterator[Slab]:
    """The slabs without the first `skip` positions, which lie in the first slab."""
    for slab in slabs:
        if skip:
            slab = Slab(*(values[skip:] for values in slab[:-1]), short=0)
            skip = 0
        yield slab


def _median_norm(slabs: Iterator[Slab]) -> tuple[float, Iterator[Slab]]:
    """Median over the first slabs with MEDIAN_TOKENS kept activations, and all slabs again."""
    first, norms, n = [], [], 0
    while n < MEDIAN_TOKENS and (slab := next(slabs, None)):
        first.append(slab)
        norms.append(slab.norms[slab.fates == Fate.KEPT])
        n += len(norms[-1])
    if not n:
        raise nothing_kept()
    return float(np.median(np.concatenate(norms))), chain(first, slabs)


def _mark_outliers(
    slabs: Iterator[Slab], median_norm: float, max_norm_ratio: float
) -> Iterator[Slab]:
    for slab in slabs:
        far = (slab.fates == Fate.KEPT) & outliers(slab.norms, median_norm, max_norm_ratio)
        yield slab._replace(fates=np.where(far, np.int8(Fate.OUTLIER), slab.fates))


def _blocks(
    slabs: Iterator[Slab], counts: Counts, shard_rows: int, wanted: int
) -> Iterator[tuple[int, _Block | None]]:
    """Cuts the positions after each `shard_rows`-th kept one, and ends after `wanted` kept ones.

    Yields activations kept since the yield before, and the block that they complete, if one.
    """
    room = min(shard_rows, wanted - counts.kept)
    if not room:
        return
    parts, documents = [], []
    for slab in slabs:
        begin, positions = 0, len(slab.fates)
        while begin < positions:
            kept = begin + np.flatnonzero(slab.fates[begin:] == Fate.KEPT)[:room]
            end = int(kept[-1]) + 1 if len(kept) == room else positions
            counts = _count(counts, slab, begin, end)
            parts.append(slab.x[kept])
            documents.append(np.unique(slab.documents[begin:end]))
            room -= len(kept)
            begin = end
            if room:
                yield len(kept), None
                continue
            yield len(kept), _block(parts, documents, counts)
            parts, documents = [], []
            room = min(shard_rows, wanted - counts.kept)
            if not room:
                return
    if parts:
        yield 0, _block(parts, documents, counts)


def _block(parts: list[np.ndarray], documents: list[np.ndarray], counts: Counts) -> _Block:
    indices = np.unique(np.concatenate(documents))
    return _Block(np.concatenate(parts), indices[indices >= 0], counts)


def _count(counts: Counts, slab: Slab, begin: int, end: int) -> Counts:
    """Counts with the positions begin ... end - 1 of the slab."""
    by_fate = np.bincount(slab.fates[begin:end], minlength=len(Fate)).tolist()
    return dataclasses.replace(
        counts,
        tokens_seen=counts.tokens_seen + end - begin,
        padding=counts.padding + by_fate[Fate.PADDING],
        position_0=counts.position_0 + by_fate[Fate.POSITION_0],
        special=counts.special + by_fate[Fate.SPECIAL],
        outliers=counts.outliers + by_fate[Fate.OUTLIER],
        kept=counts.kept + by_fate[Fate.KEPT],
        short_pieces=counts.short_pieces + (slab.short if begin == 0 else 0),
    )
