"""The loss of a process reward model: is the solution right up to the end of this step? (Lightman et al. 2023,
arXiv:2305.20050; with soft labels Math-Shepherd, arXiv:2312.08935, eqs. 4 and 5.)

      L = sum over steps of -y log sigma(s) - (1 - y) log sigma(-s)        s: the score at the step's last token

The head gives one score; TRL's PRMTrainer has two logits of a token classifier, whose difference s is, and whose
cross-entropy is this loss.

Commonly got wrong: labels at every token of a step, most of which are written before it can be judged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import Loss
from llm_quest.data.step_labels import StepBatch
from llm_quest.objectives.readouts import score_tokens


class ProcessRewardLoss(nn.Module):
    """`ProcessRewardLoss(model)(batch) -> Loss`: total in nats, count = steps. model: its head gives one number (the
    technique score_head). Dropout is off, as in every pass that scores.

    metrics: accuracy (a score above 0 says right), and the mean of sigma(s) at right and at wrong steps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, batch: StepBatch) -> Loss:
        if self.model.training:
            self.model.eval()
        scores = score_tokens(self.model, batch.input_ids, batch.position_ids)
        known = ~batch.labels.isnan()
        s, y = scores[known], batch.labels[known].to(scores.dtype)
        total = F.binary_cross_entropy_with_logits(s, y, reduction="sum")
        return Loss(total, known.sum(dtype=torch.float32), self.metrics(s.detach(), y))

    def metrics(self, s: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        p, right = torch.sigmoid(s), (y > 0.5).to(s.dtype)
        metrics = {"accuracy": (((s > 0) == (y > 0.5)).to(s.dtype).sum(), torch.ones_like(s).sum())}
        metrics["score/right"] = ((p * right).sum(), right.sum())
        return metrics | {"score/wrong": ((p * (1 - right)).sum(), (1 - right).sum())}
