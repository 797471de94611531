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

from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.packing import shuffled
from llm_quest.data.tokens import Tokens
from llm_quest.errors import DataError, UsageError


class HeldOut:
    """Rows of `length` for evaluation; iterating gives TokenBatches of `micro_rows` rows, all of one shape.

    A document longer than a row is cut, and each piece begins without memory of the one before. Pieces share a row
    (segments keep them apart); the rest of a row is padding. The first `limit` targets' worth of whole documents, in a
    fixed shuffled order, at least one document; None: all. num_bytes and num_targets are of what is really covered."""

    def __init__(self, tokens: Tokens, *, length: int, micro_rows: int, limit: int | None = None):
        if length < 1 or micro_rows < 1 or (limit is not None and limit < 1):
            raise UsageError(f"length {length}, micro_rows {micro_rows} and limit {limit} must each be at least 1")
        if tokens.num_targets == 0:
            raise DataError("nothing was held out: the validation split is empty; hold out a larger part")
        self.tokens = tokens
        self.length = length
        self.micro_rows = micro_rows
        self.documents = _within(tokens, limit)
        self.num_bytes = int(tokens.nbytes[self.documents].sum())
        self.num_targets = int((np.diff(tokens.offsets)[self.documents] - 1).sum())
        self._rows = _filled(tokens, self.documents, length)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.micro_rows)

    def __iter__(self) -> Iterator[TokenBatch]:
        return (self.at(number) for number in range(len(self)))

    def at(self, number: int) -> TokenBatch:
        """Batch `number`; rows that are missing from the last one are padding throughout."""
        shape = (self.micro_rows, self.length)
        tokens = np.full(shape, int(self.tokens.ids[0]), dtype=np.int64)
        targets, positions = np.full(shape, IGNORE, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int64)
        for b, t, segment, start, stop, _ in self._pieces(number):
            here = np.s_[b, t : t + stop - start]
            tokens[here], targets[here] = self.tokens.ids[start:stop], self.tokens.ids[start + 1 : stop + 1]
            positions[here], segments[here] = np.arange(stop - start), segment
        tensors = [torch.from_numpy(column) for column in (tokens, targets, positions, segments)]
        return TokenBatch(tensors[0], tensors[1], tensors[2], tensors[3])

    def owners(self, number: int) -> torch.Tensor:
        """(B,T) int64: the document of each token of batch `number`, -1 for padding; for losses per document."""
        owners = torch.full((self.micro_rows, self.length), -1)
        for b, t, _, start, stop, document in self._pieces(number):
            owners[b, t : t + stop - start] = document
        return owners

    def bits_per_byte(self, nats: float) -> float:
        """nats: the sum of -ln p over all targets of these batches."""
        return nats / math.log(2) / self.num_bytes

    def _pieces(self, number: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """(row in the batch, column, segment, first id, last id + 1, document)."""
        for b, row in enumerate(self._rows[number * self.micro_rows : (number + 1) * self.micro_rows]):
            column = 0
            for segment, (start, stop, document) in enumerate(row):
                yield b, column, segment, start, stop, document
                column += stop - start


def eval_batches(tokens: Tokens, length: int, micro_rows: int, limit: int | None = None) -> HeldOut:
    """The held-out batches of a split: see `HeldOut`."""
    return HeldOut(tokens, length=length, micro_rows=micro_rows, limit=limit)


def _within(tokens: Tokens, limit: int | None) -> np.ndarray:
    """The documents that are evaluated, by number."""
    if limit is None:
        return np.arange(tokens.num_documents)
    order = shuffled(tokens.num_documents, 0)
    targets = np.cumsum(np.diff(tokens.offsets)[order] - 1)
    return np.sort(order[: max(1, int(np.searchsorted(targets, limit, side="right")))])


def _filled(tokens: Tokens, documents: np.ndarray, length: int) -> list[list[tuple[int, int, int]]]:
    """Rows of pieces (first id, last id + 1, document). Whole rows first, then the rests, longest first, each into the
    fullest row that has room (best fit, decreasing)."""
    rows, rests = [], []
    for document in documents.tolist():
        start, stop = int(tokens.offsets[document]), int(tokens.offsets[document + 1]) - 1
        cuts = [*range(start, stop, length), stop]
        pieces = [(a, b, document) for a, b in pairwise(cuts)]
        rows += [[piece] for piece in pieces if piece[1] - piece[0] == length]
        rests += [piece for piece in pieces if piece[1] - piece[0] < length]
    room: list[list[list[tuple[int, int, int]]]] = [[] for _ in range(length + 1)]  # open rows by the room they have
    for piece in sorted(rests, key=lambda piece: (piece[0] - piece[1], piece[0])):
        size = piece[1] - piece[0]
        fit = next((left for left in range(size, length) if room[left]), length)
        if fit == length:
            row: list[tuple[int, int, int]] = []
            rows.append(row)
        else:
            row = room[fit].pop()
        row.append(piece)
        room[fit - size].append(row)
    return rows
