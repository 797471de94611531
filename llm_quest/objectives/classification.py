"""Classification: sum over images, or texts, of -log p(class | it), with label smoothing if asked for.

smoothed target = (1 - s) one_hot(label) + s / C            (Szegedy et al. 2016, arXiv:1512.00567, section 7)

A score head reads a text at its last real token, which attends to the whole row (`last_token_outputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import Loss
from llm_quest.data.batch import pad_with_positions
from llm_quest.scope import Scope

if TYPE_CHECKING:
    from llm_quest.data.image_datasets import ImageBatch
    from llm_quest.data.text_classification import TextClassificationBatch


def last_token_outputs(
    model: Any, input_ids: Int[Tensor, "R T"], position_ids: Int[Tensor, "R T"]
) -> Float[Tensor, "R N"]:
    """Outputs of a score head (rows, outputs), at least float32; padding may be on either side."""
    h = model.hidden_states(input_ids, Scope(position_ids))
    last = position_ids.argmax(dim=1)
    out = model.head(h[torch.arange(len(h), device=h.device), last])
    return out if out.dtype == torch.float64 else out.float()


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """input_ids, position_ids (R,T)."""
    input_ids, position_ids = pad_with_positions(rows)
    return torch.from_numpy(input_ids), torch.from_numpy(position_ids)


class ImageClassificationLoss(nn.Module):
    """`ImageClassificationLoss(model)(batch) -> Loss`: total in nats, count = images. metrics: accuracy."""

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: ImageBatch) -> Loss:
        return classification_loss(self.model(batch.images).float(), batch.labels, self.label_smoothing)


class TextClassificationLoss(nn.Module):
    """`TextClassificationLoss(model)(batch) -> Loss`, for texts. model: its head gives one number for each class (the
    technique score_head), read at a text's last real token."""

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: TextClassificationBatch) -> Loss:
        return classification_loss(
            last_token_outputs(self.model, batch.input_ids, batch.position_ids), batch.labels, self.label_smoothing
        )


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Loss:
    """The loss of logits (rows, C)."""
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    count = torch.full_like(total.detach(), len(labels))
    num_correct = (logits.argmax(dim=-1) == labels).sum(dtype=torch.float32)
    return Loss(total, count, {"accuracy": (num_correct, count)})
