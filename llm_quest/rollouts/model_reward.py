"""Scores completions with a reward model, and makes the comparisons that it is trained on while the policy changes.

Commonly got wrong: the reward model labels its own training data, from which it learns nothing new; it is trained on
the newest samples alone and forgets the earlier ones (DeepSeekMath, arXiv:2402.03300, section 4.1.4, replays 10 %)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from llm_quest.contracts import Reward
from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset, collate_preferences
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.problems.problem import make_rng
from llm_quest.errors import DataError
from llm_quest.rollouts.sampler import Sample

RewardModelScorer = Callable[[Sequence[Sequence[int]]], Tensor]


@dataclass(frozen=True)
class ModelReward:
    """Scores completions with a reward model. scorer: rows of ids (prompt and completion) -> numbers.
    The ids are those that were sampled: both models read the same tokenizer's."""

    scorer: RewardModelScorer

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        return [float(value) for value in self.scorer([sample.prompt_ids + sample.completion_ids for sample in group])]


def make_comparisons(
    groups: Sequence[Sequence[Sample]], gold_reward_fn: Reward, seed: int = 0
) -> list[TokenizedPreference]:
    """A comparison from each group whose samples differ: one of its best and one of its worst, by the gold reward."""
    comparisons = []
    for number, group in enumerate(groups):
        scored = [
            (value, sample) for value, sample in zip(gold_reward_fn(group), group, strict=True) if not math.isnan(value)
        ]
        top, bottom = max((v for v, _ in scored), default=0.0), min((v for v, _ in scored), default=0.0)
        if top > bottom:
            pick = make_rng("comparison", seed, number)
            better, worse = (pick.choice([s for v, s in scored if v == end]) for end in (top, bottom))
            ids = [np.array(one, np.int64) for one in (better.prompt_ids, better.completion_ids, worse.completion_ids)]
            comparisons.append(TokenizedPreference(ids[0], (ids[1], ids[2])))
    return comparisons


class ReplayLoader:
    """Comparisons for a reward model that is trained on: each batch of `rows` holds round(share x rows) from the
    history (of earlier iterations, never this one's) and the rest new. (seed, step) decides which."""

    def __init__(
        self,
        new: Sequence[TokenizedPreference],
        history: Sequence[TokenizedPreference],
        *,
        batch_size: int,
        replay_fraction: float = 0.1,
        seed: int = 0,
    ):
        if not new:
            raise DataError(
                "no group held both a right and a wrong sample, so there is nothing to compare: raise the number of "
                "questions, or take a task that is neither solved nor hopeless"
            )
        self.new, self.history, self.batch_size, self.seed = new, history, batch_size, seed
        self.num_replayed = round(replay_fraction * batch_size) if history else 0

    def batches(self, step: int) -> list[PreferenceBatch]:
        return [
            collate_preferences(
                [*self.sample_comparisons(self.history, self.num_replayed, "old", step), *self.new_comparisons(step)]
            )
        ]

    def new_comparisons(self, step: int) -> list[TokenizedPreference]:
        return self.sample_comparisons(self.new, self.batch_size - self.num_replayed, "new", step)

    def sample_comparisons(
        self, some: Sequence[TokenizedPreference], number: int, name: str, step: int
    ) -> list[TokenizedPreference]:
        return make_rng(name, self.seed, step).choices(some, k=number) if number else []

    def state_dict(self) -> dict[str, Any]:
        data = PreferenceDataset([*self.new, *self.history]).hash
        return {"feed": "replay", "data": data, "rows": self.batch_size, "old": self.num_replayed, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict != self.state_dict():
            raise ValueError("the loader's state belongs to other comparisons")
