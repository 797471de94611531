"""PackedFeed: documents shuffled, laid end to end, cut into rows; the batch at a step is a function of (seed, step).

    documents   [s a b c d e]  [s f g]  [s h i j]          s start, e end; each id but a document's last is an input
    inputs       s a b c | d  s f  g | s  h i j            rows of four; the row's first position is zero again
    targets      a b c d | e  f g  e | h  i j e            the next id of the same document, always
    positions    0 1 2 3 | 0  0 1  2 | 0  1 2 3
    segments     0 0 0 0 | 0  1 1  1 | 0  0 0 0

Commonly got wrong: (1) a document cut by a row's end gets an end-of-text target that is not in the text, and the model
learns to stop in mid-sentence; here its last target is the true next token. (2) A target across a boundary asks for
the next document's first word; here a document's last target is its end. (3) Documents see their neighbours in the
row: `segments`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.tokens import TokenizedDocuments
from llm_quest.errors import DataError, UsageError

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


class EpochOrder(NamedTuple):
    """One order of everything: documents in order, where each begins among the inputs, rows in order."""

    documents: np.ndarray
    document_starts: np.ndarray
    rows: np.ndarray


class PackedLoader:
    """A `contracts.Feed` over one split.

    sequence_length: inputs per row. batch_size: of the global batch. micro_batch_size: at most so many in a
    micro-batch. Of the rows of a step, rank r has the r-th of `world_size` equal runs. In an epoch every input is seen
    exactly once: documents and rows are ordered by (seed, epoch), the epoch's last row is padded. A single document
    gives plain rows (no positions, no segments), for which attention needs no mask."""

    def __init__(
        self,
        tokens: TokenizedDocuments,
        *,
        sequence_length: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        share: DataShard = DataShard(),
    ):
        wrong = {"length": sequence_length, "rows": batch_size, "micro_rows": micro_batch_size}
        if bad := [f"{name} is {value}" for name, value in wrong.items() if value < 1]:
            raise UsageError(f"{', '.join(bad)}; expected at least 1")
        if batch_size % share.world_size:
            raise UsageError(
                f"{batch_size} rows cannot be shared by {share.world_size} processes; make rows a multiple of that"
            )
        if tokens.num_targets == 0:
            raise DataError("the training split holds no documents; add text or hold out less")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.share = share
        self.rows_per_epoch = -(-tokens.num_targets // sequence_length)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch_order)

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
        tokens, targets, positions, segments = (
            torch.from_numpy(np.stack(column)) for column in zip(*map(self._make_row, row_numbers), strict=True)
        )
        if self.tokens.num_documents > 1:
            return TokenBatch(tokens, targets, positions, segments)
        # Padding stands at the row's end, where no token of a plain causal row can see it.
        return TokenBatch(tokens, targets, token_count=int((positions >= 0).sum()))

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on. There is no state: the step says where the feed stands."""
        settings = {"length": self.sequence_length, "rows": self.batch_size, "seed": self.seed}
        return {"feed": "packed", "data": self.tokens.hash} | settings

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; DataError if the bookmark is of other data or another order of it."""
        here = self.state_dict()
        changed = [
            f"{key} was {state_dict.get(key)}, is {here[key]}" for key in here if state_dict.get(key) != here[key]
        ]
        if changed:
            raise DataError(f"the checkpoint belongs to another stream of data: {'; '.join(changed)}; start a new run")

    def epochs_done(self, step: int) -> float:
        """How often the data have been seen before this step."""
        return step * self.batch_size / self.rows_per_epoch

    def _make_row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        epoch, place = divmod(number, self.rows_per_epoch)
        order = self._epoch(epoch)
        start = int(order.rows[place]) * self.sequence_length
        inputs = np.arange(start, min(start + self.sequence_length, self.tokens.num_targets))
        which = np.searchsorted(order.document_starts, inputs, side="right") - 1
        begins = order.document_starts[which]
        ids = self.tokens.offsets[order.documents[which]] + (inputs - begins)
        columns = (self.tokens.ids[ids], self.tokens.ids[ids + 1], inputs - np.maximum(begins, start), which - which[0])
        short = self.sequence_length - len(inputs)
        fill = (int(self.tokens.ids[0]), IGNORE_INDEX, -1, 0)
        tokens, targets, positions, segments = (
            np.pad(column.astype(np.int64), (0, short), constant_values=value)
            for column, value in zip(columns, fill, strict=True)
        )
        return tokens, targets, positions, segments

    def _make_epoch_order(self, epoch: int) -> EpochOrder:
        documents = shuffle_indices(self.tokens.num_documents, self.seed, epoch, 0)
        inputs = np.diff(self.tokens.offsets)[documents] - 1
        begins = np.concatenate([[0], np.cumsum(inputs)[:-1]])
        return EpochOrder(documents, begins, shuffle_indices(self.rows_per_epoch, self.seed, epoch, 1))


def shuffle_indices(size: int, *key: int) -> np.ndarray:
    """0..number-1 in an order that depends on the key alone: the same with every version of every library. Each number
    gets 64 bits by the splitmix64 finaliser (Steele, Lea & Flood 2014), and they are sorted by them."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _splitmix64(state + np.uint64(part % 2**64) * GOLDEN_GAMMA + np.uint64(1))
        bits = _splitmix64(np.arange(size, dtype=np.uint64) * GOLDEN_GAMMA + state)
    return np.argsort(bits, kind="stable")


def philox_uniforms(seed: int, number: int) -> np.ndarray:
    """8 float32 in 0..1 that depend on seed and number alone (Philox, a counter-based generator)."""
    raw = np.random.Philox(key=seed % 2**64, counter=number).random_raw(8)
    return ((raw >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _splitmix64(bits: Any) -> Any:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
