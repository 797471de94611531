"""Classification: sum over images, or texts, of -log p(class | it).

label smoothing    target = (1 - s) one_hot(label) + s / C  (Szegedy et al. 2016, arXiv:1512.00567, section 7)
class weights      sum of w[label] -log p(label), count = sum of w[label], as torch.nn.CrossEntropyLoss(weight) has it
multi-label        sum over all labels of -w y log sigmoid(z) - (1 - y) log(1 - sigmoid(z)), count = texts x labels;
                   w: torch.nn.BCEWithLogitsLoss's pos_weight; smoothed target = (1 - s) y + s / 2

Commonly got wrong: a weighted sum divided by the number of texts; the loss then grows and falls with the labels that a
batch happens to have, and the same weights times ten are another learning rate.

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
    """`ImageClassificationLoss(model)(batch) -> Loss`: total in nats, count = images, or the sum of their weights.
    class_weights: of each class (C,). metrics: accuracy."""

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None):
        super().__init__()
        self.model = model
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def forward(self, batch: ImageBatch) -> Loss:
        logits = self.model(batch.images).float()
        return classification_loss(logits, batch.labels, self.label_smoothing, self.class_weights)


class TextClassificationLoss(nn.Module):
    """`TextClassificationLoss(model)(batch) -> Loss`, for texts. model: its head gives one number for each class (the
    technique score_head), read at a text's last real token. class_weights: of each class (C,)."""

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None):
        super().__init__()
        self.model = model
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def forward(self, batch: TextClassificationBatch) -> Loss:
        logits = last_token_outputs(self.model, batch.input_ids, batch.position_ids)
        return classification_loss(logits, batch.labels, self.label_smoothing, self.class_weights)


def classification_loss(
    logits: Float[Tensor, "R C"], labels: Tensor, label_smoothing: float, class_weights: Tensor | None = None
) -> Loss:
    """The loss of a classifier. labels: (R,) class numbers; or (R,C) of 0 and 1, multi-label."""
    weights = None if class_weights is None else class_weights.to(logits)
    if labels.is_floating_point():
        return multi_label_loss(logits, labels, label_smoothing, weights)
    total = F.cross_entropy(logits, labels, weight=weights, reduction="sum", label_smoothing=label_smoothing)
    rows = torch.full_like(total.detach(), len(labels))
    num_correct = (logits.argmax(dim=-1) == labels).sum(dtype=torch.float32)
    return Loss(total, rows if weights is None else weights[labels].sum(), {"accuracy": (num_correct, rows)})


def multi_label_loss(
    logits: Float[Tensor, "R C"], targets: Float[Tensor, "R C"], label_smoothing: float, pos_weight: Tensor | None
) -> Loss:
    """Binary cross-entropy of every label. metrics: accuracy (all labels of a text are right), micro_f1."""
    smoothed = ((1 - label_smoothing) * targets + label_smoothing / 2).to(logits)
    total = F.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=pos_weight, reduction="sum")
    predicted, wanted = logits > 0, targets > 0.5
    rows = torch.full_like(total.detach(), len(targets))
    num_correct = (predicted == wanted).all(dim=1).sum(dtype=torch.float32)
    overlap, label_counts = 2 * (predicted & wanted).sum(dtype=torch.float32), (predicted.sum() + wanted.sum()).float()
    return Loss(total, rows * targets.shape[1], {"accuracy": (num_correct, rows), "micro_f1": (overlap, label_counts)})
