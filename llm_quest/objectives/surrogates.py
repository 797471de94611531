"""Surrogate objectives of GRPO and its variants: the term to maximize at every token. The table is at the bottom.

      rho_t = pi(o_t) / pi_old(o_t)            token level
      s = exp(mean_t log rho_t)                sequence level (GSPO): a geometric mean, so that length does not matter

On-policy (rho = 1) all of them have the gradient A * grad log pi: on fresh batches the surrogates cannot be told apart
(the variants can, by their divisors and advantages). Commonly got wrong: max where min is due for A < 0, which leaves a
live gradient where clipping should have taken it; a sequence ratio as a *product*, which no clip range fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within this before they are exponentiated, as in verl."""


class SurrogateInputs(NamedTuple):
    """Inputs of a surrogate; 0 at tokens without loss. log_ratio: log_p less the old log-probability."""

    log_p: Float[Tensor, "B T"]
    log_ratio: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]


ImportanceRatio = Callable[[SurrogateInputs], Float[Tensor, "B T"]]
Surrogate = Callable[[SurrogateInputs], tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]]
"""Inputs -> the term to maximize, and where the ratio was clipped: clip, dual clip or delta removed the gradient
(CISPO: cap or floor bounds the weight)."""


def token_ratio(terms: SurrogateInputs) -> Tensor:
    return terms.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(terms: SurrogateInputs) -> Tensor:
    """s, at every token of the sequence (GSPO, arXiv:2507.18071, eq. 7)."""
    return (
        sequence_mean(terms.log_ratio, terms.loss_mask)
        .clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        .exp()
        .expand_as(terms.log_ratio)
    )


def sequence_token_ratio(terms: SurrogateInputs) -> Tensor:
    """sg[s] pi / sg[pi] (GSPO-token, eq. 14): the same value and gradient where the advantage is one per sequence, and
    right where it is not."""
    return sequence_ratio(terms).detach() * (terms.log_p - terms.log_p.detach()).exp()


def sequence_mean(values: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """Mean over the learned tokens of each row; 0 for a row without any."""
    return (values * loss_mask).sum(dim=1, keepdim=True) / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class ClippedSurrogate:
    """min(rho A, clip(rho, 1 - low, 1 + high) A) (PPO, arXiv:1707.06347). For A < 0 and a large rho that is unbounded.
    Two remedies: dual, the objective is at least dual * A (arXiv:1912.09729); delta, rho is held at delta in the
    unclipped term (INTELLECT-2). Both take the gradient away there."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual: float | None = None
    delta: float | None = None
    importance_ratio: ImportanceRatio = token_ratio

    def __call__(self, terms: SurrogateInputs) -> tuple[Tensor, Tensor]:
        rho, A = self.importance_ratio(terms), terms.advantages
        unclipped = rho if self.delta is None else rho.clamp(max=self.delta)
        clipped = rho.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        objective = torch.minimum(unclipped * A, clipped * A)
        clipped_away = (torch.where(unclipped * A <= clipped * A, unclipped, clipped) != rho) & (A != 0)
        if self.dual is not None:
            clipped_away = clipped_away | ((A < 0) & (objective < self.dual * A))
            objective = torch.where(A < 0, torch.maximum(objective, self.dual * A), objective)
        return objective, clipped_away


@dataclass(frozen=True)
class SAPOSurrogate:
    """SAPO (arXiv:2511.20347): f(rho) A with f(rho) = 4/tau sigmoid(tau (rho - 1)), whose slope is 1 at rho = 1 and
    fades on both sides, sooner where A <= 0. f(1) is 2/tau, so values are not to be compared with the others'."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __call__(self, terms: SurrogateInputs) -> tuple[Tensor, Tensor]:
        rho, A = token_ratio(terms), terms.advantages
        tau = torch.where(A > 0, self.tau_positive, self.tau_negative)
        return 4 / tau * torch.sigmoid(tau * (rho - 1)) * A, torch.zeros_like(terms.loss_mask)


@dataclass(frozen=True)
class CISPOSurrogate:
    """CISPO (MiniMax-M1, arXiv:2506.13585): sg[clip(rho, floor, cap)] A log pi. No token loses its gradient, only its
    weight is held. cap is an absolute bound on rho, not a distance from 1; 5 is ScaleRL's (arXiv:2510.13786), for
    MiniMax-M1 gives no number, and writes the bound as 1 + eps."""

    cap: float = 5.0
    floor: float = 0.0

    def __call__(self, terms: SurrogateInputs) -> tuple[Tensor, Tensor]:
        rho = token_ratio(terms).detach()
        return rho.clamp(self.floor, self.cap) * terms.advantages * terms.log_p, (rho > self.cap) | (rho < self.floor)


@dataclass(frozen=True)
class UnclippedSurrogate:
    """rho A: REINFORCE with importance weights for off-policy batches."""

    def __call__(self, terms: SurrogateInputs) -> tuple[Tensor, Tensor]:
        return token_ratio(terms) * terms.advantages, torch.zeros_like(terms.loss_mask)


@dataclass(frozen=True)
class PolicyVariant:
    """A method of the literature: its surrogate, what its loss is divided by (`policy_gradient.TOKEN_WEIGHTS`), and how
    its advantages are made (`rollouts.advantages.ADVANTAGE_ESTIMATORS`, `rollouts.gae.VALUE_ESTIMATORS`)."""

    surrogate: Surrogate
    count: str
    advantages: str


POLICY_VARIANTS: dict[str, PolicyVariant] = {
    "grpo": PolicyVariant(
        ClippedSurrogate(0.2, 0.2), "sequences", "std"
    ),  # arXiv:2402.03300; 0.2 is PPO's and TRL's, it names none
    "dr_grpo": PolicyVariant(ClippedSurrogate(0.2, 0.2), "horizon", "mean"),  # arXiv:2503.20783; likewise
    "dapo": PolicyVariant(ClippedSurrogate(0.2, 0.28), "tokens", "std"),  # arXiv:2503.14476
    "gspo": PolicyVariant(
        ClippedSurrogate(3e-4, 4e-4, importance_ratio=sequence_ratio), "sequences", "std"
    ),  # arXiv:2507.18071
    "gspo_token": PolicyVariant(
        ClippedSurrogate(3e-4, 4e-4, importance_ratio=sequence_token_ratio), "sequences", "std"
    ),
    "ppo": PolicyVariant(ClippedSurrogate(0.2, 0.2), "tokens", "gae"),  # arXiv:1707.06347
    "sapo": PolicyVariant(SAPOSurrogate(1.0, 1.05), "sequences", "std"),  # arXiv:2511.20347
    "cispo": PolicyVariant(CISPOSurrogate(5.0), "tokens", "std"),  # arXiv:2506.13585, 2510.13786
    "reinforce": PolicyVariant(UnclippedSurrogate(), "sums", "leave_one_out"),  # arXiv:2402.14740
}
