"""Batches of rated answers: one row for question and answer, and which rows are to be compared.

    rows 0 1 2 3 4     elements  [best worst] [best middle worst]
    better 0 2 2 3     worse     1 3 4 4       weights 1 1/3 1/3 1/3

K ranked answers are K(K-1)/2 comparisons that belong to one element and weigh one together (InstructGPT,
arXiv:2203.02155, section 3.5): each answer is read once. So is the question, where rows share it (`data/prefix.py`):
they then begin at its last token, and end before their own, which predicts nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.preferences import Rated
from llm_quest.data.prefix import Prefix, alone, laid, together


@dataclass(frozen=True)
class AnswerBatch:
    """tokens, targets, positions (R,T): as in TokenBatch, answers alone learned, padded on the right; the last token of
    a row, its end, predicts nothing. better, worse (M,): rows compared. weights, margins (M,). reference (R,): the
    reference's log-probability of each answer, where it is known. prefix: the questions that rows go on from, where
    they are shared."""

    tokens: Int[Tensor, "R T"]
    targets: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    better: Int[Tensor, " M"]
    worse: Int[Tensor, " M"]
    weights: Float[Tensor, " M"]
    margins: Float[Tensor, " M"]
    reference: Float[Tensor, " R"] | None = None
    prefix: Prefix | None = None
    counted: int | None = field(default=None, repr=False, compare=False)
    segments: ClassVar[None] = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding, of rows that are read in full. Known on the host after `to`."""
        return int((self.positions >= 0).sum()) if self.counted is None else self.counted

    @property
    def rows(self) -> TokenBatch:
        """The rows alone, each with its question."""
        if self.prefix is None:
            return TokenBatch(self.tokens, self.targets, self.positions, counted=self.counted)
        of, before = self.prefix.of, self.prefix
        tokens = torch.cat([before.tokens[of], self.tokens], dim=1)
        positions = torch.cat([before.positions[of], self.positions], dim=1)
        targets = torch.cat([torch.full_like(before.tokens[of], IGNORE), self.targets], dim=1)
        return TokenBatch(tokens, targets, positions, counted=self.counted)

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same batch on another device."""
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {
            name: x.to(device, non_blocking=True) for name, x in held.items() if isinstance(x, Tensor)
        }
        moved["prefix"] = None if self.prefix is None else self.prefix.to(device)
        return replace(self, **moved, counted=self.num_tokens)


def compared(
    elements: Sequence[Rated], reference: Sequence[np.ndarray] | None = None, *, shared: bool = False
) -> AnswerBatch:
    """These elements as a batch. reference: of each element, a number for each answer. shared: a question is read once
    for all of its answers, where that reads fewer tokens."""
    rows = [(one.prompt.tolist(), answer.tolist()) for one in elements for answer in one.answers]
    in_full, in_part = ([(prompt, len(answer) - less) for prompt, answer in rows] for less in (0, 1))
    shared = shared and together(in_part) < alone(in_full)
    made = laid([(prompt, answer[:-1] if shared else answer) for prompt, answer in rows], shared=shared)
    targets = np.full(made.tokens.shape, IGNORE, dtype=np.int64)
    for r, ((_, answer), begin) in enumerate(zip(rows, made.firsts, strict=True)):
        targets[r, begin : begin + len(answer)] = answer
    first, pairs = 0, []
    for one in elements:
        K = len(one.answers)
        pairs += [(first + i, first + j, 2 / (K * (K - 1)), one.margin) for i, j in combinations(range(K), 2)]
        first += K
    better, worse, weights, margins = (torch.tensor(column) for column in zip(*pairs, strict=True))
    known = None if reference is None else torch.from_numpy(np.concatenate(reference)).float()
    told = [torch.from_numpy(column) for column in (made.tokens, targets, made.positions)]
    return AnswerBatch(
        told[0], told[1], told[2], better, worse, weights.float(), margins.float(), known, made.prefix,
        counted=sum(len(prompt) + len(answer) for prompt, answer in rows),
    )  # fmt: skip


class Pairs:
    """A `by_length.Source` of rated answers. reference, shared: see `compared`; the first may be set when it is
    known."""

    def __init__(self, elements: Sequence[Rated], *, shared: bool = False):
        self.elements, self.shared = elements, shared
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
        return compared([self.elements[number] for number in numbers], known, shared=self.shared)
