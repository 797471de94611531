"""Computes advantages from groups of samples: rewards, their shaping, which groups are kept, and the estimators.

rewards (P,G) are of P prompts with G samples each. NaN marks a sample that could not be scored: it is in no statistic,
and its advantage is 0. A group whose rewards lie within `MIN_REWARD_SPREAD` of each other gets advantages of exactly 0.

Commonly got wrong: a tiny eps under the standard deviation as the only guard, which blows rounding up to a full-sized
advantage; NaN counted as 0, which makes "could not be judged" the worst (or with rewards of -1 the best) of its group.

Whether a group is kept follows from the *first* reward that applies to it, the raw correctness, before any shaping:
with a reward for length or format a group that is all wrong looks mixed, and its gradient is noise (DAPO's filter; an
error of NeMo-RL, #2431).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.contracts import Reward
from llm_quest.errors import DataError, UsageError
from llm_quest.rollouts.sampler import Sample, SampleGroups

MIN_REWARD_SPREAD = 1e-4
ADVANTAGE_EPS = 1e-4

AdvantageEstimator = Callable[[Float[Tensor, "P G"]], Float[Tensor, "P G"]]


def reward_spread(rewards: Float[Tensor, "P G"]) -> Float[Tensor, " P"]:
    """Largest less smallest reward of each group; 0 where fewer than two could be scored."""
    known = ~rewards.isnan()
    top = rewards.masked_fill(~known, -torch.inf).amax(dim=1)
    bottom = rewards.masked_fill(~known, torch.inf).amin(dim=1)
    return torch.where(known.sum(dim=1) > 1, top - bottom, 0.0)


def zero_uninformative(rewards: Float[Tensor, "P G"], advantages: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """The advantages, 0 for what could not be scored and for groups without spread."""
    return torch.where((reward_spread(rewards) > MIN_REWARD_SPREAD)[:, None] & ~rewards.isnan(), advantages, 0.0)


def mean_centered_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """r - mean (Dr. GRPO, arXiv:2503.20783). Its expectation is (G-1)/G of the policy gradient."""
    return zero_uninformative(rewards, rewards - rewards.nanmean(dim=1, keepdim=True))


def leave_one_out_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """r less the mean of the *others* (Kool et al. 2019; arXiv:2402.14740): exactly the policy gradient in
    expectation."""
    n = (~rewards.isnan()).sum(dim=1, keepdim=True)
    return mean_centered_advantages(rewards) * n / (n - 1).clamp(min=1)


def group_std_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """(r - mean) / (std + eps) within each group (GRPO, arXiv:2402.03300): prompts weigh about 1 / sqrt(p (1 - p)).
    The paper leaves the divisor of the variance open; here it is n - 1, as in TRL, verl and OpenRLHF
    (`process_supervision_advantages` divides by n)."""
    return mean_centered_advantages(rewards) / (nan_std(rewards, dim=1) + ADVANTAGE_EPS)


def batch_std_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """(r - the group's mean) / (std of the whole batch's rewards + eps): every prompt weighs the same."""
    return mean_centered_advantages(rewards) / (nan_std(rewards.reshape(1, -1), dim=1) + ADVANTAGE_EPS)


def maxrl_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """(r - mean) / mean, for rewards of 0 and 1 (MaxRL): hard prompts weigh more, as in the gradient of the logarithm
    of the pass rate."""
    mean = rewards.nanmean(dim=1, keepdim=True)
    return torch.where(mean > 0, mean_centered_advantages(rewards) / mean.clamp(min=1e-12), 0.0)


def nan_std(rewards: Tensor, dim: int) -> Tensor:
    """Standard deviation with n - 1, in two passes (E[x^2] - E[x]^2 loses every digit of near-equal rewards)."""
    n = (~rewards.isnan()).sum(dim=dim, keepdim=True)
    squares = (rewards - rewards.nanmean(dim=dim, keepdim=True)).square()
    return (squares.nansum(dim=dim, keepdim=True) / (n - 1).clamp(min=1)).sqrt()


def gdpo_advantages(
    rewards: Float[Tensor, "R P G"], weights: Sequence[float], estimator: AdvantageEstimator
) -> Float[Tensor, "P G"]:
    """GDPO (arXiv:2601.05242): advantages of each reward by itself, so that a reward of small scale counts too; their
    weighted sum; and its normalization over the whole batch, (A - mean) / (std + eps), so that the size of a step does
    not grow with the number of rewards. A sample that one reward could not score is in no statistic and gets 0.
    Differs: so does a group in which every reward is without spread, where the paper's form gives -mean of the batch,
    which is rounding."""
    parts = torch.stack([weight * estimator(reward) for weight, reward in zip(weights, rewards, strict=True)])
    unknown = rewards.isnan().any(dim=0)
    summed = parts.sum(dim=0).masked_fill(unknown, torch.nan)
    normalized = (summed - summed.nanmean()) / (nan_std(summed.reshape(1, -1), dim=1) + ADVANTAGE_EPS)
    silent = unknown | ~parts.any(dim=2).any(dim=0)[:, None]
    return normalized.masked_fill(silent, 0.0)


def process_supervision_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], lengths: Sequence[int], *, ddof: int = 0
) -> list[Float[Tensor, " T"]]:
    """Process supervision (arXiv:2402.03300, section 4.1.3): per token, the sum of the normalized rewards of this step
    and the later ones. steps: of each output of one question, (index of the step's last token, its reward); NaN stays
    out. Tokens after the last step get 0, so let the last step end at the end-of-text token.

        o_1, steps end at tokens 2, 5, 8, normalized -.5 .5 1.5     A_1 = 1.5 1.5 1.5 | 2 2 2 | 1.5 1.5 1.5 | 0

    ddof: the variance is divided by n - ddof; n by default, which the example above needs, while `group_std_advantages`
    divides by n - 1. Sums of centered rewards depend on how many steps there are: watch the number of steps per
    answer."""
    pooled = torch.tensor([r for output in steps for _, r in output if r == r], dtype=torch.float64)
    flat = pooled.numel() <= ddof or pooled.max() - pooled.min() <= MIN_REWARD_SPREAD
    mean, std = (0.0, 1.0) if flat else (float(pooled.mean()), float(pooled.std(correction=ddof)))
    advantages = []
    for output, length in zip(steps, lengths, strict=True):
        at = torch.zeros(length, dtype=torch.float64)
        for index, reward in () if flat else output:
            at[index] += 0.0 if reward != reward else (reward - mean) / std
        advantages.append(at.flip(0).cumsum(0).flip(0))
    return advantages


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "std": group_std_advantages,
    "mean": mean_centered_advantages,
    "leave_one_out": leave_one_out_advantages,
    "batch_std": batch_std_advantages,
    "maxrl": maxrl_advantages,
}


SampleGroup = Sequence[Sample]


StepRewards = Callable[[Sample], Sequence[tuple[int, float]]]
"""A sample -> (index of the step's last token, its reward) for each of its steps."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward function, its name in the metrics, and its weight. per_batch: it is called once for all groups of a
    batch (a user's function, a judge behind a network) and not once a group."""

    name: str
    reward_fn: Reward
    weight: float = 1.0
    per_batch: bool = False


@dataclass(frozen=True, kw_only=True)
class RewardPipeline:
    """Computes rewards and advantages of groups. rewards: the first one that applies to a group decides what is right
    there. A reward that is NaN for a sample (it does not apply, or it failed) is replaced by the mean of its group, so
    that it neither raises nor lowers that sample; a sample whose rewards are all NaN is left out. Differs: TRL adds 0
    there, which ranks the sample below those that were scored (with rewards of -1, above them).

    estimator: rewards (P,G) -> advantages. per_reward_advantages: advantages of each reward by itself, then added and
    normalized over the batch (GDPO). overlong_window, max_new_tokens: within the last `overlong_window` tokens of the
    budget a penalty grows to 1 (DAPO's soft punishment); 0: none. filter_truncated: samples that the budget cut are
    left out. step_rewards: process supervision in place of the outcome. keep_uniform_groups: groups without spread
    count in the loss's divisor, and a KL term acts on them, as in GRPO, Dr. GRPO and TRL; off: they leave the batch,
    and the larger their share, the larger is the step."""

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
            raise UsageError("no reward was given: name at least one; the first one decides what is right")
        if self.overlong_window and not 0 < self.overlong_window < self.max_new_tokens:
            raise UsageError(
                f"overlong_window {self.overlong_window}: give fewer tokens than max_new_tokens, {self.max_new_tokens}"
            )
        if self.per_reward_advantages and len(self.rewards) < 2:
            raise UsageError("per_reward_advantages has no effect with one reward: leave it out")
        if self.step_rewards is not None and (self.per_reward_advantages or self.overlong_window):
            raise UsageError(
                "per_reward_advantages and overlong_window have no effect with step_rewards, which take the place of "
                "the outcome's reward: leave them out"
            )

    def compute_rewards(self, groups: Sequence[SampleGroup]) -> Float[Tensor, "R P G"]:
        """Every reward of every sample; NaN: unscorable."""
        scores = np.array([score_groups(judge, groups) for judge in self.rewards], np.float64)
        rewards = torch.from_numpy(scores.reshape(len(self.rewards), len(groups), -1))
        if groups:
            failed = torch.tensor([[sample.environment_failed for sample in group] for group in groups])
            rewards = rewards.masked_fill(failed, torch.nan)
        if self.filter_truncated and groups:
            cut = torch.tensor([[sample.truncated for sample in group] for group in groups])
            rewards = rewards.masked_fill(cut, torch.nan)
        return rewards

    def is_mixed(self, rewards: Float[Tensor, "R P G"]) -> list[bool]:
        """Whether each group has samples of different rewards, by the first reward that applies to the group."""
        deciding = rewards[0]
        for later in rewards[1:]:
            deciding = torch.where(deciding.isnan().all(dim=1, keepdim=True), later, deciding)
        mixed: list[bool] = (reward_spread(deciding) > MIN_REWARD_SPREAD).tolist()
        return mixed

    def compute_advantages(
        self,
        groups: Sequence[SampleGroup],
        rewards: Float[Tensor, "R P G"],
        penalty: Float[Tensor, "P G"] | None = None,
    ) -> list[list[np.ndarray | None]]:
        """Advantages per sample and token; None for a sample that is left out. penalty: subtracted from the rewards
        (KL)."""
        weights = [judge.weight for judge in self.rewards]
        known = fill_missing_rewards(rewards, weights)
        unscored = known.isnan().any(dim=0)
        if self.step_rewards is not None:
            advantages = [self.step_advantages(group, self.step_rewards) for group in groups]
        else:
            if self.per_reward_advantages:
                values = gdpo_advantages(self.shape_rewards(groups, known, penalty), weights, self.estimator)
            else:
                summed = torch.einsum("rpg,r->pg", known, torch.tensor(weights, dtype=known.dtype))
                values = self.estimator(self.shape_rewards(groups, summed[None], penalty)[0])
            advantages = [
                [np.full(len(s.completion_ids), float(value), np.float32) for s, value in zip(group, row, strict=True)]
                for group, row in zip(groups, values, strict=True)
            ]
        return [
            [
                None if unscored[p, g] or not (self.keep_uniform_groups or any(map(np.any, row))) else each
                for g, each in enumerate(row)
            ]
            for p, row in enumerate(advantages)
        ]

    def step_advantages(self, group: SampleGroup, step_rewards: StepRewards) -> list[np.ndarray]:
        advantages = process_supervision_advantages(
            [step_rewards(sample) for sample in group], [len(sample.completion_ids) for sample in group]
        )
        return [each.numpy().astype(np.float32) for each in advantages]

    def shape_rewards(self, groups: Sequence[SampleGroup], rewards: Tensor, penalty: Tensor | None) -> Tensor:
        """Rewards (R,P,G), with the penalties for length and divergence added to the first one."""
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


def fill_missing_rewards(rewards: Float[Tensor, "R P G"], weights: Sequence[float]) -> Float[Tensor, "R P G"]:
    """Replace a reward that is NaN by the mean of its group (0 where the whole group is NaN), which adds nothing to a
    centered advantage. A sample that no reward with a weight could score stays NaN."""
    known = ~rewards.isnan()
    means = torch.where(known, rewards, 0.0).sum(dim=2, keepdim=True) / known.sum(dim=2, keepdim=True).clamp(min=1)
    counted = torch.tensor([weight != 0 for weight in weights])
    scored = known[counted].any(dim=0) if counted.any() else known.any(dim=0)
    return torch.where(known, rewards, means).masked_fill(~scored, torch.nan)


def total_rewards(rewards: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of each sample's rewards (R,P,G) or (R,P), those that apply; NaN where none does whose weight is
    not 0."""
    counted = torch.tensor([weight != 0 or not any(weights) for weight in weights])
    summed = torch.einsum("r...,r->...", rewards.nan_to_num(0.0), rewards.new_tensor(weights))
    return summed.masked_fill(rewards[counted].isnan().all(dim=0), math.nan)


def score_groups(weighted_reward: WeightedReward, groups: Sequence[SampleGroup]) -> list[list[float]]:
    """Call one reward function on all groups: once for each, or once for all of them."""
    if not weighted_reward.per_batch:
        return [score_group(weighted_reward, group) for group in groups]
    values = iter(score_group(weighted_reward, [sample for group in groups for sample in group]))
    return [[next(values) for _ in group] for group in groups]


def score_group(weighted_reward: WeightedReward, group: SampleGroup) -> list[float]:
    """Call one reward function on one group. DataError unless it returns one finite number (or NaN) for each sample."""
    scores = [float(value) for value in weighted_reward.reward_fn(group)]
    if len(scores) != len(group):
        raise DataError(
            f"the reward {weighted_reward.name} gave {len(scores)} numbers for a group of {len(group)} samples"
        )
    if any(value in (float("inf"), float("-inf")) for value in scores):
        raise DataError(
            f"the reward {weighted_reward.name} gave an infinite number; give NaN for what cannot be scored"
        )
    return scores


def overlong_penalty(length: int, max_new_tokens: int, window: int) -> float:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): 0 up to budget - window, then falling to -1 at the budget."""
    return -min(1.0, max(0.0, (length - (max_new_tokens - window)) / window))


def sampling_metrics(
    groups: SampleGroups, rewards: Tensor, reward_pipeline: RewardPipeline
) -> dict[str, tuple[float, float]]:
    """Metrics of the samples, as (sum, count) pairs. `reward` is the weighted sum of the rewards, as it is of held-out
    answers; each of several rewards is reported by its name too. `reward_std` is within groups, as TRL has it."""
    samples = [sample for group in groups for sample in group]
    lengths = [sample.num_policy_tokens for sample in samples]
    ended = [length for sample, length in zip(samples, lengths, strict=True) if not sample.truncated]
    known, total = ~rewards.isnan(), total_rewards(rewards, [reward.weight for reward in reward_pipeline.rewards])
    mixed = reward_pipeline.is_mixed(rewards) if rewards.shape[2] > 1 else []
    scored = [group[~group.isnan()] for group in total]
    deviations = [float(group.std()) for group in scored if len(group) > 1]
    sums: dict[str, tuple[Any, Any]] = {"reward": (total.nansum(), (~total.isnan()).sum())}
    if len(reward_pipeline.rewards) > 1:
        each = {reward.name: (rewards[r].nansum(), known[r].sum()) for r, reward in enumerate(reward_pipeline.rewards)}
        sums |= {f"rewards/{name}": pair for name, pair in each.items()}
    sums |= {
        "frac_reward_zero_std": (sum(not one for one in mixed), len(mixed)),
        "completions/clipped_ratio": (sum(sample.truncated for sample in samples), len(samples)),
        "rewards/unscorable": ((~known).all(dim=0).sum(), len(samples)),
        "completions/mean_length": (sum(lengths), len(samples)),
        "entropy": (-sum(sum(sample.logprobs) for sample in samples), sum(lengths)),
        "completions/mean_terminated_length": (sum(ended), len(ended)),
    }
    if rewards.shape[2] > 1:
        sums["reward_std"] = (sum(deviations), len(deviations))
    if any(sample.is_policy_token is not None for sample in samples):
        sums["completions/mean_turns"] = (sum(sample.num_turns for sample in samples), len(samples))
    return {name: (float(total), float(count)) for name, (total, count) in sums.items()}
