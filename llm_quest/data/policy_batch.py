"""PolicyBatch: rows that a policy wrote, and what each of their tokens was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_quest.data.batch import IGNORE

Notes = Mapping[str, tuple[float, float]]
"""Name -> (sum, count): numbers that are known on the host, to be reported with the step."""


@dataclass(frozen=True)
class PolicyRow:
    """One sample, ready to learn from. advantages, sampled and the others are arrays (float32), one number per token
    of `tokens`, the completion. old: scored again by the trainer; reference: by the reference policy."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    advantages: np.ndarray
    sampled: np.ndarray
    old: np.ndarray | None = None
    reference: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens that a pass reads: the last one is only predicted."""
        return len(self.prompt) + len(self.tokens) - 1


@dataclass(frozen=True)
class PolicyBatch:
    """As in `TokenBatch`, `targets[b, t]` is predicted *at* t, and every other tensor stands where its target stands.

    Padding is on the right, where a causal pass never looks back at it: the rows are plain, and no kernel needs a
    mask.

        tokens      p0  p1  a   b   .        prompt p0 p1, completion a b </s>
        targets      .  a   b  </s> .        . is -100
        advantages   0  A   A   A   0
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    sampled: Float[Tensor, "B T"]
    old: Float[Tensor, "B T"] | None = None
    reference: Float[Tensor, "B T"] | None = None
    num_tokens: int = 0
    notes: Notes = field(default_factory=dict)
    positions: ClassVar[None] = None
    segments: ClassVar[None] = None

    @property
    def learn(self) -> Bool[Tensor, "B T"]:
        return self.targets != IGNORE

    def to(self, device: torch.device | str) -> PolicyBatch:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: thing.to(device) for name, thing in named.items() if isinstance(thing, Tensor)}
        return replace(self, **moved)


def policy_batch(rows: Sequence[PolicyRow], notes: Notes | None = None) -> PolicyBatch:
    """Rows side by side, on the host. No rows: one token with nothing to learn, to carry the notes."""
    length = max((row.length for row in rows), default=1)
    shape = (max(len(rows), 1), length)
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE)
    more = [name for name in ("old", "reference") if rows and getattr(rows[0], name) is not None]
    values: dict[str, Any] = {name: np.zeros(shape, np.float32) for name in ("advantages", "sampled", *more)}
    for number, row in enumerate(rows):
        first = len(row.prompt) - 1
        tokens[number, : row.length] = (row.prompt + row.tokens)[:-1]
        targets[number, first : row.length] = row.tokens
        for name, value in values.items():
            value[number, first : row.length] = getattr(row, name)
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in values.items()}
    return PolicyBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        num_tokens=sum(row.length for row in rows),
        notes=dict(notes or {}),
        **tensors,
    )


def grouped(rows: Sequence[PolicyRow], budget: int) -> list[list[PolicyRow]]:
    """Longest first (equal ones in their order), so that rows of like length stand together and little is padding; no
    group reads more than `budget` tokens, padding included, but for a row that alone is longer."""
    groups: list[list[PolicyRow]] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if groups and (len(groups[-1]) + 1) * groups[-1][0].length <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def micro_batches(rows: Sequence[PolicyRow], budget: int, notes: Notes | None = None) -> list[PolicyBatch]:
    """A batch of each group. The notes travel with the first, of which there is always one."""
    groups = grouped(rows, budget) or [[]]
    return [policy_batch(some, None if number else notes) for number, some in enumerate(groups)]
