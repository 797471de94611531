"""From groups of samples to advantages: rewards, which groups are kept, reward shaping, advantage estimation.

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
from llm_quest.errors import DataError, UsageError
from llm_quest.rollouts.advantages import (
    ADVANTAGE_ESTIMATORS,
    MIN_REWARD_SPREAD,
    AdvantageEstimator,
    gdpo_advantages,
    process_supervision_advantages,
    reward_spread,
)
from llm_quest.rollouts.sampler import Sample

SampleGroup = Sequence[Sample]
StepRewards = Callable[[Sample], Sequence[tuple[int, float]]]
"""A sample -> (index of the step's last token, its reward) for each step it took."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward function, its name in the metrics, and its weight."""

    name: str
    reward_fn: Reward
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RewardPipeline:
    """rewards: the first one says what is right. estimator: how rewards become advantages. per_reward_advantages: each
    reward is made an advantage by itself, then they are added and normalised over the batch (GDPO). overlong_window,
    max_new_tokens: the last `overlong` tokens of the budget are penalised more and more (DAPO's soft punishment); 0:
    not. filter_truncated: what the budget cut is not learned from. step_rewards: process supervision in place of the
    outcome. keep_uniform_groups: groups without spread count in the loss's divisor, and a KL term acts on them, as in
    GRPO, Dr. GRPO and TRL; off: they leave the batch, and a step is the larger, the more of the groups are flat."""

    rewards: tuple[WeightedReward, ...]
    estimator: AdvantageEstimator = ADVANTAGE_ESTIMATORS["std"]
    per_reward_advantages: bool = False
    max_new_tokens: int = 0
    overlong_window: int = 0
    filter_truncated: bool = False
    step_rewards: StepRewards | None = None
    keep_uniform_groups: bool = True

    def __post_init__(self) -> None:
        if not self.rewards:
            raise UsageError("no reward was given: name at least one, the first says what is right")
        if self.overlong_window and not 0 < self.overlong_window < self.max_new_tokens:
            raise UsageError(
                f"overlong is {self.overlong_window}: give fewer tokens than the budget of {self.max_new_tokens}"
            )
        if self.per_reward_advantages and len(self.rewards) < 2:
            raise UsageError("separately has no effect with one reward; leave it out")
        if self.step_rewards is not None and (self.per_reward_advantages or self.overlong_window):
            raise UsageError(
                "separately and overlong have no effect under process supervision: the steps' rewards take the place "
                "of the outcome's; leave them out"
            )

    def compute_rewards(self, groups: Sequence[SampleGroup]) -> Float[Tensor, "R P G"]:
        """Every reward of every sample; NaN: unscorable."""
        found = np.array([[score_group(judge, group) for group in groups] for judge in self.rewards], np.float64)
        rewards = torch.from_numpy(found.reshape(len(self.rewards), len(groups), -1))
        if self.filter_truncated and groups:
            cut = torch.tensor([[sample.truncated for sample in group] for group in groups])
            rewards = rewards.masked_fill(cut, torch.nan)
        return rewards

    def is_mixed(self, rewards: Float[Tensor, "R P G"]) -> list[bool]:
        """Which groups hold both better and worse, by the first reward."""
        found: list[bool] = (reward_spread(rewards[0]) > MIN_REWARD_SPREAD).tolist()
        return found

    def compute_advantages(
        self,
        groups: Sequence[SampleGroup],
        rewards: Float[Tensor, "R P G"],
        penalty: Float[Tensor, "P G"] | None = None,
    ) -> list[list[np.ndarray | None]]:
        """Per sample and token; None where a sample is not to be learned from. penalty: taken off the rewards (KL)."""
        if self.step_rewards is not None:
            found = [self.step_advantages(group, self.step_rewards) for group in groups]
        else:
            weights = [judge.weight for judge in self.rewards]
            if self.per_reward_advantages:
                values = gdpo_advantages(self.shape_rewards(groups, rewards, penalty), weights, self.estimator)
            else:
                summed = torch.einsum("rpg,r->pg", rewards, torch.tensor(weights, dtype=rewards.dtype))
                values = self.estimator(self.shape_rewards(groups, summed[None], penalty)[0])
            found = [
                [np.full(len(s.completion_ids), float(value), np.float32) for s, value in zip(group, row, strict=True)]
                for group, row in zip(groups, values, strict=True)
            ]
        return [
            [
                None
                if rewards[:, p, g].isnan().any() or not (self.keep_uniform_groups or any(map(np.any, row)))
                else each
                for g, each in enumerate(row)
            ]
            for p, row in enumerate(found)
        ]

    def step_advantages(self, group: SampleGroup, step_rewards: StepRewards) -> list[np.ndarray]:
        found = process_supervision_advantages(
            [step_rewards(sample) for sample in group], [len(sample.completion_ids) for sample in group]
        )
        return [each.numpy().astype(np.float32) for each in found]

    def shape_rewards(self, groups: Sequence[SampleGroup], rewards: Tensor, penalty: Tensor | None) -> Tensor:
        """Rewards (R,P,G); the first one with what length and divergence cost."""
        first = rewards[0].clone()
        if self.overlong_window:
            lengths = [
                [overlong_penalty(len(s.completion_ids), self.max_new_tokens, self.overlong_window) for s in group]
                for group in groups
            ]
            first += torch.tensor(lengths, dtype=first.dtype).reshape(first.shape)
        if penalty is not None:
            first -= penalty
        return torch.cat([first[None], rewards[1:]])


def score_group(weighted_reward: WeightedReward, group: SampleGroup) -> list[float]:
    """One reward function on one group. DataError where it does not return one finite number (or NaN) a sample."""
    found = [float(value) for value in weighted_reward.reward_fn(group)]
    if len(found) != len(group):
        raise DataError(
            f"the reward {weighted_reward.name} gave {len(found)} numbers for a group of {len(group)} samples"
        )
    if any(value in (float("inf"), float("-inf")) for value in found):
        raise DataError(
            f"the reward {weighted_reward.name} gave an infinite number; give NaN for what cannot be scored"
        )
    return found


def overlong_penalty(length: int, max_new_tokens: int, window: int) -> float:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): 0 up to budget - window, then falling to -1 at the budget."""
    return -min(1.0, max(0.0, (length - (max_new_tokens - window)) / window))
