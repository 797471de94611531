"""A reward model as a reward, and its food: comparisons of what the policy wrote, labelled from outside.

Commonly got wrong: the reward model labels its own training data, which teaches it nothing; and only the newest samples
are learned from, so that what it knew before is forgotten (DeepSeekMath, arXiv:2402.03300, replays a tenth)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from llm_quest.contracts import Reward
from llm_quest.data.pairs import AnswerBatch, Pairs, compared
from llm_quest.data.preferences import Rated
from llm_quest.data.problems.problem import chance
from llm_quest.errors import DataError
from llm_quest.rollouts.sample import Sample

Score = Callable[[Sequence[Sequence[int]]], Tensor]


@dataclass(frozen=True)
class Scored:
    """The model's number for each sample, read where it ends. score: rows of ids (prompt and completion) -> numbers.
    The ids are those that were sampled: both models read the same tokenizer's."""

    score: Score

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [float(value) for value in self.score([sample.prompt + sample.tokens for sample in group])]


def comparisons(groups: Sequence[Sequence[Sample]], gold: Reward, seed: int = 0) -> list[Rated]:
    """From each group with both better and worse: one of its best beside one of its worst, by the gold reward."""
    found = []
    for number, group in enumerate(groups):
        told = [(value, sample) for value, sample in zip(gold(group), group, strict=True) if not math.isnan(value)]
        top, bottom = max((v for v, _ in told), default=0.0), min((v for v, _ in told), default=0.0)
        if top > bottom:
            pick = chance("comparison", seed, number)
            better, worse = (pick.choice([s for v, s in told if v == end]) for end in (top, bottom))
            ids = [np.array(one, np.int64) for one in (better.prompt, better.tokens, worse.tokens)]
            found.append(Rated(ids[0], (ids[1], ids[2])))
    return found


class ReplayFeed:
    """Comparisons for a reward model that is trained on: each batch of `rows` holds round(share x rows) from the
    history (of earlier iterations, never this one's) and the rest new. (seed, step) decides which."""

    def __init__(self, new: Sequence[Rated], history: Sequence[Rated], *, rows: int, share: float = 0.1, seed: int = 0):
        if not new:
            raise DataError(
                "no group held both a right and a wrong sample, so there is nothing to compare: raise the number of "
                "questions, or take a task that is neither solved nor hopeless"
            )
        self.new, self.history, self.rows, self.seed = new, history, rows, seed
        self.old = round(share * rows) if history else 0

    def at(self, step: int) -> list[AnswerBatch]:
        return [compared([*self.drawn(self.history, self.old, "old", step), *self.fresh(step)])]

    def fresh(self, step: int) -> list[Rated]:
        return self.drawn(self.new, self.rows - self.old, "new", step)

    def drawn(self, some: Sequence[Rated], number: int, name: str, step: int) -> list[Rated]:
        return chance(name, self.seed, step).choices(some, k=number) if number else []

    def bookmark(self) -> dict[str, Any]:
        data = Pairs([*self.new, *self.history]).hash
        return {"feed": "replay", "data": data, "rows": self.rows, "old": self.old, "seed": self.seed}

    def resume(self, bookmark: dict[str, Any]) -> None:
        if bookmark != self.bookmark():
            raise ValueError("the bookmark belongs to other comparisons")
