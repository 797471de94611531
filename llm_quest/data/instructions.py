"""Rows for fine-tuning: whole conversations side by side in rows of one length, answers alone learned; the batch at a
step is a function of (seed, step).

    tokens      Q Q Q a a e  Q Q a a a  .       Q question, a answer, e its end; the last id of each is no input
    targets     . . a a e .  . a a a e  .       what is to be written is learned, the question is only read
    positions   0 1 2 3 4 5  0 1 2 3 4 -1       each conversation from zero
    segments    0 0 0 0 0 0  1 1 1 1 1  0       and none sees its neighbours

Commonly got wrong: a conversation cut by the row's end gets an answer without a question, or an end that was never
said. Here none is cut: those longer than a row are dropped and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from llm_quest.contracts import Share
from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.chat import Example
from llm_quest.data.documents import Ledger
from llm_quest.data.packing import shuffled
from llm_quest.errors import DataError, UsageError


def fitting(examples: Sequence[Example], length: int, ledger: Ledger, what: str = "") -> list[Example]:
    """Those whose inputs fit into a row; the ledger counts the others. DataError if none does."""
    kept = [one for one in examples if one.last[1] - 1 <= length]
    for one in examples:
        if one.last[1] - 1 > length:
            ledger.drop(f"longer than a row of {length} tokens{what}", 0)
    if examples and not kept:
        shortest = min(one.last[1] - 1 for one in examples)
        raise DataError(f"no conversation fits into {length} tokens (the shortest has {shortest}); raise batch.length")
    return kept


class Rows:
    """Examples laid into rows once: longest first, each into the fullest row that has room (best fit, decreasing)."""

    def __init__(self, examples: Sequence[Example], length: int):
        self.examples, self.length = examples, length
        self.rows = packed([one.last[1] - 1 for one in examples], length)
        told = hashlib.sha256()
        for one in examples:
            told.update(one.ids.tobytes() + b"|" + one.learned.tobytes() + b"\n")
        self.hash = told.hexdigest()
        self.num_targets = sum(int(one.learned[1:].sum()) for one in examples)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        """These rows."""
        shape = (len(numbers), self.length)
        tokens, segments = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        targets, positions = np.full(shape, IGNORE, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        for b, number in enumerate(numbers):
            at = 0
            for segment, example in enumerate(self.rows[number]):
                ids, learned = self.examples[example].ids, self.examples[example].learned
                size = self.examples[example].last[1] - 1
                here = np.s_[b, at : at + size]
                tokens[here], positions[here], segments[here] = ids[:size], np.arange(size), segment
                targets[here] = np.where(learned[1 : size + 1], ids[1 : size + 1], IGNORE)
                at += size
        tensors = [torch.from_numpy(column) for column in (tokens, targets, positions, segments)]
        return TokenBatch(tensors[0], tensors[1], tensors[2], tensors[3])


class InstructionFeed:
    """A `contracts.Feed` over rows of conversations, in another order each epoch.

    rows: of the global batch. micro_rows: at most so many in a micro-batch. Rank r has the r-th of `world` equal runs
    of a step's rows."""

    def __init__(self, source: Rows, *, rows: int, micro_rows: int, seed: int, share: Share = Share()):
        if rows % share.world:
            raise UsageError(f"{rows} rows cannot be shared by {share.world} processes; make rows a multiple of that")
        self.source, self.rows, self.micro_rows, self.seed, self.share = source, rows, micro_rows, seed, share
        self._epoch = lru_cache(maxsize=2)(lambda epoch: shuffled(len(source), seed, epoch))

    def at(self, step: int) -> list[TokenBatch]:
        """This rank's micro-batches of optimiser step `step`."""
        mine = self.rows // self.share.world
        first = step * self.rows + self.share.rank * mine
        starts = range(first, first + mine, self.micro_rows)
        return [self.batch(range(start, min(start + self.micro_rows, first + mine))) for start in starts]

    def batch(self, numbers: range) -> TokenBatch:
        """Rows by their number since the beginning of training."""
        places = (divmod(number, len(self.source)) for number in numbers)
        return self.source.batch([int(self._epoch(epoch)[place]) for epoch, place in places])

    def bookmark(self) -> dict[str, Any]:
        """What the order depends on. There is no state: the step says where the feed stands."""
        settings = {"length": self.source.length, "rows": self.rows, "seed": self.seed}
        return {"feed": "instructions", "data": self.source.hash} | settings

    def resume(self, bookmark: dict[str, Any]) -> None:
        """Nothing to restore; DataError if the bookmark is of other data or another order of it."""
        require_same(bookmark, self.bookmark())


def require_same(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """DataError that names what differs."""
    changed = [f"{key} was {saved.get(key)}, is {here[key]}" for key in here if saved.get(key) != here[key]]
    if changed:
        raise DataError(f"the checkpoint belongs to another stream of data: {'; '.join(changed)}; start a new run")


def packed(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of the items of each row: none longer than `length`, few rows."""
    rows: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room they have left
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        size = sizes[number]
        fit = next((left for left in range(size, length + 1) if room[left]), None)
        if fit is None:
            rows.append([])
            row, fit = len(rows) - 1, length
        else:
            row = room[fit].pop()
        rows[row].append(number)
        room[fit - size].append(row)
    return rows
