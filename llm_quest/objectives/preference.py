"""Preference optimization: DPO and its variants (Rafailov et al. 2023, arXiv:2305.18290) as an objective. The losses
themselves are in `preference_losses.py`. The logged rewards are beta (log p - log p_ref).

Commonly got wrong: (1) rewards logged without beta; (2) dropout in the policy's pass and not in the reference's; here
it is off; (3) the answer's end left out of the sum, so that stopping is never preferred; (4) the SFT term over the
question too: what is asked is then learned by heart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.data.unpaired import UnpairedBatch
from llm_quest.objectives.log_probs import log_probs_from_hidden
from llm_quest.objectives.next_token import batch_hidden_states
from llm_quest.objectives.preference_losses import DPO, LogRatios, PairwiseLoss

ReferenceLogProbs = Callable[[PreferenceBatch], Tensor]


class PreferenceLoss(nn.Module):
    """`PreferenceLoss(model, DPO(beta=0.1))(batch) -> Loss`: count = elements (a pair is one, as are K ranked answers).

    average_log_prob: means over the answer's tokens in place of sums (for IPO TRL does so: its authors say that the
    paper's experiments had means, though its equations have sums). sft_weight: of the SFT term -log p(chosen) /
    |chosen| of each comparison, None for the loss's own (RPO, Pang et al. 2024, arXiv:2404.19733, eq. 2, adds it to
    DPO); TRL's is a mean over the batch's tokens, where long answers weigh more. reference: computes the reference's
    log-probability of each row where the batch does not carry it."""

    def __init__(
        self,
        model: nn.Module,
        loss: PairwiseLoss = DPO(),
        *,
        average_log_prob: bool = False,
        sft_weight: float | None = None,
        reference: ReferenceLogProbs | None = None,
    ):
        super().__init__()
        self.model: Any = model
        self.loss = loss
        self.average_log_prob = average_log_prob or loss.traits.average_log_prob
        self.sft_weight = loss.traits.sft_weight if sft_weight is None else sft_weight
        self.reference = reference

    def forward(self, batch: PreferenceBatch) -> Loss:
        policy_log_probs = sequence_log_probs(self.model, batch)
        reference_log_probs = self.reference_log_probs(batch) if self.loss.traits.needs_reference else None
        log_ratios = relative_log_probs(
            policy_log_probs, reference_log_probs, batch.targets, average=self.average_log_prob
        )
        per_pair = self.loss(log_ratio_pairs(log_ratios, policy_log_probs, batch, average=self.average_log_prob))
        metrics = self.preference_metrics(policy_log_probs.detach(), log_ratios.detach(), batch)
        if self.sft_weight:
            nll = -relative_log_probs(policy_log_probs, None, batch.targets, average=True)[batch.chosen]
            metrics |= {"preference_loss": per_pair.detach(), "nll_loss": nll.detach()}
            per_pair = per_pair + self.sft_weight * nll
        w = batch.weights.to(per_pair.dtype)
        return Loss(
            (w * per_pair).sum(), w.sum().float(), {name: ((w * x).sum(), w.sum()) for name, x in metrics.items()}
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
    relative = policy_log_probs if reference_log_probs is None else policy_log_probs - reference_log_probs
    return relative / (targets != IGNORE_INDEX).sum(dim=1) if average else relative


def log_ratio_pairs(
    log_ratios: Float[Tensor, " R"], policy_log_probs: Float[Tensor, " R"], batch: PreferenceBatch, *, average: bool
) -> LogRatios:
    """The log-ratios of both answers of each comparison."""
    policy = relative_log_probs(policy_log_probs.detach(), None, batch.targets, average=average)
    reference = policy - log_ratios.detach()
    return LogRatios(
        log_ratios[batch.chosen], log_ratios[batch.rejected], reference[batch.chosen] - reference[batch.rejected]
    )


def sequence_log_probs(model: Any, batch: PreferenceBatch | UnpairedBatch) -> Float[Tensor, " R"]:
    """log p(answer | question), the sum over its tokens, without dropout."""
    if model.training:
        model.eval()
    return log_probs_from_hidden(model, batch_hidden_states(model, batch), batch.targets).sum(dim=1)
