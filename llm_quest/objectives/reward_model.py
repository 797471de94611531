"""Reward model loss: Bradley-Terry on pairs of answers (InstructGPT, arXiv:2203.02155).

      loss = -log sigma(r_better - r_worse - margin) + center (r_better + r_worse)^2

r is one number read at the answer's end (or the mean of all tokens' scores, `readouts.py`). margin: Llama 2
(arXiv:2307.09288). center: removes the constant that the loss does not determine (arXiv:2312.09244).

Commonly got wrong: the score is read at padding, or at the token before the end, which most answers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from llm_quest.contracts import Loss
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.errors import UsageError
from llm_quest.objectives.classification import pad_rows
from llm_quest.objectives.readouts import read_rewards


class RewardModelLoss(nn.Module):
    """`RewardModelLoss(model)(batch) -> Loss`: count = elements. model: its head gives one number (the technique
    score_head). Dropout is off, as in every pass that scores."""

    def __init__(self, model: nn.Module, *, center_coefficient: float = 0.0):
        super().__init__()
        self.model: Any = model
        self.center_coefficient = center_coefficient

    def forward(self, batch: PreferenceBatch) -> Loss:
        if self.model.training:
            self.model.eval()
        r = read_rewards(self.model, batch.input_ids, batch.position_ids)
        better, worse = r[batch.chosen], r[batch.rejected]
        w = batch.weights.to(r.dtype)
        each = bradley_terry(better, worse, batch.margins.to(r.dtype)) + self.center_coefficient * (better + worse) ** 2
        metrics = {
            "rewards/accuracy": (better > worse).to(r.dtype),
            "rewards/margin": (better - worse).detach(),
            "rewards/mean": ((better + worse) / 2).detach(),
        }
        return Loss((w * each).sum(), w.sum().float(), {name: ((w * x).sum(), w.sum()) for name, x in metrics.items()})


def bradley_terry(better: Tensor, worse: Tensor, margins: Tensor) -> Tensor:
    """The loss of each comparison."""
    return -logsigmoid(better - worse - margins)


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Sequence[int]], micro_batch_size: int = 16) -> Float[Tensor, " R"]:
    """The rewards of rows of ids (question, answer and its end), on the CPU; rows of similar length are batched
    together."""
    if model.head.weight.shape[0] != 1:
        raise UsageError(
            f"a reward is one number, this model's head gives {model.head.weight.shape[0]}; train a reward model"
        )
    rewards = torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    for first in range(0, len(order), micro_batch_size):
        numbers = order[first : first + micro_batch_size]
        tokens, positions = pad_rows([rows[number] for number in numbers])
        device = model.head.weight.device
        rewards[numbers] = read_rewards(model, tokens.to(device), positions.to(device)).float().cpu()
    return rewards
