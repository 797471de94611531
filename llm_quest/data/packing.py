"""Packed rows for pretraining and for held-out text: documents shuffled, laid end to end, cut into rows of one length.

    documents   [s a b c d e]  [s f g]  [s h i j]          s start, e end; each id but a document's last is an input
    inputs       s a b c | d  s f  g | s  h i j            rows of four; the row's first position is zero again
    targets      a b c d | e  f g  e | h  i j e            the next id of the same document, always
    positions    0 1 2 3 | 0  0 1  2 | 0  1 2 3
    segments     0 0 0 0 | 0  1 1  1 | 0  0 0 0

Commonly got wrong: (1) a document cut by a row's end gets an end-of-text target that is not in the text, and the model
learns to stop in mid-sentence; here its last target is the true next token. (2) A target across a boundary asks for
the next document's first word; here a document's last target is its end. (3) Documents see their neighbors in the
row: `segments`.

Held-out rows (`HeldOutLoader`): every token at most once, documents alone, bytes counted, so that bits per byte are
exact: (sum of -ln p over all tokens and ends) / ln 2 / (bytes of the documents). They compare models with different
tokenizers, and with compressors; a loss per token does neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch, split_rows
from llm_quest.data.loader import shuffle_indices
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.errors import DataError, UsageError


class EpochOrder(NamedTuple):
    """The order of an epoch: the documents, where each begins among the inputs, and the rows."""

    documents: np.ndarray
    document_starts: np.ndarray
    rows: np.ndarray


class PackedDocuments:
    """The `RowSource` of pretraining: one split, in rows of `sequence_length` inputs.

    In an epoch every input is seen exactly once: documents and rows are ordered by (seed, epoch), the last row of the
    epoch is padded. A single document gives plain rows (no positions, no segments), for which attention needs no
    mask."""

    def __init__(self, tokens: TokenizedDocuments, sequence_length: int):
        if sequence_length < 1:
            raise UsageError(f"sequence_length is {sequence_length}; expected at least 1")
        if tokens.num_targets == 0:
            raise DataError("the training split holds no documents; add text or hold out less")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.rows_per_epoch = -(-tokens.num_targets // sequence_length)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch_order)

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[TokenBatch]:
        return [self.collate(part, seed) for part in split_rows(rows, micro_batch_size)]

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "packed", "data": self.tokens.hash, "sequence_length": self.sequence_length}

    def collate(self, rows: range, seed: int) -> TokenBatch:
        """Rows by their number since the beginning of training."""
        shape = (len(rows), self.sequence_length)
        fills = (int(self.tokens.ids[0]), IGNORE_INDEX, -1, 0)
        columns = [np.full(shape, fill, dtype=np.int64) for fill in fills]
        for b, number in enumerate(rows):
            for column, values in zip(columns, self._make_row(number, seed), strict=True):
                column[b, : len(values)] = values
        tokens, targets, positions, segments = (torch.from_numpy(column) for column in columns)
        if self.tokens.num_documents > 1:
            return TokenBatch(tokens, targets, positions, segments)
        # Padding stands at the row's end, where no token of a plain causal row can see it.
        return TokenBatch(tokens, targets, token_count=int((positions >= 0).sum()))

    def _make_row(self, number: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets, positions and segments of a row, without its padding."""
        epoch, place = divmod(number, self.rows_per_epoch)
        order = self._epoch(seed, epoch)
        start = int(order.rows[place]) * self.sequence_length
        inputs = np.arange(start, min(start + self.sequence_length, self.tokens.num_targets))
        which = np.searchsorted(order.document_starts, inputs, side="right") - 1
        begins = order.document_starts[which]
        ids = self.tokens.offsets[order.documents[which]] + (inputs - begins)
        return self.tokens.ids[ids], self.tokens.ids[ids + 1], inputs - np.maximum(begins, start), which - which[0]

    def _make_epoch_order(self, seed: int, epoch: int) -> EpochOrder:
        documents = shuffle_indices(self.tokens.num_documents, seed, epoch, 0)
        inputs = np.diff(self.tokens.offsets)[documents] - 1
        begins = np.concatenate([[0], np.cumsum(inputs)[:-1]])
        return EpochOrder(documents, begins, shuffle_indices(self.rows_per_epoch, seed, epoch, 1))


def pack_best_fit(sizes: Sequence[int], sequence_length: int) -> list[list[int]]:
    """Which items share each row of `sequence_length` tokens: the longest first, each into the fullest row that has
    room (best fit, decreasing)."""
    rows: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(sequence_length + 1)]  # rows by the room they have left
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        size = sizes[number]
        fit = next((left for left in range(size, sequence_length + 1) if room[left]), None)
        if fit is None:
            rows.append([])
            row, fit = len(rows) - 1, sequence_length
        else:
            row = room[fit].pop()
        rows[row].append(number)
        room[fit - size].append(row)
    return rows


class HeldOutLoader:
    """Rows of `sequence_length` for evaluation; iterating gives TokenBatches of `batch_size` rows, all of one shape.

    A document longer than a row is cut, and each piece begins without memory of the one before. Pieces share a row
    (segments keep them apart); the rest of a row is padding. The first `max_targets` targets' worth of whole
    documents, in a fixed shuffled order, at least one document; None: all. num_bytes and num_targets are of what is
    covered."""

    def __init__(
        self, tokens: TokenizedDocuments, *, sequence_length: int, batch_size: int, max_targets: int | None = None
    ):
        if sequence_length < 1 or batch_size < 1 or (max_targets is not None and max_targets < 1):
            raise UsageError(
                f"length {sequence_length}, micro_rows {batch_size} and limit {max_targets} must each be at least 1"
            )
        if tokens.num_targets == 0:
            raise DataError("nothing was held out: the validation split is empty; hold out a larger part")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.documents = _select_documents(tokens, max_targets)
        self.num_bytes = int(tokens.nbytes[self.documents].sum())
        self.num_targets = int((np.diff(tokens.offsets)[self.documents] - 1).sum())
        self._rows = _pack_documents(tokens, self.documents, sequence_length)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number: int) -> TokenBatch:
        """Batch `number`; rows that are missing from the last one are padding throughout."""
        shape = (self.batch_size, self.sequence_length)
        tokens = np.full(shape, int(self.tokens.ids[0]), dtype=np.int64)
        targets, positions = np.full(shape, IGNORE_INDEX, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int64)
        for b, t, segment, start, stop, _ in self._iter_pieces(number):
            here = np.s_[b, t : t + stop - start]
            tokens[here], targets[here] = self.tokens.ids[start:stop], self.tokens.ids[start + 1 : stop + 1]
            positions[here], segments[here] = np.arange(stop - start), segment
        tensors = [torch.from_numpy(column) for column in (tokens, targets, positions, segments)]
        return TokenBatch(tensors[0], tensors[1], tensors[2], tensors[3])

    def document_ids(self, number: int) -> torch.Tensor:
        """(B,T) int64: the document of each token of batch `number`, -1 for padding; for losses per document."""
        document_ids = torch.full((self.batch_size, self.sequence_length), -1)
        for b, t, _, start, stop, document in self._iter_pieces(number):
            document_ids[b, t : t + stop - start] = document
        return document_ids

    def bits_per_byte(self, total_nats: float) -> float:
        """Bits per byte of the text that these batches hold. total_nats: the sum of -ln p over all targets of these
        batches."""
        return total_nats / math.log(2) / self.num_bytes

    def _iter_pieces(self, number: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(row in the batch, column, segment, first id, last id + 1, document)."""
        for b, row in enumerate(self._rows[number * self.batch_size : (number + 1) * self.batch_size]):
            column = 0
            for segment, (start, stop, document) in enumerate(row):
                yield b, column, segment, start, stop, document
                column += stop - start


def eval_batches(
    tokens: TokenizedDocuments, sequence_length: int, batch_size: int, max_targets: int | None = None
) -> HeldOutLoader:
    """The held-out batches of a split: see `HeldOutLoader`."""
    return HeldOutLoader(tokens, sequence_length=sequence_length, batch_size=batch_size, max_targets=max_targets)


def _select_documents(tokens: TokenizedDocuments, max_targets: int | None) -> np.ndarray:
    """The documents that are evaluated, by number."""
    if max_targets is None:
        return np.arange(tokens.num_documents)
    order = shuffle_indices(tokens.num_documents, 0)
    targets = np.cumsum(np.diff(tokens.offsets)[order] - 1)
    return np.sort(order[: max(1, int(np.searchsorted(targets, max_targets, side="right")))])


def _pack_documents(
    tokens: TokenizedDocuments, documents: np.ndarray, sequence_length: int
) -> list[list[tuple[int, int, int]]]:
    """Rows of pieces (first id, last id + 1, document), packed by `pack_best_fit`."""
    pieces = []
    for document in documents.tolist():
        start, stop = int(tokens.offsets[document]), int(tokens.offsets[document + 1]) - 1
        pieces += [(a, b, document) for a, b in pairwise([*range(start, stop, sequence_length), stop])]
    packed = pack_best_fit([stop - start for start, stop, _ in pieces], sequence_length)
    return [[pieces[number] for number in row] for row in packed]
