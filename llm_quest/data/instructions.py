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

from llm_quest.contracts import DataShard
from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.chat import ChatExample
from llm_quest.data.documents import DropReport
from llm_quest.data.packing import shuffle_indices
from llm_quest.errors import DataError, UsageError


def drop_too_long(
    examples: Sequence[ChatExample], max_length: int, drop_report: DropReport, what: str = ""
) -> list[ChatExample]:
    """Those whose inputs fit into a row; the ledger counts the others. DataError if none does."""
    kept = [one for one in examples if one.last_answer_span[1] - 1 <= max_length]
    for one in examples:
        if one.last_answer_span[1] - 1 > max_length:
            drop_report.drop(f"longer than a row of {max_length} tokens{what}", 0)
    if examples and not kept:
        shortest = min(one.last_answer_span[1] - 1 for one in examples)
        raise DataError(
            f"no conversation fits into {max_length} tokens (the shortest has {shortest}); raise sequence_length"
        )
    return kept


class PackedExamples:
    """Examples laid into rows once: longest first, each into the fullest row that has room (best fit, decreasing)."""

    def __init__(self, examples: Sequence[ChatExample], sequence_length: int):
        self.examples, self.sequence_length = examples, sequence_length
        self.packed_rows = pack_best_fit([one.last_answer_span[1] - 1 for one in examples], sequence_length)
        digest = hashlib.sha256()
        for one in examples:
            digest.update(one.input_ids.tobytes() + b"|" + one.assistant_mask.tobytes() + b"\n")
        self.hash = digest.hexdigest()
        self.num_targets = sum(int(one.assistant_mask[1:].sum()) for one in examples)

    def __len__(self) -> int:
        return len(self.packed_rows)

    def collate(self, row_indices: Sequence[int]) -> TokenBatch:
        """These rows."""
        shape = (len(row_indices), self.sequence_length)
        tokens, segments = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        targets, positions = np.full(shape, IGNORE_INDEX, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        for b, number in enumerate(row_indices):
            at = 0
            for segment, example in enumerate(self.packed_rows[number]):
                ids, learned = self.examples[example].input_ids, self.examples[example].assistant_mask
                size = self.examples[example].last_answer_span[1] - 1
                here = np.s_[b, at : at + size]
                tokens[here], positions[here], segments[here] = ids[:size], np.arange(size), segment
                targets[here] = np.where(learned[1 : size + 1], ids[1 : size + 1], IGNORE_INDEX)
                at += size
        tensors = [torch.from_numpy(column) for column in (tokens, targets, positions, segments)]
        return TokenBatch(tensors[0], tensors[1], tensors[2], tensors[3])


class InstructionLoader:
    """A `contracts.Feed` over rows of conversations, in another order each epoch.

    batch_size: of the global batch. micro_batch_size: at most so many in a micro-batch. Rank r has the r-th of
    `world_size` equal runs of a step's rows."""

    def __init__(
        self,
        dataset: PackedExamples,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        share: DataShard = DataShard(),
    ):
        if batch_size % share.world_size:
            raise UsageError(
                f"{batch_size} rows cannot be shared by {share.world_size} processes; make rows a multiple of that"
            )
        self.dataset, self.batch_size, self.micro_batch_size, self.seed, self.share = (
            dataset,
            batch_size,
            micro_batch_size,
            seed,
            share,
        )
        self._epoch = lru_cache(maxsize=2)(lambda epoch: shuffle_indices(len(dataset), seed, epoch))

    def batches(self, step: int) -> list[TokenBatch]:
        """This rank's micro-batches of optimiser step `step`."""
        local_batch_size = self.batch_size // self.share.world_size
        first = step * self.batch_size + self.share.rank * local_batch_size
        starts = range(first, first + local_batch_size, self.micro_batch_size)
        return [
            self.micro_batch(range(start, min(start + self.micro_batch_size, first + local_batch_size)))
            for start in starts
        ]

    def micro_batch(self, row_numbers: range) -> TokenBatch:
        """Rows by their number since the beginning of training."""
        places = (divmod(number, len(self.dataset)) for number in row_numbers)
        return self.dataset.collate([int(self._epoch(epoch)[place]) for epoch, place in places])

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on. There is no state: the step says where the feed stands."""
        settings = {"length": self.dataset.sequence_length, "rows": self.batch_size, "seed": self.seed}
        return {"feed": "instructions", "data": self.dataset.hash} | settings

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; DataError if the bookmark is of other data or another order of it."""
        require_same_data(state_dict, self.state_dict())


def require_same_data(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """DataError that names what differs."""
    changed = [f"{key} was {saved.get(key)}, is {here[key]}" for key in here if saved.get(key) != here[key]]
    if changed:
        raise DataError(f"the checkpoint belongs to another stream of data: {'; '.join(changed)}; start a new run")


def pack_best_fit(sizes: Sequence[int], sequence_length: int) -> list[list[int]]:
    """Numbers of the items of each row: none longer than `length`, few rows."""
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
