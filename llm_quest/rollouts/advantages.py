"""From rewards to advantages: how much better than its siblings a sample was.

rewards (P,G) are of P prompts with G samples each; NaN is unscorable, stays out of every statistic and gets 0. A group
whose rewards lie within `MIN_REWARD_SPREAD` of each other holds no news, and gets exactly 0.

Commonly got wrong: a tiny eps under the standard deviation as the only guard, which blows rounding up to a full-sized
advantage; NaN counted as 0, which makes "could not be judged" the worst (or with rewards of -1 the best) of its group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

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
    """(r - mean) / mean, for rewards of 0 and 1 (MaxRL): hard prompts weigh more, as under the logarithm of the pass
    rate."""
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
    """GDPO (arXiv:2601.05242): several rewards, each made an advantage by itself, so that a reward of small scale is
    not drowned; their weighted sum; and its normalisation over the whole batch, (A - mean) / (std + eps), so that the
    size of a step does not grow with the number of rewards. A sample that one reward could not score is in no statistic
    and gets 0. Differs: so does a group in which every reward is without spread, where the paper's form gives -mean of
    the batch, which is rounding."""
    parts = torch.stack([weight * estimator(reward) for weight, reward in zip(weights, rewards, strict=True)])
    unknown = rewards.isnan().any(dim=0)
    summed = parts.sum(dim=0).masked_fill(unknown, torch.nan)
    normalised = (summed - summed.nanmean()) / (nan_std(summed.reshape(1, -1), dim=1) + ADVANTAGE_EPS)
    silent = unknown | ~parts.any(dim=2).any(dim=0)[:, None]
    return normalised.masked_fill(silent, 0.0)


def process_supervision_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], lengths: Sequence[int], *, ddof: int = 0
) -> list[Float[Tensor, " T"]]:
    """Process supervision (arXiv:2402.03300, section 4.1.3): per token, the sum of the normalised rewards of this step
    and the later ones. steps: of each output of one question, (index of the step's last token, its reward); NaN stays
    out. Tokens after the last step get 0, so let the last step end at the end-of-text token.

        o_1, steps end at tokens 2, 5, 8, normalised -.5 .5 1.5     A_1 = 1.5 1.5 1.5 | 2 2 2 | 1.5 1.5 1.5 | 0

    ddof: the variance is divided by n - ddof; n by default, which the example above needs, while `group_std_advantages`
    divides by n - 1. Sums of centred rewards depend on how many steps there are: watch the number of steps per
    answer."""
    pooled = torch.tensor([r for output in steps for _, r in output if r == r], dtype=torch.float64)
    flat = pooled.numel() <= ddof or pooled.max() - pooled.min() <= MIN_REWARD_SPREAD
    mean, std = (0.0, 1.0) if flat else (float(pooled.mean()), float(pooled.std(correction=ddof)))
    found = []
    for output, length in zip(steps, lengths, strict=True):
        at = torch.zeros(length, dtype=torch.float64)
        for index, reward in () if flat else output:
            at[index] += 0.0 if reward != reward else (reward - mean) / std
        found.append(at.flip(0).cumsum(0).flip(0))
    return found


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "std": group_std_advantages,
    "mean": mean_centered_advantages,
    "leave_one_out": leave_one_out_advantages,
    "batch_std": batch_std_advantages,
    "maxrl": maxrl_advantages,
}
