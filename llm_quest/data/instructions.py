"""Rows for supervised fine-tuning: whole conversations packed into rows of one length, of which only the answers are
learned.

    tokens      Q Q Q a a e  Q Q a a a  .       Q question, a answer, e its end; the last id of each is no input
    targets     . . a a e .  . a a a e  .       what is to be written is learned, the question is only read
    positions   0 1 2 3 4 5  0 1 2 3 4 -1       each conversation from zero
    segments    0 0 0 0 0 0  1 1 1 1 1  0       and none sees its neighbors

Commonly got wrong: a conversation cut by the row's end gets an answer without a question, or an end that was never
said. Here none is cut: those longer than a row are dropped and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.chat import ChatExample
from llm_quest.data.document import DropReport
from llm_quest.data.loader import shuffled_batches
from llm_quest.data.packing import pack_best_fit
from llm_quest.errors import DataError


def drop_too_long(examples: Sequence[ChatExample], max_length: int, drop_report: DropReport) -> list[ChatExample]:
    """The conversations that fit into a row; the report counts the others. DataError if none does."""
    kept = [example for example in examples if example.last_answer_span[1] - 1 <= max_length]
    for one in examples:
        if one.last_answer_span[1] - 1 > max_length:
            drop_report.drop(f"longer than a row of {max_length} tokens", 0)
    if examples and not kept:
        shortest = min(example.last_answer_span[1] - 1 for example in examples)
        raise DataError(
            f"no conversation fits into {max_length} tokens (the shortest has {shortest}); raise sequence_length"
        )
    return kept


class PackedExamples:
    """The `RowSource` of fine-tuning: conversations packed into rows once (`pack_best_fit`), the rows in another order
    each epoch."""

    def __init__(self, examples: Sequence[ChatExample], sequence_length: int):
        self.examples, self.sequence_length = examples, sequence_length
        self.packed_rows = pack_best_fit([example.last_answer_span[1] - 1 for example in examples], sequence_length)
        digest = hashlib.sha256()
        for one in examples:
            digest.update(one.input_ids.astype(np.int64).tobytes() + b"|" + one.assistant_mask.tobytes() + b"\n")
        self.hash = digest.hexdigest()
        self.num_targets = sum(int(example.assistant_mask[1:].sum()) for example in examples)

    def __len__(self) -> int:
        return len(self.packed_rows)

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[TokenBatch]:
        return shuffled_batches(self, rows, micro_batch_size, seed)

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "instructions", "data": self.hash, "sequence_length": self.sequence_length}

    def collate(self, row_indices: Sequence[int]) -> TokenBatch:
        """Make a batch of these rows."""
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
