"""Checkpoint tensors to the parameters of a model.

A checkpoint is a mapping from tensor name to a function that reads it; a family says under which
name each parameter lies. Parameters are filled one block at a time, so the peak is the model and
one tensor.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from scale_sae_jax.errors import UserError

HASHED_BYTES = 2**31  # of larger files, samples
SAMPLES, SAMPLE_BYTES = 256, 2**16
_INDEX = "model.safetensors.index.json"

Tensors = Mapping[str, Callable[[], np.ndarray]]


class Stored(NamedTuple):
    """The tensor that holds a parameter: its name, with {} for the block, and the way to ours."""

    name: str
    turn: Callable[[np.ndarray], np.ndarray] = np.asarray


def transpose(w: np.ndarray) -> np.ndarray:
    """[out, in] to [in, out]."""
    return w.T


def abstract_params(module: nn.Module) -> PyTree:
    """Shapes and dtypes of a model's parameters."""
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), row, row)["params"]


def build_params(
    module: nn.Module, stored: Mapping[str, Stored], tensors: Tensors, ignored: tuple[str, ...]
) -> PyTree:
    """Parameters of `module`, cast to its dtype.

    Args:
      stored: by the path of the parameter, 'blocks/q/kernel'.
      tensors: the checkpoint.
      ignored: endings of tensor names that a block may have beside its parameters.

    Raises UserError naming a tensor that is missing, of another shape, or that belongs to a block
    the model does not have.
    """
    used = set()

    def read(source: Stored, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors[name]()
        value = source.turn(tensor)
        if value.shape != shape:
            raise UserError(
                f"tensor '{name}' has shape {tensor.shape}, which does not fit the sizes in the "
                f"model's config: it should become {shape}"
            )
        used.add(name)
        return value

    params = {}
    for path, leaf in flatten_dict(abstract_params(module), sep="/").items():
        source = stored[path]
        shape = leaf.shape if path.startswith("blocks/") else (1, *leaf.shape)
        names = _names(source, shape[0], tensors)
        # Sizes come from a header that may lie: memory is taken once a tensor has borne them out.
        first = read(source, names[0], shape[1:])
        array = np.empty(shape, leaf.dtype)
        array[0] = first
        del first
        for slot, name in zip(array[1:], names[1:], strict=True):
            slot[...] = read(source, name, shape[1:])
        params[path] = jnp.asarray(array.reshape(leaf.shape))
    for name in tensors.keys() - used:
        if re.search(r"\.\d+\.", name) and not name.endswith(ignored):
            raise UserError(f"the checkpoint's tensor '{name}' has no place in the model's config")
    return unflatten_dict(params, sep="/")


def _names(source: Stored, count: int, tensors: Tensors) -> list[str]:
    """The tensors of a parameter, one a block. Raises UserError at the first that is missing."""
    names = []
    for index in range(count):
        name = source.name.format(index)
        if name not in tensors:
            raise UserError(f"the checkpoint has no tensor '{name}': it is not complete")
        names.append(name)
    return names


def safetensors_files(folder: Path) -> list[Path]:
    """The one weight file of a Hugging Face folder, or its shards. Raises UserError if none."""
    if (folder / _INDEX).is_file():
        try:
            shards = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
            files = [folder / Path(shard).name for shard in sorted(shards)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / _INDEX} is not an index of safetensors shards") from None
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} has pytorch_model.bin only, a pickle, which is not read: save the model "
            "with save_pretrained(FOLDER, safe_serialization=True)"
        )
    else:
        raise UserError(f"{folder} has no model.safetensors: give a complete model folder")
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks the shard {file.name}: copy or download it again")
    return files


def read_safetensors(files: Iterable[Path], prefix: str) -> Tensors:
    """Tensors of all files, `prefix` removed from their names. Raises UserError on a bad file."""
    tensors = {}
    for path in files:
        try:
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or no safetensors file: {error}") from None
        for name in file.keys():
            tensors[name.removeprefix(prefix)] = partial(_read, file, name)
    return tensors


def _read(file: Any, name: str) -> np.ndarray:
    try:
        array = file.get_tensor(name)
    except (SafetensorError, TypeError, AttributeError) as error:
        raise UserError(f"tensor '{name}' cannot be read: {error}") from None
    if array.dtype.kind not in "fV":  # bfloat16 is of kind V
        raise UserError(f"tensor '{name}' is {array.dtype}: quantised weights are not supported")
    return array


def digest(files: list[Path]) -> str:
    """Identity of weight files: the sha256 of the one file, or of all their sizes and sha256s.

    Of a file over 2 GiB its size and `SAMPLES` pieces are hashed, evenly spread from its first to
    its last bytes: names, types and places of tensors, and some weights of each large one.
    """
    digests = [_file_digest(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASHED_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        hashed = hashlib.sha256(f"{size} ".encode())
        for place in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * place // (SAMPLES - 1))
            hashed.update(file.read(SAMPLE_BYTES))
        return hashed.hexdigest()
