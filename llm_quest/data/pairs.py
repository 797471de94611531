"""Batches of rated answers: one row for question and answer, and which rows are to be compared.

    rows 0 1 2 3 4     elements  [best worst] [best middle worst]
    better 0 2 2 3     worse     1 3 4 4       weights 1 1/3 1/3 1/3

K ranked answers are K(K-1)/2 comparisons that belong to one element and weigh one together (InstructGPT,
arXiv:2203.02155, section 3.5): each answer is read once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.contracts import Share
from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.instructions import require_same
from llm_quest.data.packing import shuffled
from llm_quest.data.preferences import Rated
from llm_quest.errors import UsageError


@dataclass(frozen=True)
class AnswerBatch:
    """tokens, targets, positions (R,T): as in TokenBatch, answers alone learned, padded on the right; the last token of
    a row, its end, predicts nothing. better, worse (M,): rows compared. weights, margins (M,). reference (R,): the
    reference's log-probability of each answer, where it is known."""

    tokens: Int[Tensor, "R T"]
    targets: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    better: Int[Tensor, " M"]
    worse: Int[Tensor, " M"]
    weights: Float[Tensor, " M"]
    margins: Float[Tensor, " M"]
    reference: Float[Tensor, " R"] | None = None
    counted: int | None = field(default=None, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding. Known on the host after `to`."""
        return int((self.positions >= 0).sum()) if self.counted is None else self.counted

    @property
    def rows(self) -> TokenBatch:
        """The rows alone."""
        return TokenBatch(self.tokens, self.targets, self.positions, counted=self.counted)

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same batch on another device."""
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {name: x.to(device, non_blocking=True) for name, x in held.items() if isinstance(x, Tensor)}
        return replace(self, **moved, counted=self.num_tokens)


def compared(elements: Sequence[Rated], reference: Sequence[np.ndarray] | None = None) -> AnswerBatch:
    """These elements as a batch. reference: of each element, a number for each answer."""
    rows = [(one.prompt, answer) for one in elements for answer in one.answers]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, positions = (np.full((len(rows), width), fill, dtype=np.int64) for fill in (0, -1))
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for r, (prompt, answer) in enumerate(rows):
        size = len(prompt) + len(answer)
        tokens[r, :size], positions[r, :size] = np.concatenate([prompt, answer]), np.arange(size)
        targets[r, len(prompt) - 1 : size - 1] = answer
    first, pairs = 0, []
    for one in elements:
        K = len(one.answers)
        pairs += [(first + i, first + j, 2 / (K * (K - 1)), one.margin) for i, j in combinations(range(K), 2)]
        first += K
    better, worse, weights, margins = (torch.tensor(column) for column in zip(*pairs, strict=True))
    known = None if reference is None else torch.from_numpy(np.concatenate(reference)).float()
    told = [torch.from_numpy(column) for column in (tokens, targets, positions)]
    return AnswerBatch(told[0], told[1], told[2], better, worse, weights.float(), margins.float(), known)


class PairFeed:
    """A `contracts.Feed` over rated answers, in another order each epoch.

    rows: elements of the global batch. micro_rows: at most so many in a micro-batch, which holds elements of like
    length. Rank r has the r-th of `world` equal runs of a step's elements. reference: see `compared`; may be set when
    it is known."""

    def __init__(self, elements: Sequence[Rated], *, rows: int, micro_rows: int, seed: int, share: Share = Share()):
        if rows % share.world:
            raise UsageError(f"{rows} rows cannot be shared by {share.world} processes; make rows a multiple of that")
        self.elements, self.rows, self.micro_rows, self.seed, self.share = elements, rows, micro_rows, seed, share
        self.reference: Sequence[np.ndarray] | None = None
        self.hash = hash_of(elements)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: shuffled(len(elements), seed, epoch))

    def at(self, step: int) -> list[AnswerBatch]:
        """This rank's micro-batches of optimiser step `step`."""
        mine = self.rows // self.share.world
        first = step * self.rows + self.share.rank * mine
        places = (divmod(number, len(self.elements)) for number in range(first, first + mine))
        chosen = sorted((int(self._epoch(epoch)[place]) for epoch, place in places), key=self._size)
        return [self.batch(chosen[at : at + self.micro_rows]) for at in range(0, mine, self.micro_rows)]

    def batch(self, numbers: Sequence[int]) -> AnswerBatch:
        """These elements."""
        known = None if self.reference is None else [self.reference[number] for number in numbers]
        return compared([self.elements[number] for number in numbers], known)

    def bookmark(self) -> dict[str, Any]:
        """What the order depends on."""
        return {"feed": "pairs", "data": self.hash, "rows": self.rows, "seed": self.seed}

    def resume(self, bookmark: dict[str, Any]) -> None:
        """Nothing to restore; DataError if the bookmark is of other data or another order of it."""
        require_same(bookmark, self.bookmark())

    def _size(self, number: int) -> tuple[int, int]:
        return self.elements[number].size, number


def hash_of(elements: Sequence[Rated]) -> str:
    """sha256 of all ids and margins."""
    told = hashlib.sha256()
    for one in elements:
        told.update(repr((one.margin, len(one.prompt), *map(len, one.answers))).encode())
        told.update(one.prompt.tobytes() + b"".join(answer.tobytes() for answer in one.answers))
    return told.hexdigest()


def by_length(elements: Sequence[Rated], at_once: int) -> list[list[int]]:
    """Numbers of all elements, those of like length together: for passes in which order is nothing."""
    order = sorted(range(len(elements)), key=lambda number: (elements[number].size, number))
    return [order[at : at + at_once] for at in range(0, len(order), at_once)]
