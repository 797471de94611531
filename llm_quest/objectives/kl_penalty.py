"""Estimators of KL(pi || pi_ref) from the sampled token alone.

      l = log pi - log pi_ref        k1 = l      k2 = l^2 / 2      k3 = e^-l + l - 1 >= 0      unbiased = rho k3

What matters is the *gradient* of each in a loss, in expectation over samples of the policy:

      k1        0: no effect in a loss; correct in the reward
      k2        grad KL(pi || pi_ref), exactly
      k3        pi - pi_ref: the gradient of the other direction, KL(pi_ref || pi) (the GRPO paper's choice)
      rho k3    grad KL(pi || pi_ref), exactly (DeepSeek-V3.2, arXiv:2512.02556)

Commonly got wrong: k1 in a loss has no effect in expectation, and is refused; k3 has e^-l, and with e^l it estimates
no divergence between policy and reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.objectives.surrogates import MAX_LOG_RATIO

KLEstimator = Callable[[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"]], Float[Tensor, "B T"]]
"""log pi, log pi_ref and log rho -> an estimate at every token."""


def k1(log_p: Tensor, reference_log_p: Tensor, log_ratio: Tensor) -> Tensor:
    return log_p - reference_log_p


def k2(log_p: Tensor, reference_log_p: Tensor, log_ratio: Tensor) -> Tensor:
    return (log_p - reference_log_p).square() / 2


def k3(log_p: Tensor, reference_log_p: Tensor, log_ratio: Tensor) -> Tensor:
    log_ratio_to_reference = (log_p - reference_log_p).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-log_ratio_to_reference).exp() + log_ratio_to_reference - 1


def unbiased_k3(log_p: Tensor, reference_log_p: Tensor, log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * k3(log_p, reference_log_p, log_ratio)


KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3, "unbiased": unbiased_k3}


@dataclass(frozen=True)
class KLPenalty:
    """beta times one of `KL_ESTIMATORS`, per token, in the loss. (In the reward: `RolloutLoader(kl_coef=...)`.)"""

    beta: float
    estimator: str = "k3"

    def __post_init__(self) -> None:
        if self.estimator not in KL_ESTIMATORS:
            raise UsageError(f"no KL estimator is called {self.estimator!r}; known: {', '.join(KL_ESTIMATORS)}")
        if self.estimator == "k1":
            raise UsageError(
                "KL by k1 has no effect in a loss: its expected gradient is 0; take k2, k3 or unbiased, or put k1 in "
                "the reward"
            )
        if not self.beta > 0:
            raise UsageError(f"a KL term of beta {self.beta} has no effect; give a positive number or leave it out")

    def __call__(self, log_p: Tensor, reference_log_p: Tensor, log_ratio: Tensor) -> Tensor:
        return self.beta * KL_ESTIMATORS[self.estimator](log_p, reference_log_p, log_ratio)
