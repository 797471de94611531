"""From groups of samples to rows worth learning from: rewards, which groups are kept, shaping, advantages.

Which groups are kept is judged on the *first* reward alone, the raw correctness, before anything shapes it: length or
format noise makes a group that is all wrong look mixed, and its gradient is noise (DAPO's filter, got wrong in NeMo-RL
#2431). What could not be scored (NaN) is in no statistic and in no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.contracts import Reward
from llm_quest.data.policy_batch import PolicyRow
from llm_quest.errors import DataError, UsageError
from llm_quest.rollouts.advantages import ESTIMATORS, SPREAD, Estimator, apart, process, spread
from llm_quest.rollouts.sample import Sample

Group = Sequence[Sample]
Steps = Callable[[Sample], Sequence[tuple[int, float]]]
"""A sample -> (index of the step's last token, its reward) for each step it took."""


@dataclass(frozen=True)
class Judge:
    """A reward, what it is called in the metrics, and its weight."""

    name: str
    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """judges: the first one says what is right. estimator: how rewards become advantages. separately: each reward is
    made an advantage by itself, then they are added and normalised over the batch (GDPO). overlong, budget: the last
    `overlong` tokens of the budget are penalised more and more (DAPO's soft punishment); 0: not. filter_truncated: what
    the budget cut is not learned from. steps: process supervision in place of the outcome. keep_flat: groups without
    spread count in the loss's divisor, and a KL term acts on them, as in GRPO, Dr. GRPO and TRL; off: they leave the
    batch, and a step is the larger, the more of the groups are flat."""

    judges: tuple[Judge, ...]
    estimator: Estimator = ESTIMATORS["std"]
    separately: bool = False
    budget: int = 0
    overlong: int = 0
    filter_truncated: bool = False
    steps: Steps | None = None
    keep_flat: bool = True

    def __post_init__(self) -> None:
        if not self.judges:
            raise UsageError("no reward was given: name at least one, the first says what is right")
        if self.overlong and not 0 < self.overlong < self.budget:
            raise UsageError(f"overlong is {self.overlong}: give fewer tokens than the budget of {self.budget}")
        if self.separately and len(self.judges) < 2:
            raise UsageError("separately has no effect with one reward; leave it out")
        if self.steps is not None and (self.separately or self.overlong):
            raise UsageError(
                "separately and overlong have no effect under process supervision: the steps' rewards take the place "
                "of the outcome's; leave them out"
            )

    def judged(self, groups: Sequence[Group]) -> Float[Tensor, "R P G"]:
        """Every judge's word on every sample; NaN: unscorable."""
        found = np.array([[column(judge, group) for group in groups] for judge in self.judges], np.float64)
        rewards = torch.from_numpy(found.reshape(len(self.judges), len(groups), -1))
        if self.filter_truncated and groups:
            cut = torch.tensor([[sample.truncated for sample in group] for group in groups])
            rewards = rewards.masked_fill(cut, torch.nan)
        return rewards

    def mixed(self, rewards: Float[Tensor, "R P G"]) -> list[bool]:
        """Which groups hold both better and worse, by the first reward."""
        found: list[bool] = (spread(rewards[0]) > SPREAD).tolist()
        return found

    def advantages(
        self, groups: Sequence[Group], rewards: Float[Tensor, "R P G"], penalty: Float[Tensor, "P G"] | None = None
    ) -> list[list[np.ndarray | None]]:
        """Per sample and token; None where a sample is not to be learned from. penalty: taken off the rewards (KL)."""
        if self.steps is not None:
            found = [self.by_steps(group, self.steps) for group in groups]
        else:
            weights = [judge.weight for judge in self.judges]
            if self.separately:
                values = apart(self.shaped(groups, rewards, penalty), weights, self.estimator)
            else:
                summed = torch.einsum("rpg,r->pg", rewards, torch.tensor(weights, dtype=rewards.dtype))
                values = self.estimator(self.shaped(groups, summed[None], penalty)[0])
            found = [
                [np.full(len(s.tokens), float(value), np.float32) for s, value in zip(group, row, strict=True)]
                for group, row in zip(groups, values, strict=True)
            ]
        return [
            [
                None if rewards[:, p, g].isnan().any() or not (self.keep_flat or any(map(np.any, row))) else each
                for g, each in enumerate(row)
            ]
            for p, row in enumerate(found)
        ]

    def by_steps(self, group: Group, steps: Steps) -> list[np.ndarray]:
        found = process([steps(sample) for sample in group], [len(sample.tokens) for sample in group])
        return [each.numpy().astype(np.float32) for each in found]

    def shaped(self, groups: Sequence[Group], rewards: Tensor, penalty: Tensor | None) -> Tensor:
        """Rewards (R,P,G); the first one with what length and divergence cost."""
        first = rewards[0].clone()
        if self.overlong:
            lengths = [[overlong(len(s.tokens), self.budget, self.overlong) for s in group] for group in groups]
            first += torch.tensor(lengths, dtype=first.dtype).reshape(first.shape)
        if penalty is not None:
            first -= penalty
        return torch.cat([first[None], rewards[1:]])


def column(judge: Judge, group: Group) -> list[float]:
    """One judge on one group; whoever returns something else than one number each is named."""
    found = [float(value) for value in judge.reward(group)]
    if len(found) != len(group):
        raise DataError(f"the reward {judge.name} gave {len(found)} numbers for a group of {len(group)} samples")
    if any(value in (float("inf"), float("-inf")) for value in found):
        raise DataError(f"the reward {judge.name} gave an infinite number; give NaN for what cannot be scored")
    return found


def overlong(length: int, budget: int, window: int) -> float:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): 0 up to budget - window, then falling to -1 at the budget."""
    return -min(1.0, max(0.0, (length - (budget - window)) / window))


def row_of(sample: Sample, advantages: np.ndarray) -> PolicyRow:
    return PolicyRow(sample.prompt, sample.tokens, advantages, np.array(sample.logprobs, np.float32))
