"""An array of activations that someone else made, in the place of a harvested store."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from scale_sae_jax.activations.masks import outliers
from scale_sae_jax.errors import UserError
from scale_sae_jax.files import local, looked_from

CHUNK_ROWS = 8192
NORMS = 1e-15, 1e15  # between these float32 holds squares, and their products with others


@dataclass(frozen=True, eq=False)
class ActivationArray:
    """Consecutive rows of a .npy file, mapped into memory; reads as `ActivationStore` does.

    mean and median_norm are those of the training rows, in the held-out part too; the mean is
    without outliers. left_out: the rows of `array`, ascending, that are not among the n that are
    read.
    """

    array: np.ndarray  # [rows, D] float16 or float32
    mean: Float32[np.ndarray, " D"]
    median_norm: float
    left_out: Int64[np.ndarray, " O"] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def n(self) -> int:
        return len(self.array) - len(self.left_out)

    @property
    def d(self) -> int:
        return self.array.shape[1]

    def rows(self, ids: Int64[np.ndarray, " T"]) -> Float32[np.ndarray, "T D"]:
        """The rows with these ids, in 0 ... n - 1."""
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n:
            raise IndexError(f"row ids must lie in 0 ... {self.n - 1}")
        # How many rows are read before each one that is left out; so many ids need no shift by it.
        read_before = self.left_out - np.arange(len(self.left_out))
        places = ids + np.searchsorted(read_before, ids, side="right")
        return self.array[places].astype(np.float32, copy=False)


def open_array(
    path: str | Path, heldout_fraction: float, max_norm_ratio: float = 0.0
) -> tuple[ActivationArray, ActivationArray]:
    """Training and held-out rows of a .npy array [n, D] of float16 or float32.

    The last `heldout_fraction` of the rows is held out: neighbouring rows tend to come from one
    document, so a contiguous part overlaps less than a random one. Reads the whole array once, and
    the training rows once more if there are outliers among them.

    Args:
      max_norm_ratio: training rows with a norm over so many times their median are left out, of
        the mean too; 0 keeps all. Held-out rows all stay: the evaluator counts outliers.

    Raises:
      UserError: if the file is missing or no such array, holds a NaN or an infinity, numbers whose
        squares leave float32, too few rows for both parts, or one and the same row to train on.
    """
    path = local(path)
    array = map_array(path)
    heldout = int(len(array) * heldout_fraction)
    training = len(array) - heldout
    if not heldout or not training:
        raise UserError(
            f"{path}: of {len(array)} rows, config.text.heldout_fraction = {heldout_fraction} "
            f"leaves {training} to train on and {heldout} to evaluate: both need at least 1"
        )
    total = np.zeros(array.shape[1])
    norms = np.empty(training, np.float32)
    first, differ = array[0].astype(np.float32), False
    bounds = sorted({*range(0, len(array), CHUNK_ROWS), training, len(array)})
    for start, stop in zip(bounds, bounds[1:], strict=False):
        chunk = array[start:stop].astype(np.float32)
        _refuse_not_finite(path, chunk, start)
        if stop <= training:
            differ = differ or bool((chunk != first).any())
            total += chunk.sum(axis=0, dtype=np.float64)
            with np.errstate(over="ignore"):  # which leaves infinity
                norms[start:stop] = np.linalg.norm(chunk, axis=1)
    if not differ:
        raise UserError(
            f"{path}: its {training} rows to train on are all the same: there is nothing to learn"
        )
    median_norm = float(np.median(norms))
    if norms.max() < NORMS[0] or median_norm > NORMS[1]:
        raise UserError(
            f"{path}: norms are {median_norm:.2g} in the median and {norms.max():.2g} at most, and "
            "float32 does not hold the squares of such activations: multiply the array by a number "
            "that brings norms near 1"
        )
    if max_norm_ratio and not median_norm:
        raise UserError(
            f"{path}: more than half of its {training} rows to train on are zero, and all others "
            "would count as outliers: leave them out, or keep all with "
            "--config.activations.max_norm_ratio=0"
        )
    far = outliers(norms, median_norm, max_norm_ratio)
    if far.all():
        raise UserError(
            f"{path}: config.activations.max_norm_ratio = {max_norm_ratio} leaves none of "
            f"{training} rows to train on: raise it, or keep all rows with 0"
        )
    if far.any():
        # Summed anew: what is left of a sum after an outlier is taken off has lost its digits.
        total = _sum_of(array[:training], ~far)
    shared = {
        "mean": (total / (training - far.sum())).astype(np.float32),
        "median_norm": median_norm,
    }
    return (
        ActivationArray(array[:training], left_out=np.flatnonzero(far), **shared),
        ActivationArray(array[training:], **shared),
    )


def _sum_of(array: np.ndarray, kept: Bool[np.ndarray, " T"]) -> Float64[np.ndarray, " D"]:
    """The sum of the kept rows of an array [T, D], a chunk at a time."""
    total = np.zeros(array.shape[1])
    for start in range(0, len(array), CHUNK_ROWS):
        chunk = array[start : start + CHUNK_ROWS][kept[start : start + CHUNK_ROWS]]
        total += chunk.sum(axis=0, dtype=np.float64)
    return total


def map_array(path: Path) -> np.ndarray:
    """A .npy array [n, D] of float16 or float32, of which only the header is read. UserError."""
    if path.suffix != ".npy":
        raise UserError(f"{path} is not a .npy file: save the activations with numpy.save")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(
            f"{path}: file not found{looked_from(path)}; give an existing .npy array"
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a plain .npy array of numbers: {error}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is a .npz archive: save the array alone with numpy.save")
    sound = array.ndim == 2 and len(array) and array.shape[1] > 1
    if not sound or array.dtype not in (np.float16, np.float32):
        raise UserError(
            f"{path} has shape {array.shape} and dtype {array.dtype}: activations must be [n, d] "
            "float16 or float32, d at least 2; reshape or convert the array"
        )
    if not array.flags.c_contiguous:
        raise UserError(f"{path} is in Fortran order: save numpy.ascontiguousarray of it")
    return array


def _refuse_not_finite(path: Path, chunk: Float32[np.ndarray, "T D"], start: int) -> None:
    finite = np.isfinite(chunk).all(axis=1)
    if not finite.all():
        row = start + int(np.argmin(finite))
        raise UserError(f"{path}: row {row} holds NaN or infinity; remove such rows")
