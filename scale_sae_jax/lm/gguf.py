"""GGUF files, versions 2 and 3: header, metadata, and tensors as float32.

The file is untrusted: every length is checked against the bytes that are there, and whatever does
not fit raises UserError. The header is read through once; weights stay in a memory map until asked
for. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.lm.quantised import FORMATS, dequantise

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
# Codes of metadata values, little-endian: unsigned and signed integers, floats, bool.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_MOST_AXES, _SHORT = 4, 4096


class TensorInfo(NamedTuple):
    """shape: outermost axis first. kind: type code. start: its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GGUF:
    """A file whose header has been read."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32. Raises UserError for an unsupported type or missing bytes."""
        shape, kind, start = self.tensors[name]
        form = FORMATS.get(kind)
        if form is None:
            known = ", ".join(form.name for form in FORMATS.values())
            raise UserError(
                f"{self.path}: tensor '{name}' is of type {kind}, which is not supported: "
                f"requantise to one of {known}"
            )
        count = math.prod(shape)
        blocks = count // form.weights
        fits = start + blocks * form.dtype.itemsize <= self.path.stat().st_size
        if not fits or count == 0 or shape[-1] % form.weights:
            raise UserError(f"{self.path} is truncated: tensor '{name}' reaches beyond its end")
        packed = np.memmap(self.path, form.dtype, "r", offset=start, shape=(blocks,))
        return dequantise(form, packed).reshape(shape)

    def rows(self, name: str) -> int:
        """Length of a tensor's first axis. Raises UserError if there is no such tensor."""
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor '{name}': it is not complete")
        return self.tensors[name].shape[0]

    def readers(self) -> dict[str, Callable[[], np.ndarray]]:
        """A function that reads it, for each tensor."""
        return {name: partial(self.read, name) for name in self.tensors}


def read_gguf(path: Path) -> GGUF:
    """The header of a GGUF file. Raises UserError if it is not one, or is damaged."""
    with telling(f"{path} cannot be read"):
        try:
            with path.open("rb") as file:
                return _read_header(path, file)
        except (_Damaged, UnicodeDecodeError) as error:
            reason = f"{path} is damaged or truncated ({error}): download it again"
            raise UserError(reason) from None


def field(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A metadata value of type `kind`. Raises UserError if absent without default, or mistyped."""
    value = metadata.get(key, default)
    if type(value) is not kind:
        state = "is missing" if value is None else f"is not of type {kind.__name__}"
        raise UserError(f"the GGUF file's metadata '{key}' {state}: convert the model again")
    return value


class _Damaged(Exception):
    """The bytes do not follow the format."""


def _read_header(path: Path, file: BinaryIO) -> GGUF:
    if file.read(4) != _MAGIC:
        raise UserError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    version = _number(file, "I")
    if version not in _VERSIONS:
        raise UserError(f"{path} is GGUF version {version}: only versions 2 and 3 are read")
    n_tensors, n_values = _number(file, "Q"), _number(file, "Q")
    metadata = {}
    for _ in range(n_values):
        key = _string(file)
        metadata[key] = _value(file, _number(file, "I"))
    infos = [(_string(file), *_tensor_info(file)) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _Damaged(f"alignment {alignment}")
    data = -(-file.tell() // alignment) * alignment
    tensors = {name: TensorInfo(shape, kind, data + offset) for name, shape, kind, offset in infos}
    return GGUF(path, metadata, tensors)


def _tensor_info(file: BinaryIO) -> tuple[tuple[int, ...], int, int]:
    n_axes = _number(file, "I")
    if not 1 <= n_axes <= _MOST_AXES:
        raise _Damaged(f"a tensor of {n_axes} axes")
    innermost_first = [_number(file, "Q") for _ in range(n_axes)]
    return tuple(reversed(innermost_first)), _number(file, "I"), _number(file, "Q")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _NUMBERS:
        return _number(file, _NUMBERS[kind])
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        raise _Damaged(f"a value of type {kind}")
    kind, count = _number(file, "I"), _number(file, "Q")
    if kind == _STRING:
        return [_string(file) for _ in range(count)]
    if kind not in _NUMBERS:
        raise _Damaged(f"an array of type {kind}")
    dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
    return np.frombuffer(_bytes(file, count * dtype.itemsize), dtype).tolist()


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, _bytes(file, struct.calcsize("<" + code)))[0]


def _string(file: BinaryIO) -> str:
    return _bytes(file, int.from_bytes(_bytes(file, 8), "little")).decode()


def _bytes(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes; a long count is checked before memory is taken for it."""
    if count > _SHORT and count > os.fstat(file.fileno()).st_size - file.tell():
        raise _Damaged(f"{count} bytes announced")
    data = file.read(count)
    if len(data) < count:
        raise _Damaged("it ends early")
    return data
