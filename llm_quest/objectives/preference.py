"""Preference optimisation: the DPO family (Rafailov et al. 2023, arXiv:2305.18290).

      D = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]        loss = f(D, beta)

each log p the *sum* over the answer's tokens, its end included. The logged rewards are beta (log p - log p_ref).

Commonly got wrong: (1) means over tokens in place of sums, and rewards logged without beta; (2) cDPO's flips accepted
and never read; here an option without effect is refused; (3) dropout in the policy's pass and not in the reference's;
here it is off; (4) the answer's end left out of the sum, so that stopping is never preferred.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


class PreferenceLoss(nn.Module):
    """`PreferenceLoss(model)(batch) -> Loss`: count = elements (a pair is one, K ranked answers are one).

    loss_type: a name in LOSSES. beta: how far the policy may go from the reference. label_smoothing: the part of the
    pairs that are believed to be labelled the wrong way round (cdpo and robust need it, the others have no use for it).
    per_token: means in place of sums (for IPO TRL does so: its authors say that the paper's experiments had means,
    though its equations have sums). reference: computes the reference's log-probability of each row where the batch
    does not carry it."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_type: str = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        per_token: bool = False,
        reference: ReferenceLogProbs | None = None,
    ):
        super().__init__()
        check_preference_options(loss_type, beta, label_smoothing)
        self.model: Any = model
        self.loss_type, self.beta, self.label_smoothing, self.per_token = loss_type, beta, label_smoothing, per_token
        self.reference = reference

    def forward(self, batch: PreferenceBatch) -> Loss:
        policy_log_probs, reference_log_probs = sequence_log_probs(self.model, batch), self.reference_log_probs(batch)
        learned = (batch.targets != IGNORE_INDEX).sum(dim=1)
        log_ratios = (
            (policy_log_probs - reference_log_probs) / learned
            if self.per_token
            else policy_log_probs - reference_log_probs
        )
        D = log_ratios[batch.chosen] - log_ratios[batch.rejected]
        w = batch.weights.to(D.dtype)
        total = (w * PREFERENCE_LOSSES[self.loss_type].loss(D, self.beta, self.label_smoothing)).sum()
        return Loss(
            total,
            w.sum().float(),
            {
                name: ((w * x).sum(), w.sum())
                for name, x in self.preference_metrics(policy_log_probs, log_ratios, batch)
            },
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
    ) -> list[tuple[str, Tensor]]:
        """What the paper plots, for each comparison."""
        policy_log_probs, rewards = policy_log_probs.detach(), self.beta * log_ratios.detach()
        chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
        return [
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/margin", chosen - rejected),
            ("rewards/accuracy", (chosen > rejected).to(chosen.dtype)),
            ("logps/chosen", policy_log_probs[batch.chosen]),
            ("logps/rejected", policy_log_probs[batch.rejected]),
        ]


def sequence_log_probs(model: Any, batch: PreferenceBatch) -> Float[Tensor, " R"]:
    """log p(answer | question), the sum over its tokens, without dropout."""
    if model.training:
        model.eval()
    return log_probs_from_hidden(model, batch_hidden_states(model, batch), batch.targets).sum(dim=1)


class PreferenceForm(NamedTuple):
    """of(D, beta, flips) -> the loss of each comparison. uses_label_smoothing: has that number an effect?"""

    loss: Callable[[Tensor, float, float], Tensor]
    uses_label_smoothing: bool = False


def dpo_loss(D: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta D)."""
    return -logsigmoid(beta * D)


def cdpo_loss(D: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Conservative (Mitchell 2023): its optimum is sigma(beta D) = 1 - flips, and beyond it pushes back."""
    return -(1 - label_smoothing) * logsigmoid(beta * D) - label_smoothing * logsigmoid(-beta * D)


def robust_dpo_loss(D: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Unbiased under flips (Chowdhury et al. 2024, arXiv:2403.00409): steeper than DPO, not flatter."""
    return (-(1 - label_smoothing) * logsigmoid(beta * D) + label_smoothing * logsigmoid(-beta * D)) / (
        1 - 2 * label_smoothing
    )


def ipo_loss(D: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(D - 1 / 2 beta)^2 (Azar et al. 2023, arXiv:2310.12036): a margin to reach, not as much as can be."""
    return (D - 1 / (2 * beta)) ** 2


def hinge_loss(D: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """max(0, 1 - beta D): RSO's hinge (Liu et al. 2023, arXiv:2309.06657). SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)
    has it without a reference: max(0, delta - log p(chosen) + log p(rejected))."""
    return torch.relu(1 - beta * D)


PREFERENCE_LOSSES = {
    "dpo": PreferenceForm(dpo_loss),
    "cdpo": PreferenceForm(cdpo_loss, uses_label_smoothing=True),
    "robust": PreferenceForm(robust_dpo_loss, uses_label_smoothing=True),
    "ipo": PreferenceForm(ipo_loss),
    "hinge": PreferenceForm(hinge_loss),
}


def check_preference_options(loss_type: str, beta: float, label_smoothing: float) -> None:
    """UsageError for what is not known or would have no effect."""
    if loss_type not in PREFERENCE_LOSSES:
        raise UsageError(f"no preference loss is called {loss_type!r}; known: {', '.join(PREFERENCE_LOSSES)}")
    if beta <= 0:
        raise UsageError(f"beta is {beta}; expected a number above 0")
    if PREFERENCE_LOSSES[loss_type].uses_label_smoothing and not 0 < label_smoothing < 0.5:
        raise UsageError(
            f"{loss_type} needs label_smoothing, the fraction of wrong labels, above 0 and below 0.5; it is {label_smoothing}"
        )
    if not PREFERENCE_LOSSES[loss_type].uses_label_smoothing and label_smoothing:
        able = " or ".join(name for name, form in PREFERENCE_LOSSES.items() if form.uses_label_smoothing)
        raise UsageError(
            f"label_smoothing {label_smoothing} has no effect on {loss_type}; take the loss {able}, or leave it out"
        )
