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
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.preferences import Rated


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


class Pairs:
    """A `by_length.Source` of rated answers. reference: see `compared`; may be set when it is known."""

    def __init__(self, elements: Sequence[Rated]):
        self.elements = elements
        self.reference: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.elements)

    @cached_property
    def hash(self) -> str:
        """sha256 of all ids and margins."""
        told = hashlib.sha256()
        for one in self.elements:
            told.update(repr((one.margin, len(one.prompt), *map(len, one.answers))).encode())
            told.update(one.prompt.tobytes() + b"".join(answer.tobytes() for answer in one.answers))
        return told.hexdigest()

    def size(self, number: int) -> int:
        return self.elements[number].size

    def batch(self, numbers: Sequence[int]) -> AnswerBatch:
        """These elements."""
        known = None if self.reference is None else [self.reference[number] for number in numbers]
        return compared([self.elements[number] for number in numbers], known)
