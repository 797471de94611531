"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eqs. 11, 12, 16), as PPO uses it on texts.

      r_t = -kl_coef (log pi - log pi_ref)_t + [t is the last token] R        V_t: the value before token t is written
      delta_t = r_t + gamma V_{t+1} - V_t                                     after the last token V is 0
      A_t = delta_t + gamma lam A_{t+1}                                       the value learns A_t + V_t

      rewards 0 0 1, values 0.5 0.2 0.4, gamma 1, lam 0.5        delta  -0.3  0.2  0.6
                                                                 A      -0.05 0.5  0.6      returns 0.45 0.7 1.0

Commonly got wrong: (1) V_{t+1} read at padding behind the end of the text, where it is not 0; (2) the reward put at the
last column of a padded batch; (3) the value read after token t was written, which has seen it; (4) whitened advantages
in the returns: the value then learns numbers without a unit; (5) advantages whitened per micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from llm_quest.data.policy_batch import PolicyRow
from llm_quest.rollouts.advantages import AdvantageEstimator

WHITEN_EPS = 1e-8


def uncentered_rewards(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """The rewards as they are, 0 for what could not be scored: the baseline is a value of each token."""
    return rewards.nan_to_num(nan=0.0)


VALUE_ESTIMATORS: dict[str, AdvantageEstimator] = {"gae": uncentered_rewards}
"""Estimators that take a value head in place of a comparison within the group."""


@dataclass(frozen=True)
class GAE:
    """Generalized advantage estimation. gamma: discount of later rewards. lam: 0 trusts the value of the next token, 1
    the rewards alone. whiten: the advantages of a rollout have mean 0 and standard deviation 1. whiten_rewards: the
    rewards of tokens have standard deviation 1, and keep their mean."""

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    whiten_rewards: bool = False

    def advantages(self, rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
        """A (T,) of one text from the rewards and values of its tokens."""
        advantages, later, next_value = np.zeros_like(values), 0.0, 0.0
        for t in reversed(range(len(values))):
            delta = rewards[t] + self.gamma * next_value - values[t]
            advantages[t] = later = delta + self.gamma * self.lam * later
            next_value = values[t]
        return advantages

    def rows_with_values(
        self, rows: Sequence[PolicyRow], values: Sequence[np.ndarray], token_penalties: Sequence[np.ndarray] | None
    ) -> list[PolicyRow]:
        """The rows of a rollout with values, returns and advantages. rows: their advantages are the rewards of their
        texts. token_penalties: taken off the reward of each token. An environment's tokens are no steps: the value of
        the policy's next token follows that of its last one before them."""
        rewards = [final_reward(row) for row in rows]
        if token_penalties is not None:
            rewards = [
                reward - row.at_policy_tokens(penalty)
                for row, reward, penalty in zip(rows, rewards, token_penalties, strict=True)
            ]
        if self.whiten_rewards:
            rewards = whiten_together(rewards, shift_mean=False)
        values = [row.at_policy_tokens(each).astype(np.float64) for row, each in zip(rows, values, strict=True)]
        advantages = [self.advantages(reward, value) for reward, value in zip(rewards, values, strict=True)]
        returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
        advantages = whiten_together(advantages) if self.whiten else advantages
        columns = zip(rows, advantages, returns, values, strict=True)
        spread = ((row, [row.spread_over_completion(x.astype(np.float32)) for x in agv]) for row, *agv in columns)
        return [replace(row, advantages=a, returns=g, values=v) for row, (a, g, v) in spread]


def final_reward(row: PolicyRow) -> np.ndarray:
    """The text's reward at its last token, 0 before; of the policy's tokens."""
    rewards = np.zeros(row.num_policy_tokens, np.float64)
    if len(rewards):
        rewards[-1] = row.advantages[-1]
    return rewards


def whiten_together(arrays: Sequence[np.ndarray], *, shift_mean: bool = True) -> list[np.ndarray]:
    """The numbers of all arrays, divided by their common standard deviation (n - 1), around 0 or their mean."""
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    if len(flat) < 2:
        return list(arrays)
    mean, scale = flat.mean(), 1 / np.sqrt(flat.var(ddof=1) + WHITEN_EPS)
    offset = 0.0 if shift_mean else mean
    return [(each - mean) * scale + offset for each in arrays]
