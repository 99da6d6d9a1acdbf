"""Tensor files and JSON of other projects, read with distrust: no code is run, every size fits.

A .safetensors file holds tensors and nothing else. What `torch.save` writes is a zip archive with a
pickle; it is read with `weights_only=True`, which refuses a pickle that holds more than tensors.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.files import read_object

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SPARE_BYTES = 2**20

Tensors = Mapping[str, np.ndarray]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file or a `torch.save`d state dict; bfloat16 as float32.

    Raises UserError: no such file, truncated or damaged, a pickle that holds more than tensors, an
    archive that unfolds to more than its size, a tensor that is no plain array.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: name a .safetensors or .pt file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    endings = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise UserError(f"{path} is of no known kind: tensors are read from {endings}")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: _plain(file.get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is truncated, damaged or no safetensors file: {error}") from None


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "V" else array  # V is bfloat16


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # an extra: nothing else here needs it
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read: pip install '.[torch]'") from None
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            unfolded = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        raise UserError(
            f"{path} is truncated, or a bare pickle, which may run code and is not read: save a "
            "state dict with torch.save of PyTorch 1.6 or newer, or as .safetensors"
        ) from None
    if unfolded > size:
        raise UserError(f"{path} unfolds to {unfolded} bytes, more than its own {size}: not read")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError and more, by what is wrong
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "damaged"
        raise UserError(
            f"{path} holds more than tensors (a pickle that may run code) or is damaged, and is "
            f"not read: save its state dict as .safetensors ({reason})"
        ) from None
    if not isinstance(state, Mapping) or not all(torch.is_tensor(t) for t in state.values()):
        raise UserError(f"{path} is no state dict, tensors by name: save model.state_dict()")
    for name, tensor in state.items():
        dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized)
        if not dense or tensor.is_meta:
            raise UserError(
                f"{path} tensor '{name}' is sparse, nested, quantised or without data, which is "
                "not read: save plain tensors"
            )
    # A view may repeat a number without end; what is copied below must have come from the file.
    if sum(t.numel() * t.element_size() for t in state.values()) > 2 * size + SPARE_BYTES:
        raise UserError(f"{path} has tensors larger than the file: not read")
    return {str(name): as_numpy(tensor) for name, tensor in state.items()}


def as_numpy(array: Any) -> np.ndarray:
    """An array of NumPy or JAX, or a torch tensor, of which floats become float32."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)


def take(
    tensors: Tensors, name: str, shape: tuple[int | None, ...], source: str = "checkpoint"
) -> np.ndarray:
    """The tensor `name` as float32, of `shape` (None fits any size) and finite.

    Raises UserError naming `source` and the tensor if there is none such.
    """
    if name not in tensors:
        have = ", ".join(sorted(tensors))
        raise UserError(f"{source} has no tensor '{name}': it holds {have or 'none'}")
    array = np.asarray(tensors[name])
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        raise UserError(f"{source} tensor '{name}' has shape {array.shape}, expected {shape}")
    if array.dtype.kind not in "fiuV":
        raise UserError(f"{source} tensor '{name}' is {array.dtype}, not numbers")
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{source} tensor '{name}' holds NaN or infinity: the file is damaged")
    return array


def refuse_others(tensors: Tensors, known: set[str], source: str) -> None:
    """Refuses tensors that would be left out, and with them what they compute."""
    if others := sorted(set(tensors) - known):
        raise UserError(f"{source} has a tensor '{others[0]}' that its architecture does not have")


def finite(tensors: Tensors, target: str) -> dict[str, np.ndarray]:
    """Contiguous float32 copies. Raises UserError if one holds NaN, or numbers beyond float32."""
    with np.errstate(over="ignore"):  # becomes infinity, which is refused
        arrays = {name: np.array(tensor, np.float32, order="C") for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"'{name}' holds NaN or infinity, so {target} is not written: "
                "the autoencoder is damaged"
            )
    return arrays


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A .safetensors file, readable to whom files here are; `save_file` makes it the owner's."""
    write_bytes(path, save(dict(tensors)))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the file, or nothing. Raises UserError if the system refuses."""
    with telling(f"{path} cannot be written", "make room, or name another folder"):
        try:
            path.write_bytes(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def read_cfg(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object of `kind`, another library's. Raises UserError as `read_object`."""
    return read_object(path, kind, "copy or download it again")


def field(values: Mapping[str, Any], name: str, kind: type, source: str) -> Any:
    """A required JSON value of exactly `kind`. Raises UserError if it is absent or another."""
    value = values.get(name)
    if type(value) is not kind:
        raise UserError(f"{source}: {name} = {value!r:.60} must be of type {kind.__name__}")
    return value


def size(values: Mapping[str, Any], name: str, source: str) -> int:
    """A required JSON number of 1 or more."""
    value = field(values, name, int, source)
    if value < 1:
        raise UserError(f"{source}: {name} = {value} must be at least 1")
    return value


def fresh(folder: Path) -> Path:
    """`folder`, made if it is not there. Raises UserError if it holds something already."""
    with telling(f"cannot write to {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: nothing is overwritten, name another folder")
    return folder


def inside(root: Path, name: str, what: str) -> Path:
    """root / name, if that lies in `root`. Raises UserError for '..' and absolute names."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or set(name) & set('\\*?[]:'):
        raise UserError(f"{what} '{name}' must be a plain relative name such as layers.8")
    return root.joinpath(*parts)


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())
