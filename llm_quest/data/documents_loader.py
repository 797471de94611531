"""Whole documents, each in a row of its own, padded on the right where a causal pass never looks back.

Row i of step s is document number s x rows + i of an endless list that holds every document once per epoch, in an order
of the epoch's own: a function of (seed, step), and there is no state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.packing import shuffle_indices
from llm_quest.errors import DataError, UsageError

TokenIds = Sequence[int]


class DocumentLoader:
    """documents: ids with start and end. target_positions: for each document the places that are learned (tokens[place]
    is to be foretold from what stands before it); None: all. max_micro_batch_tokens: what a micro-batch reads at most,
    padding included."""

    def __init__(
        self,
        documents: Sequence[TokenIds],
        *,
        batch_size: int,
        seed: int,
        target_positions: Sequence[TokenIds] | None = None,
        max_micro_batch_tokens: int = 8192,
        share: DataShard = DataShard(),
    ):
        if not documents:
            raise DataError("there is no document to learn from; add text")
        if batch_size % share.world_size:
            raise UsageError(
                f"{batch_size} rows cannot be shared by {share.world_size} processes; make rows a multiple of that"
            )
        self.documents, self.target_positions = documents, target_positions
        self.batch_size, self.seed, self.max_micro_batch_tokens, self.share = (
            batch_size,
            seed,
            max_micro_batch_tokens,
            share,
        )
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffle_indices(len(documents), seed, epoch))

    def batches(self, step: int) -> list[TokenBatch]:
        local_batch_size = self.batch_size // self.share.world_size
        first = step * self.batch_size + self.share.rank * local_batch_size
        numbers = [self.document_index(first + place) for place in range(local_batch_size)]
        longest = max(len(self.documents[number]) for number in numbers) - 1
        some = max(1, self.max_micro_batch_tokens // longest)
        return [self.micro_batch(numbers[start : start + some]) for start in range(0, local_batch_size, some)]

    def document_index(self, place: int) -> int:
        """Which document stands at a place of the endless list."""
        epoch, at = divmod(place, len(self.documents))
        return int(self._order(epoch)[at])

    def micro_batch(self, document_indices: Sequence[int]) -> TokenBatch:
        places = (
            None if self.target_positions is None else [self.target_positions[number] for number in document_indices]
        )
        return collate_documents([self.documents[number] for number in document_indices], places)

    def state_dict(self) -> dict[str, Any]:
        return {"feed": "whole", "data": hash_documents(self.documents), "rows": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict != self.state_dict():
            raise DataError("the checkpoint belongs to other documents, or another order of them; start a new run")


def collate_documents(documents: Sequence[TokenIds], target_positions: Sequence[TokenIds] | None = None) -> TokenBatch:
    """Every document as a row; only the places in `learn` have targets, where it is given."""
    length = max(map(len, documents)) - 1
    tokens = np.zeros((len(documents), length), np.int64)
    targets = np.full_like(tokens, IGNORE_INDEX)
    for number, ids in enumerate(documents):
        end = len(ids) - 1
        tokens[number, :end] = ids[:-1]
        places = np.arange(1, end + 1) if target_positions is None else np.asarray(target_positions[number], np.int64)
        targets[number, places - 1] = np.asarray(ids)[places]
    counted = sum(len(ids) - 1 for ids in documents)
    return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(targets), token_count=counted)


def hash_documents(documents: Sequence[TokenIds]) -> str:
    """sha256 of all ids, and of where each document ends."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(np.asarray([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()
