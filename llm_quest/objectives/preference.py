"""Preference optimization: DPO and its variants (Rafailov et al. 2023, arXiv:2305.18290).

      D = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]        loss = f(D)

Each log p is the *sum* over the answer's tokens, its end included. A loss is a frozen dataclass with its own numbers;
one that has no reference leaves log p_ref out. The logged rewards are beta (log p - log p_ref).

Commonly got wrong: (1) means over tokens in place of sums, and rewards logged without beta; (2) cDPO's label
smoothing accepted and never read; here an option without effect is refused; (3) dropout in the policy's pass and not in
the reference's; here it is off; (4) the answer's end left out of the sum, so that stopping is never preferred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from llm_quest.contracts import Loss
from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.errors import UsageError
from llm_quest.objectives.log_probs import log_probs_from_hidden
from llm_quest.objectives.next_token import batch_hidden_states

ReferenceLogProbs = Callable[[PreferenceBatch], Tensor]


class PairwiseLoss(Protocol):
    """The loss of each comparison, from D. beta: strength of the pull towards the reference. needs_reference: whether
    log p_ref is in D. average_log_prob: whether log p is always the mean over the answer's tokens."""

    needs_reference: ClassVar[bool]
    average_log_prob: ClassVar[bool]

    @property
    def beta(self) -> float: ...
    def __call__(self, D: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DPO:
    """-log sigma(beta D)."""

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    average_log_prob: ClassVar[bool] = False

    def __call__(self, D: Tensor) -> Tensor:
        return -logsigmoid(self.beta * D)


@dataclass(frozen=True)
class ConservativeDPO:
    """cDPO (Mitchell 2023): its optimum is sigma(beta D) = 1 - label_smoothing, and beyond it pushes back."""

    label_smoothing: float
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    average_log_prob: ClassVar[bool] = False

    def __call__(self, D: Tensor) -> Tensor:
        return -(1 - self.label_smoothing) * logsigmoid(self.beta * D) - self.label_smoothing * logsigmoid(
            -self.beta * D
        )


@dataclass(frozen=True)
class RobustDPO:
    """Unbiased under wrong labels (Chowdhury et al. 2024, arXiv:2403.00409): steeper than DPO, not flatter."""

    label_smoothing: float
    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    average_log_prob: ClassVar[bool] = False

    def __call__(self, D: Tensor) -> Tensor:
        flips = self.label_smoothing
        return (-(1 - flips) * logsigmoid(self.beta * D) + flips * logsigmoid(-self.beta * D)) / (1 - 2 * flips)


@dataclass(frozen=True)
class IPO:
    """(D - 1 / 2 beta)^2 (Azar et al. 2023, arXiv:2310.12036): a margin to reach, not to exceed."""

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    average_log_prob: ClassVar[bool] = False

    def __call__(self, D: Tensor) -> Tensor:
        return (D - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - beta D): RSO's hinge (Liu et al. 2023, arXiv:2309.06657). SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)
    has it without a reference: max(0, delta - log p(chosen) + log p(rejected))."""

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    average_log_prob: ClassVar[bool] = False

    def __call__(self, D: Tensor) -> Tensor:
        return torch.relu(1 - self.beta * D)


PREFERENCE_LOSSES: dict[str, type[Any]] = {
    "dpo": DPO,
    "cdpo": ConservativeDPO,
    "robust": RobustDPO,
    "ipo": IPO,
    "hinge": Hinge,
}


def make_preference_loss(name: str, **numbers: float) -> PairwiseLoss:
    """The loss of this name with the numbers that are given; UsageError for one that it has no use for, that it lacks,
    or that is out of range."""
    if name not in PREFERENCE_LOSSES:
        raise UsageError(f"no preference loss is called {name!r}; known: {', '.join(PREFERENCE_LOSSES)}")
    if without_effect := [one for one in numbers if one not in loss_numbers(name)]:
        raise UsageError(refuse_number(without_effect[0], numbers[without_effect[0]], name))
    for one, required in loss_numbers(name).items():
        if required and one not in numbers:
            raise UsageError(f"loss_type={name} needs {one}{NUMBER_RANGES.get(one, '')}")
    loss: PairwiseLoss = PREFERENCE_LOSSES[name](**numbers)
    if loss.beta <= 0:
        raise UsageError(f"beta is {loss.beta}; expected a number above 0")
    if not 0 < getattr(loss, "label_smoothing", 0.1) < 0.5:
        raise UsageError(f"loss_type={name} needs label_smoothing{NUMBER_RANGES['label_smoothing']}")
    return loss


def loss_numbers(name: str) -> Mapping[str, bool]:
    """The numbers of a loss, and whether they must be given."""
    return {field.name: field.default is MISSING for field in fields(PREFERENCE_LOSSES[name])}


def refuse_number(number: str, value: float, name: str) -> str:
    able = " or ".join(other for other in PREFERENCE_LOSSES if number in loss_numbers(other))
    cure = f"take loss_type={able}, or leave it out" if able else f"it has {', '.join(loss_numbers(name))}"
    return f"{number} {value} has no effect on loss_type={name}; {cure}"


NUMBER_RANGES = {"label_smoothing": ", the part of wrong labels, above 0 and below 0.5"}


class PreferenceLoss(nn.Module):
    """`PreferenceLoss(model, DPO(beta=0.1))(batch) -> Loss`: count = elements (a pair is one, as are K ranked answers).

    average_log_prob: means over the answer's tokens in place of sums (for IPO TRL does so: its authors say that the
    paper's experiments had means, though its equations have sums). reference: computes the reference's log-probability
    of each row where the batch does not carry it."""

    def __init__(
        self,
        model: nn.Module,
        loss: PairwiseLoss = DPO(),
        *,
        average_log_prob: bool = False,
        reference: ReferenceLogProbs | None = None,
    ):
        super().__init__()
        self.model: Any = model
        self.loss = loss
        self.average_log_prob = average_log_prob or loss.average_log_prob
        self.reference = reference

    def forward(self, batch: PreferenceBatch) -> Loss:
        policy_log_probs = sequence_log_probs(self.model, batch)
        reference_log_probs = self.reference_log_probs(batch) if self.loss.needs_reference else None
        log_ratios = relative_log_probs(
            policy_log_probs, reference_log_probs, batch.targets, average=self.average_log_prob
        )
        D = log_ratios[batch.chosen] - log_ratios[batch.rejected]
        w = batch.weights.to(D.dtype)
        metrics = self.preference_metrics(policy_log_probs.detach(), log_ratios.detach(), batch)
        return Loss(
            (w * self.loss(D)).sum(), w.sum().float(), {name: ((w * x).sum(), w.sum()) for name, x in metrics.items()}
        )

    def reference_log_probs(self, batch: PreferenceBatch) -> Float[Tensor, " R"]:
        """The reference's log-probabilities: carried by the batch, or computed."""
        if self.reference is not None:
            with torch.no_grad():
                return self.reference(batch)
        assert batch.reference_log_probs is not None, "neither the batch nor the objective knows the reference"
        return batch.reference_log_probs

    def preference_metrics(
        self, policy_log_probs: Tensor, log_ratios: Tensor, batch: PreferenceBatch
    ) -> dict[str, Tensor]:
        """Rewards, margin and accuracy of each comparison."""
        rewards = self.loss.beta * log_ratios
        chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": policy_log_probs[batch.chosen],
            "logps/rejected": policy_log_probs[batch.rejected],
        }


def relative_log_probs(
    policy_log_probs: Float[Tensor, " R"], reference_log_probs: Float[Tensor, " R"] | None, targets: Tensor,
    *, average: bool,
) -> Float[Tensor, " R"]:  # fmt: skip
    """log p - log p_ref of each answer, or log p alone; average: per token of the answer."""
    found = policy_log_probs if reference_log_probs is None else policy_log_probs - reference_log_probs
    return found / (targets != IGNORE_INDEX).sum(dim=1) if average else found


def sequence_log_probs(model: Any, batch: PreferenceBatch) -> Float[Tensor, " R"]:
    """log p(answer | question), the sum over its tokens, without dropout."""
    if model.training:
        model.eval()
    return log_probs_from_hidden(model, batch_hidden_states(model, batch), batch.targets).sum(dim=1)
