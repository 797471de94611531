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
from llm_quest.data.batch import IGNORE
from llm_quest.data.pairs import AnswerBatch
from llm_quest.errors import UsageError
from llm_quest.objectives.log_probs import log_probs_of
from llm_quest.objectives.next_token import hidden_of

Reference = Callable[[AnswerBatch], Tensor]


class PreferenceLoss(nn.Module):
    """`PreferenceLoss(model)(batch) -> Loss`: count = elements (a pair is one, K ranked answers are one).

    loss: a name in LOSSES. beta: how far the policy may go from the reference. flips: the part of the pairs that are
    believed to be labelled the wrong way round (cdpo and robust need it, the others have no use for it). per_token:
    means in place of sums (for IPO TRL does so: its authors say that the paper's experiments had means, though its
    equations have sums). reference: computes the reference's log-probability
    of each row where the batch does not carry it."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str = "dpo",
        beta: float = 0.1,
        flips: float = 0.0,
        per_token: bool = False,
        reference: Reference | None = None,
    ):
        super().__init__()
        require(loss, beta, flips)
        self.model: Any = model
        self.loss, self.beta, self.flips, self.per_token = loss, beta, flips, per_token
        self.reference = reference

    def forward(self, batch: AnswerBatch) -> Loss:
        now, before = answer_log_probs(self.model, batch), self.known(batch)
        learned = (batch.targets != IGNORE).sum(dim=1)
        gained = (now - before) / learned if self.per_token else now - before
        D = gained[batch.better] - gained[batch.worse]
        w = batch.weights.to(D.dtype)
        total = (w * LOSSES[self.loss].of(D, self.beta, self.flips)).sum()
        return Loss(
            total, w.sum().float(), {name: ((w * x).sum(), w.sum()) for name, x in self.told(now, gained, batch)}
        )

    def known(self, batch: AnswerBatch) -> Float[Tensor, " R"]:
        """The reference's log-probabilities: carried by the batch, or computed."""
        if self.reference is not None:
            with torch.no_grad():
                return self.reference(batch)
        assert batch.reference is not None, "neither the batch nor the objective knows the reference"
        return batch.reference

    def told(self, now: Tensor, gained: Tensor, batch: AnswerBatch) -> list[tuple[str, Tensor]]:
        """What the paper plots, for each comparison."""
        now, rewards = now.detach(), self.beta * gained.detach()
        chosen, rejected = rewards[batch.better], rewards[batch.worse]
        return [
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/margin", chosen - rejected),
            ("rewards/accuracy", (chosen > rejected).to(chosen.dtype)),
            ("logps/chosen", now[batch.better]),
            ("logps/rejected", now[batch.worse]),
        ]


def answer_log_probs(model: Any, batch: AnswerBatch) -> Float[Tensor, " R"]:
    """log p(answer | question), the sum over its tokens, without dropout."""
    if model.training:
        model.eval()
    return log_probs_of(model, hidden_of(model, batch), batch.targets).sum(dim=1)


class Form(NamedTuple):
    """of(D, beta, flips) -> the loss of each comparison. flips: has that number an effect?"""

    of: Callable[[Tensor, float, float], Tensor]
    flips: bool = False


def dpo(D: Tensor, beta: float, flips: float) -> Tensor:
    """-log sigma(beta D)."""
    return -logsigmoid(beta * D)


def cdpo(D: Tensor, beta: float, flips: float) -> Tensor:
    """Conservative (Mitchell 2023): its optimum is sigma(beta D) = 1 - flips, and beyond it pushes back."""
    return -(1 - flips) * logsigmoid(beta * D) - flips * logsigmoid(-beta * D)


def robust(D: Tensor, beta: float, flips: float) -> Tensor:
    """Unbiased under flips (Chowdhury et al. 2024, arXiv:2403.00409): steeper than DPO, not flatter."""
    return (-(1 - flips) * logsigmoid(beta * D) + flips * logsigmoid(-beta * D)) / (1 - 2 * flips)


def ipo(D: Tensor, beta: float, flips: float) -> Tensor:
    """(D - 1 / 2 beta)^2 (Azar et al. 2023, arXiv:2310.12036): a margin to reach, not as much as can be."""
    return (D - 1 / (2 * beta)) ** 2


def hinge(D: Tensor, beta: float, flips: float) -> Tensor:
    """max(0, 1 - beta D): RSO's hinge (Liu et al. 2023, arXiv:2309.06657). SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)
    has it without a reference: max(0, delta - log p(chosen) + log p(rejected))."""
    return torch.relu(1 - beta * D)


LOSSES = {
    "dpo": Form(dpo),
    "cdpo": Form(cdpo, flips=True),
    "robust": Form(robust, flips=True),
    "ipo": Form(ipo),
    "hinge": Form(hinge),
}


def require(loss: str, beta: float, flips: float) -> None:
    """UsageError for what is not known or would have no effect."""
    if loss not in LOSSES:
        raise UsageError(f"no preference loss is called {loss!r}; known: {', '.join(LOSSES)}")
    if beta <= 0:
        raise UsageError(f"beta is {beta}; expected a number above 0")
    if LOSSES[loss].flips and not 0 < flips < 0.5:
        raise UsageError(f"{loss} needs flips, the part of wrong labels, above 0 and below 0.5; it is {flips}")
    if not LOSSES[loss].flips and flips:
        able = " or ".join(name for name, form in LOSSES.items() if form.flips)
        raise UsageError(f"flips {flips} has no effect on {loss}; take the loss {able}, or leave flips out")
