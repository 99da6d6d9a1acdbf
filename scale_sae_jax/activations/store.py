"""A store of activations: .npy shards on disk, a manifest that describes them, and random reads.

    manifest.json    what the activations are: model, layer, text, options, counts, checksums
    shard-00000.npy  [rows, D], float32, or bfloat16 as its uint16 bits
    mean.npy         [D] float32, mean of all rows
    documents.npy    sorted uint64 hashes of the documents that went in

    part-00000/      a store of its own, with its shards: what one of several processes harvested

Every file is replaced whole, so a reader never sees half of one.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Int64, Shaped, UInt64

from scale_sae_jax.errors import UserError, telling

FORMAT = 1
MANIFEST = "manifest.json"
MEAN = "mean.npy"
DOCUMENTS = "documents.npy"
OPEN_FILES = 2**16  # asked of the system where shards are many
SHARD = r"(part-\d{5,}/)?shard-\d{5,}\.npy"
STORED = {"bfloat16": np.dtype(np.uint16), "float32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Counts:
    """What became of the positions read so far; the next five add up to `tokens_seen`.

    documents: distinct texts with a token among them. rows: token rows begun. short_pieces: pieces
    too short to be packed.
    """

    tokens_seen: int = 0
    padding: int = 0
    position_0: int = 0
    special: int = 0
    outliers: int = 0
    kept: int = 0
    documents: int = 0
    rows: int = 0
    short_pieces: int = 0


@dataclass(frozen=True)
class Shard:
    """One file of the store."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    settings: everything that determines the content (model and tokenizer checksums, layer, text
        and its files, options); fingerprint: their sha256. model: the model's name.
    median_norm: of the first kept activations, the yardstick for outliers; the mean over parts.
    mean_squared_norm: over all rows, 0 until the store is complete.
    note: a remark for people, '' if there is nothing to say.
    parts: stores that this one is made of, each a stripe of the text; 1 if it is of one piece.
    """

    model: str
    settings: dict[str, Any]
    fingerprint: str
    dtype: str
    d: int = 0
    median_norm: float = 0.0
    counts: Counts = Counts()
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    mean_squared_norm: float = 0.0
    note: str = ""
    parts: int = 1
    format: int = FORMAT

    @property
    def n(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """A complete store, its shards mapped into memory. Reads are safe from several threads."""

    path: Path
    manifest: Manifest
    mean: Float32[np.ndarray, " D"]
    shards: tuple[np.ndarray, ...]
    starts: Int64[np.ndarray, " F"]  # id of the first row of each shard

    @property
    def n(self) -> int:
        return self.manifest.n

    @property
    def d(self) -> int:
        return self.manifest.d

    @property
    def median_norm(self) -> float:
        return self.manifest.median_norm

    def rows(self, ids: Int64[np.ndarray, " T"]) -> Float32[np.ndarray, "T D"]:
        """The rows with these ids, in 0 ... n - 1."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n:
            raise IndexError(f"row ids must lie in 0 ... {self.n - 1}")
        stored = np.empty((len(ids), self.d), STORED[self.manifest.dtype])
        shard_of = np.searchsorted(self.starts, ids, side="right") - 1
        for number in np.unique(shard_of):
            at = np.flatnonzero(shard_of == number)
            stored[at] = self.shards[number][ids[at] - self.starts[number]]
        return to_float32(stored)

    def documents(self) -> UInt64[np.ndarray, " H"]:
        """Sorted hashes of the documents that the activations come from."""
        return load_documents(self.path)


def to_float32(stored: Shaped[np.ndarray, "T D"]) -> Float32[np.ndarray, "T D"]:
    """Stored rows as numbers: bfloat16 bits are the upper half of a float32."""
    if stored.dtype == np.float32:
        return stored
    bits = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def open_store(path: str | Path) -> ActivationStore:
    """Opens a complete store after a check of its manifest and of its files' shapes and sizes.

    Raises UserError if there is no store, or it is incomplete, damaged or of another version.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if not manifest.complete:
        raise UserError(f"{path}: the harvest did not finish; run it again, it goes on from there")
    _allow_open(len(manifest.shards))
    shards = tuple(load_shard(path, manifest, shard) for shard in manifest.shards)
    mean = _load(path / MEAN)
    if mean.shape != (manifest.d,) or mean.dtype != np.float32:
        raise _damaged(path / MEAN, f"it is not a float32 array of {manifest.d}")
    mean = np.array(mean)
    sizes = [shard.rows for shard in manifest.shards]
    return ActivationStore(path, manifest, mean, shards, np.cumsum([0, *sizes[:-1]]))


def is_complete(path: str | Path) -> bool:
    """Whether there is a complete store. Raises UserError if its manifest is damaged."""
    return (Path(path) / MANIFEST).exists() and read_manifest(Path(path)).complete


def verify(
    store: ActivationStore, progress: Callable[[int, int], object] = lambda done, total: None
) -> None:
    """Reads every shard and compares its checksum. Raises UserError on the first difference.

    Args:
      progress: called after each shard with the activations read, and with how many there are.
    """
    done, total = 0, sum(shard.rows for shard in store.manifest.shards)
    for shard in store.manifest.shards:
        check_sum(store.path, shard)
        done += shard.rows
        progress(done, total)


def check_sum(folder: Path, shard: Shard) -> None:
    """Raises UserError if the file's sha256 is not the one in the manifest."""
    if _sha256(folder / shard.file) != shard.sha256:
        raise _damaged(folder / shard.file, "its checksum differs from the manifest")


def load_shard(folder: Path, manifest: Manifest, shard: Shard) -> np.ndarray:
    """The shard as a read-only memory map [rows, D] in its stored dtype. Raises UserError."""
    path = folder / shard.file
    rows = _load(path)
    expected = (shard.rows, manifest.d)
    if rows.shape != expected or rows.dtype != STORED[manifest.dtype]:
        raise _damaged(path, f"it is not a {manifest.dtype} array of {expected}")
    if path.stat().st_size != rows.offset + rows.nbytes:
        raise _damaged(path, "its size differs from its header")
    return rows


def load_documents(folder: Path) -> UInt64[np.ndarray, " H"]:
    """Sorted hashes of the documents in a store. Raises UserError."""
    hashes = _load(folder / DOCUMENTS)
    if hashes.ndim != 1 or hashes.dtype != np.uint64 or (hashes[1:] <= hashes[:-1]).any():
        raise _damaged(folder / DOCUMENTS, "it is not a list of hashes")
    return np.array(hashes)


def write_shard(folder: Path, number: int, rows: Shaped[np.ndarray, "T D"]) -> Shard:
    """Writes rows in their stored dtype as shard `number`."""
    path = folder / f"shard-{number:05d}.npy"
    write_array(path, rows)
    return Shard(path.name, len(rows), _sha256(path))


def write_array(path: Path, array: np.ndarray) -> None:
    """Replaces a .npy file."""
    with _replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the manifest."""
    text = json.dumps({**dataclasses.asdict(manifest), "n": manifest.n}, indent=1)
    with _replacing(folder / MANIFEST) as file:
        file.write(text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises UserError if it is missing, damaged or of another version."""
    path = folder / MANIFEST
    with telling(f"{path} cannot be read"):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format"]
            del fields["n"]
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            counts = Counts(**fields.pop("counts"))
            manifest = Manifest(**fields, shards=shards, counts=counts)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no activations: there is no {MANIFEST}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise _damaged(path, "it is not a manifest") from None
    if version != FORMAT:
        raise UserError(f"{folder} has format {version}, not {FORMAT}: harvest again")
    if not _is_sound(manifest):
        raise _damaged(path, "its values make no sense")
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    """Types and ranges of what reading relies on; file names must stay inside the folder."""
    counts = dataclasses.astuple(manifest.counts)
    shards = manifest.shards
    texts = manifest.model, manifest.fingerprint, manifest.dtype, manifest.note
    return (
        all(isinstance(text, str) for text in texts)
        and manifest.dtype in STORED
        and isinstance(manifest.settings, dict)
        and isinstance(manifest.median_norm, float | int)
        and isinstance(manifest.parts, int)
        and manifest.parts > 0
        and all(isinstance(value, int) and value >= 0 for value in (manifest.d, *counts))
        and all(isinstance(shard.rows, int) and shard.rows > 0 for shard in shards)
        and all(re.fullmatch(SHARD, str(shard.file)) for shard in shards)
        and manifest.n == manifest.counts.kept
        and (manifest.n > 0 or not manifest.complete)
    )


def _load(path: Path) -> np.memmap:
    """A .npy file mapped into memory, so that no size in its header takes any. Raises UserError."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except OSError as error:
        remedy = "; allow more (ulimit -n), or harvest into larger files (activations.shard_rows)"
        too_many = remedy if error.errno == errno.EMFILE else ""
        raise UserError(f"{path} cannot be read: {error.strerror or error}{too_many}") from None
    except (ValueError, EOFError, OverflowError):
        raise _damaged(path, "it is not a whole .npy file") from None


def _allow_open(files: int) -> None:
    """Lets this process have so many more files open, as each mapped shard is one, if it may."""
    try:
        import resource
    except ImportError:  # a system without such a limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    few = soft != resource.RLIM_INFINITY and soft < 4 * files  # what else is open needs some too
    if few and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}; delete its folder and harvest again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when complete and on disk. Raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    remedy = "make room, then start again: complete shards are kept"
    with telling(f"{path} cannot be written", remedy):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
