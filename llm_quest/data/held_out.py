"""Held-out batches: every token at most once, documents alone, bytes counted, so that bits per byte are exact.

bits per byte = (sum of -ln p over all tokens and ends) / ln 2 / (bytes of the documents). It compares models with
different tokenizers, and with compressors; a loss per token does neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.loader import shuffle_indices
from llm_quest.data.packing import pack_best_fit
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.errors import DataError, UsageError


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
        """total_nats: the sum of -ln p over all targets of these batches."""
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
