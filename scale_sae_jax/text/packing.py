"""Documents to token rows of one length.

A document is cut into pieces; a piece is never cut again and never sees another one: it is a
segment of its own, with positions from 0. Rows fill best-fit over a bounded set of open rows, so
that packing streams, is deterministic, and leaves little padding.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from scale_sae_jax.text.sources import Document

OPEN_ROWS = 64
SHORTEST_PIECE = 2
DOCUMENTS_PER_CALL = 256


@runtime_checkable
class Encoder(Protocol):
    """What packing asks of a tokenizer: token ids without special tokens, and the id of BOS."""

    bos_id: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


class TokenRow(NamedTuple):
    """One context of S positions."""

    tokens: np.ndarray  # [S] int32, 0 where there is padding
    segments: np.ndarray  # [S] int32: 0 padding, equal numbers one piece of a document
    documents: np.ndarray  # [S] int64: running index of the document, -1 padding
    short: int = 0  # pieces dropped since the row before


class TokenRows(NamedTuple):
    """B contexts; fields as in `TokenRow`."""

    tokens: np.ndarray  # [B, S] int32
    segments: np.ndarray  # [B, S] int32
    documents: np.ndarray  # [B, S] int64
    short: int = 0


class _Piece(NamedTuple):
    document: int
    tokens: list[int]  # without BOS


class _OpenRow(NamedTuple):
    used: int
    pieces: list[_Piece]


def pack(
    documents: Iterable[Document], tokenizer: Encoder, context: int, packing: str, bos: bool
) -> Iterator[TokenRow]:
    """Rows of `context` positions.

    Args:
      documents: in any number; `TokenRow.documents` counts them from 0.
      tokenizer: encodes without special tokens.
      context: S, positions in a row.
      packing: 'pack' cuts a document into pieces of `context` tokens at most, BOS included, and
        puts several into a row; 'one' takes the first piece of each document, one a row.
      bos: start every piece with BOS.

    A piece of fewer than 2 tokens (without BOS) is dropped and counted in `TokenRow.short`.
    """
    several = packing == "pack"
    prefix = [tokenizer.bos_id] if bos else []
    pieces = _pieces(documents, tokenizer, context - len(prefix), several)
    for pieces_of_row, short in _fill_rows(pieces, context, len(prefix), several):
        yield _row(pieces_of_row, short, context, prefix)


def row_batches(rows: Iterable[TokenRow], rows_per_batch: int) -> Iterator[TokenRows]:
    """Stacks of `rows_per_batch` rows; the last is filled up with rows of padding."""
    rows = iter(rows)
    while batch := list(islice(rows, rows_per_batch)):
        missing = rows_per_batch - len(batch)
        batch += [_row([], 0, len(batch[0].tokens), [])] * missing
        tokens, segments, documents, short = zip(*batch, strict=True)
        yield TokenRows(np.stack(tokens), np.stack(segments), np.stack(documents), sum(short))


def _pieces(
    documents: Iterable[Document], tokenizer: Encoder, room: int, all_pieces: bool
) -> Iterator[_Piece]:
    documents, index = iter(documents), 0
    while chunk := list(islice(documents, DOCUMENTS_PER_CALL)):
        for tokens in tokenizer.encode_batch([document.text for document in chunk]):
            starts = range(0, len(tokens), room) if all_pieces else (0,)
            yield from (_Piece(index, tokens[start : start + room]) for start in starts)
            index += 1


def _fill_rows(
    pieces: Iterable[_Piece], context: int, prefix: int, several: bool
) -> Iterator[tuple[list[_Piece], int]]:
    """Pieces of each row, and the pieces dropped since the row before.

    A piece goes into the fullest open row that has room for it. When it needs a new row and
    OPEN_ROWS are open, the fullest of them is closed.
    """
    open_rows: list[_OpenRow] = []
    most, short = (OPEN_ROWS if several else 1), 0
    for piece in pieces:
        if len(piece.tokens) < SHORTEST_PIECE:
            short += 1
            continue
        size = prefix + len(piece.tokens)
        fitting = [i for i, row in enumerate(open_rows) if several and row.used + size <= context]
        if fitting:
            row = open_rows.pop(_fullest(open_rows, fitting))
        else:
            if len(open_rows) == most:
                yield open_rows.pop(_fullest(open_rows, range(most))).pieces, short
                short = 0
            row = _OpenRow(0, [])
        open_rows.append(_OpenRow(row.used + size, [*row.pieces, piece]))
    for row in open_rows:
        yield row.pieces, short
        short = 0


def _fullest(rows: list[_OpenRow], among: Iterable[int]) -> int:
    return max(among, key=lambda i: rows[i].used)


def _row(pieces: list[_Piece], short: int, context: int, prefix: list[int]) -> TokenRow:
    tokens = np.zeros(context, np.int32)
    segments = np.zeros(context, np.int32)
    documents = np.full(context, -1, np.int64)
    start = 0
    for segment, piece in enumerate(pieces, 1):
        ids = prefix + piece.tokens
        stop = start + len(ids)
        tokens[start:stop] = ids
        segments[start:stop] = segment
        documents[start:stop] = piece.document
        start = stop
    return TokenRow(tokens, segments, documents, short)
