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

from llm_quest.contracts import Share
from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.packing import shuffled
from llm_quest.errors import DataError, UsageError

Ids = Sequence[int]


class WholeFeed:
    """documents: ids with start and end. learn: for each document the places that are learned (tokens[place] is to be
    foretold from what stands before it); None: all. micro_tokens: what a micro-batch reads at most, padding
    included."""

    def __init__(
        self,
        documents: Sequence[Ids],
        *,
        rows: int,
        seed: int,
        learn: Sequence[Ids] | None = None,
        micro_tokens: int = 8192,
        share: Share = Share(),
    ):
        if not documents:
            raise DataError("there is no document to learn from; add text")
        if rows % share.world:
            raise UsageError(f"{rows} rows cannot be shared by {share.world} processes; make rows a multiple of that")
        self.documents, self.learn = documents, learn
        self.rows, self.seed, self.micro_tokens, self.share = rows, seed, micro_tokens, share
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(documents), seed, epoch))

    def at(self, step: int) -> list[TokenBatch]:
        mine = self.rows // self.share.world
        first = step * self.rows + self.share.rank * mine
        numbers = [self.number(first + place) for place in range(mine)]
        longest = max(len(self.documents[number]) for number in numbers) - 1
        some = max(1, self.micro_tokens // longest)
        return [self.batch(numbers[start : start + some]) for start in range(0, mine, some)]

    def number(self, place: int) -> int:
        """Which document stands at a place of the endless list."""
        epoch, at = divmod(place, len(self.documents))
        return int(self._order(epoch)[at])

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        places = None if self.learn is None else [self.learn[number] for number in numbers]
        return whole_rows([self.documents[number] for number in numbers], places)

    def bookmark(self) -> dict[str, Any]:
        return {"feed": "whole", "data": fingerprint(self.documents), "rows": self.rows, "seed": self.seed}

    def resume(self, bookmark: Mapping[str, Any]) -> None:
        if bookmark != self.bookmark():
            raise DataError("the checkpoint belongs to other documents, or another order of them; start a new run")


def whole_rows(documents: Sequence[Ids], learn: Sequence[Ids] | None = None) -> TokenBatch:
    """Every document as a row; only the places in `learn` have targets, where it is given."""
    length = max(map(len, documents)) - 1
    tokens = np.zeros((len(documents), length), np.int64)
    targets = np.full_like(tokens, IGNORE)
    for number, ids in enumerate(documents):
        end = len(ids) - 1
        tokens[number, :end] = ids[:-1]
        places = np.arange(1, end + 1) if learn is None else np.asarray(learn[number], np.int64)
        targets[number, places - 1] = np.asarray(ids)[places]
    counted = sum(len(ids) - 1 for ids in documents)
    return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(targets), counted=counted)


def fingerprint(documents: Sequence[Ids]) -> str:
    """sha256 of all ids, and of where each document ends."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(np.asarray([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()
