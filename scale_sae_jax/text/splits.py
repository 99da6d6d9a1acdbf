"""Which documents train and which are held out.

A document's side is a function of its text alone, so a duplicate never crosses, whatever the order
of the source or its number of documents.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt64

from scale_sae_jax.config import TextConfig
from scale_sae_jax.text.sources import Document, heldout_source, open_documents


def document_hash(text: str) -> int:
    """Identity of a text: its 64-bit BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def is_heldout(text_hash: int, fraction: float) -> bool:
    """Whether a hash lies in the lowest `fraction` of all 64-bit numbers."""
    return text_hash < fraction * 2**64


def training_documents(config: TextConfig) -> Iterator[Document]:
    """The documents to train on: all of `config.path` that are not held out.

    Held out are the documents of `config.heldout_path`, whose hashes are collected first; without
    it, `config.heldout_fraction` of all texts by hash.
    """
    if config.heldout_path:
        hashes = (document_hash(d.text) for d in open_documents(heldout_source(config)))
        heldout = np.unique(np.fromiter(hashes, np.uint64))
    for document in open_documents(config):
        text_hash = document_hash(document.text)
        if config.heldout_path:
            out = _contains(heldout, text_hash)
        else:
            out = is_heldout(text_hash, config.heldout_fraction)
        if not out:
            yield document


def heldout_documents(
    config: TextConfig,
    trained: UInt64[np.ndarray, " H"],
    same_text: bool,
    on_skip: Callable[[Document], object] = lambda document: None,
) -> Iterator[Document]:
    """Documents that were never trained on.

    Args:
      config: the text to evaluate on.
      trained: sorted hashes of the documents trained on; these are left out in any case.
      same_text: whether `config` is the text trained on, so that only its held-out side counts;
        of another text all documents do.
      on_skip: called with every document left out because it was trained on.
    """
    source = heldout_source(config) if same_text and config.heldout_path else config
    by_hash = same_text and not config.heldout_path
    for document in open_documents(source):
        text_hash = document_hash(document.text)
        if by_hash and not is_heldout(text_hash, config.heldout_fraction):
            continue
        if _contains(trained, text_hash):
            on_skip(document)
        else:
            yield document


def _contains(ordered: UInt64[np.ndarray, " H"], value: int) -> bool:
    place = np.searchsorted(ordered, np.uint64(value))
    return bool(place < len(ordered) and ordered[place] == value)
