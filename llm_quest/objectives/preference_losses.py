"""Losses of preference optimization, one frozen dataclass each; the table is at the bottom (DPO, Rafailov et al. 2023,
arXiv:2305.18290, and its variants).

      a = log p(chosen) - log p_ref(chosen)        b = log p(rejected) - log p_ref(rejected)        D = a - b

Each log p is the *sum* over the answer's tokens, its end included, or where `average_log_prob` the mean. A loss without
a reference leaves log p_ref out. Some have an SFT term beside them, sft_weight * (-log p(chosen) / |chosen|).

Commonly got wrong: (1) means over tokens in place of sums, and sums in place of means (SimPO, ORPO); (2) cDPO's label
smoothing accepted and never read; here an option without effect is refused; (3) the odds of ORPO from a sum of
log-probabilities: p is then 0 in every practical sense, and the odds ratio is a likelihood ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


class LogRatios(NamedTuple):
    """The log-ratios of each comparison: a, b (without a reference log p alone), and the reference's own log
    p_ref(chosen) - log p_ref(rejected), 0 without one."""

    chosen: Float[Tensor, " M"]
    rejected: Float[Tensor, " M"]
    reference_margin: Float[Tensor, " M"]

    @property
    def D(self) -> Float[Tensor, " M"]:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class LossTraits:
    """What a loss is computed from. needs_reference: whether log p_ref is in a and b. average_log_prob: whether log p
    is always the mean over the answer's tokens. sft_weight: of the SFT term, where nobody gives another one.
    sorts_batch: whether it compares the pairs of a step with each other, so that they must be in one micro-batch."""

    needs_reference: bool = True
    average_log_prob: bool = False
    sft_weight: float = 0.0
    sorts_batch: bool = False


class PairwiseLoss(Protocol):
    """The loss of each comparison. beta: strength of the pull towards the reference, and the scale of the rewards."""

    traits: ClassVar[LossTraits]

    @property
    def beta(self) -> float: ...
    def __call__(self, pairs: LogRatios) -> Float[Tensor, " M"]: ...


@dataclass(frozen=True)
class DPO:
    """-log sigma(beta D) (arXiv:2305.18290, eq. 7)."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        return -logsigmoid(self.beta * pairs.D)


@dataclass(frozen=True)
class ConservativeDPO:
    """cDPO (Mitchell 2023): its optimum is sigma(beta D) = 1 - label_smoothing, and beyond it pushes back."""

    label_smoothing: float
    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        return logistic_with_smoothing(self.beta * pairs.D, self.label_smoothing)


@dataclass(frozen=True)
class RobustDPO:
    """Unbiased under wrong labels (Chowdhury et al. 2024, arXiv:2403.00409): steeper than DPO, not flatter."""

    label_smoothing: float
    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        flips, z = self.label_smoothing, self.beta * pairs.D
        return (-(1 - flips) * logsigmoid(z) + flips * logsigmoid(-z)) / (1 - 2 * flips)


@dataclass(frozen=True)
class IPO:
    """(D - 1 / 2 beta)^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17): a margin to reach, not to exceed."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        return (pairs.D - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - beta D): RSO's hinge (Liu et al. 2023, arXiv:2309.06657). SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)
    has it without a reference: max(0, delta - log p(chosen) + log p(rejected))."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        return torch.relu(1 - self.beta * pairs.D)


@dataclass(frozen=True)
class SimPO:
    """-log sigma(beta (mean log p(chosen) - mean log p(rejected)) - simpo_gamma) (Meng et al. 2024, arXiv:2405.14734,
    eq. 6). No reference; simpo_gamma is the target margin of the rewards, half of beta as in the paper's Llama-3
    settings."""

    beta: float = 2.0
    simpo_gamma: float = 1.0
    traits: ClassVar[LossTraits] = LossTraits(needs_reference=False, average_log_prob=True)

    def __call__(self, pairs: LogRatios) -> Tensor:
        return -logsigmoid(self.beta * pairs.D - self.simpo_gamma)


@dataclass(frozen=True)
class CPO:
    """-log sigma(beta D) with a uniform reference, beside an SFT term (Xu et al. 2024, arXiv:2401.08417, eqs. 3 and 5).
    Differs: the SFT term is a mean over the answer's tokens; the paper writes the sum."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits(needs_reference=False, sft_weight=1.0)

    def __call__(self, pairs: LogRatios) -> Tensor:
        return -logsigmoid(self.beta * pairs.D)


@dataclass(frozen=True)
class ORPO:
    """-beta log sigma(log odds(chosen) - log odds(rejected)) beside an SFT term, odds = p / (1 - p) with p the
    geometric mean over the answer's tokens (Hong et al. 2024, arXiv:2403.07691, eqs. 3, 6, 7; its lambda is beta)."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits(needs_reference=False, average_log_prob=True, sft_weight=1.0)

    def __call__(self, pairs: LogRatios) -> Tensor:
        return -self.beta * logsigmoid(log_odds(pairs.chosen) - log_odds(pairs.rejected))


@dataclass(frozen=True)
class APOZero:
    """1 - sigma(beta a) + sigma(beta b) (APO, D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): for chosen answers
    that are better than the model's own. The chosen one rises, the rejected one falls."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        return torch.sigmoid(-self.beta * pairs.chosen) + torch.sigmoid(self.beta * pairs.rejected)


@dataclass(frozen=True)
class APODown:
    """sigma(beta a) + 1 - sigma(beta D) (APO, arXiv:2408.06266, eq. 8): for chosen answers that are worse than the
    model's own. Both fall, the rejected one faster."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        return torch.sigmoid(self.beta * pairs.chosen) + torch.sigmoid(-self.beta * pairs.D)


@dataclass(frozen=True)
class EXOPair:
    """KL(q || (1 - label_smoothing, label_smoothing)) with q = (sigma(beta D), sigma(-beta D)) (EXO, Ji et al. 2024,
    arXiv:2402.00856, eq. 16): DPO is the other direction of the same divergence."""

    label_smoothing: float = 1e-3
    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        z, flips = self.beta * pairs.D, self.label_smoothing
        wins = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-flips))
        return wins + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(flips))


@dataclass(frozen=True)
class NCAPair:
    """-log sigma(beta a) - (log sigma(-beta a) + log sigma(-beta b)) / 2 (NCA, Chen et al. 2024, arXiv:2402.05369, for
    a pair whose better answer has all of the reward): the chosen answer's own likelihood does not fall."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        a, b = self.beta * pairs.chosen, self.beta * pairs.rejected
        return -logsigmoid(a) - (logsigmoid(-a) + logsigmoid(-b)) / 2


@dataclass(frozen=True)
class BCOPair:
    """-log sigma(beta a) - log sigma(-beta b) (BCO, Jung et al. 2024, arXiv:2404.04656, eq. 7). Differs: the paper's
    reward shift, a running mean of both rewards, is left out, as in TRL's loss of pairs."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        return -logsigmoid(self.beta * pairs.chosen) - logsigmoid(-self.beta * pairs.rejected)


@dataclass(frozen=True)
class SPPOHard:
    """(a - 1 / 2 beta)^2 + (b + 1 / 2 beta)^2 (SPPO, Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with a probability of 1
    that the chosen answer wins; 1 / beta is its eta)."""

    beta: float = 0.1
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        target = 1 / (2 * self.beta)
        return (pairs.chosen - target) ** 2 + (pairs.rejected + target) ** 2


@dataclass(frozen=True)
class DiscoPOP:
    """(1 - m) (-log sigma(beta D)) + m exp(-beta D) with m = sigma(beta D / discopop_tau) (Lu et al. 2024,
    arXiv:2406.08414, eq. 5): the exponential takes over where the margin is large."""

    beta: float = 0.1
    discopop_tau: float = 0.05
    traits: ClassVar[LossTraits] = LossTraits()

    def __call__(self, pairs: LogRatios) -> Tensor:
        z = self.beta * pairs.D
        m = torch.sigmoid(z / self.discopop_tau)
        return -logsigmoid(z) * (1 - m) + torch.exp(-z) * m


@dataclass(frozen=True)
class AOT:
    """-log sigma(beta (u_(i) - v_(i))) with u the policy's and v the reference's margins log p(chosen) - log
    p(rejected), each sorted over the batch (AOT, Melnyk et al. 2024, arXiv:2406.05882, eq. 9): the whole distribution
    of margins is moved, not each of them. label_smoothing: as in cDPO; 0 here is the paper's."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    traits: ClassVar[LossTraits] = LossTraits(sorts_batch=True)

    def __call__(self, pairs: LogRatios) -> Tensor:
        policy_margin = pairs.D + pairs.reference_margin
        difference = policy_margin.sort().values - pairs.reference_margin.sort().values
        return logistic_with_smoothing(self.beta * difference, self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired:
    """-log sigma(beta (a_(i) - b_(i))), a and b each sorted over the batch (AOT, arXiv:2406.05882, eq. 10): chosen and
    rejected answers need not belong to the same question."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    traits: ClassVar[LossTraits] = LossTraits(sorts_batch=True)

    def __call__(self, pairs: LogRatios) -> Tensor:
        difference = pairs.chosen.sort().values - pairs.rejected.sort().values
        return logistic_with_smoothing(self.beta * difference, self.label_smoothing)


def logistic_with_smoothing(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - label_smoothing) log sigma(z) - label_smoothing log sigma(-z)."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p) from log p < 0, exact at both ends; a log p within 1e-6 of 0 counts as -1e-6."""
    x = log_p.clamp(max=-1e-6)
    near_one = x > -math.log(2)
    log_rest = torch.where(near_one, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    return x - log_rest


PREFERENCE_LOSSES: dict[str, type[Any]] = {
    "dpo": DPO,
    "cdpo": ConservativeDPO,
    "robust": RobustDPO,
    "ipo": IPO,
    "hinge": Hinge,
    "simpo": SimPO,
    "cpo": CPO,
    "orpo": ORPO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "exo_pair": EXOPair,
    "nca_pair": NCAPair,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "discopop": DiscoPOP,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
}
