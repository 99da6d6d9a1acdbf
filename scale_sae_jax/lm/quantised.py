"""The tensor types of GGML that are read: how a block lies in the file, and its float32 values.

A block of 32 or 256 weights shares its scales. Layouts: ggml-common.h of github.com/ggml-org/ggml.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Format(NamedTuple):
    """name, weights a block, layout of a block, and blocks [n] to values [n, weights]."""

    name: str
    weights: int
    dtype: np.dtype
    values: Callable[[np.ndarray], np.ndarray]


def dequantise(form: Format, blocks: np.ndarray) -> np.ndarray:
    """All weights of `blocks` [n], flat, float32."""
    return np.ascontiguousarray(form.values(blocks), np.float32).reshape(-1)


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., n] bytes to [..., 2n] float32: all low halves, then all high halves."""
    n = packed.shape[-1]
    out = np.empty((*packed.shape[:-1], 2 * n), np.float32)
    out[..., :n], out[..., n:] = packed & 15, packed >> 4
    return out


def _bits(packed: np.ndarray) -> np.ndarray:
    """[n, 4] bytes to [n, 32] bits, the lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _q4_0(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b["low"]) - 8) * _column(b["scale"])


def _q4_1(b: np.ndarray) -> np.ndarray:
    out = _nibbles(b["low"])
    out *= _column(b["scale"])
    out += _column(b["min"])
    return out


def _q5_0(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b["low"]) + 16.0 * _bits(b["high"]) - 16) * _column(b["scale"])


def _q5_1(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b["low"]) + 16.0 * _bits(b["high"])) * _column(b["scale"]) + _column(b["min"])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b["value"] * _column(b["scale"])


def _q4_k(b: np.ndarray) -> np.ndarray:
    """8 groups of 32, each with a 6-bit scale and minimum; 64 weights share 32 bytes."""
    scale, minimum = _six_bit_pairs(b["pairs"])  # [n, 8] each
    scale, minimum = scale * _column(b["scale"]), minimum * _column(b["min"])
    values = _nibbles(b["low"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return values * scale[..., None] - minimum[..., None]


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes to 8 scales and 8 minima of 6 bits.

    Bytes 0-3 and 4-7 hold the first four scales and minima in their low 6 bits; bytes 8-11 hold 4
    bits of the other four of each, whose top 2 bits are the spare ones of bytes 0-7.
    """
    scale, minimum, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([scale & 63, rest & 15 | scale >> 6 << 4], axis=1)
    minima = np.concatenate([minimum & 63, rest >> 4 | minimum >> 6 << 4], axis=1)
    return scales, minima


def _q6_k(b: np.ndarray) -> np.ndarray:
    """16 groups of 16, each with an int8 scale; each half block has 4 rows of 32 weights."""
    low = _nibbles(b["low"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = b["high"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values = (low + 16.0 * high - 32).reshape(-1, 16, 16)
    return values * (b["scales"] * _column(b["scale"]))[..., None]


def _plain(b: np.ndarray) -> np.ndarray:
    return b.astype(np.float32)


def _layout(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


_SCALE, _MIN = ("scale", "<f2"), ("min", "<f2")
_LOW = ("low", "u1", (16,))  # low 4 bits of 32 weights

FORMATS = {  # by type code
    0: Format("F32", 1, np.dtype("<f4"), _plain),
    1: Format("F16", 1, np.dtype("<f2"), _plain),
    2: Format("Q4_0", 32, _layout(_SCALE, _LOW), _q4_0),
    3: Format("Q4_1", 32, _layout(_SCALE, _MIN, _LOW), _q4_1),
    6: Format("Q5_0", 32, _layout(_SCALE, ("high", "u1", (4,)), _LOW), _q5_0),
    7: Format("Q5_1", 32, _layout(_SCALE, _MIN, ("high", "u1", (4,)), _LOW), _q5_1),
    8: Format("Q8_0", 32, _layout(_SCALE, ("value", "i1", (32,))), _q8_0),
    12: Format(
        "Q4_K", 256, _layout(_SCALE, _MIN, ("pairs", "u1", (12,)), ("low", "u1", (128,))), _q4_k
    ),
    14: Format(
        "Q6_K",
        256,
        _layout(("low", "u1", (128,)), ("high", "u1", (64,)), ("scales", "i1", (16,)), _SCALE),
        _q6_k,
    ),
    30: Format("BF16", 1, np.dtype(ml_dtypes.bfloat16), _plain),
}
