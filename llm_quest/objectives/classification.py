"""Classification: sum over images, or texts, of -log p(class | it), with label smoothing if asked for.

smoothed target = (1 - s) one_hot(label) + s / C            (Szegedy et al. 2016, arXiv:1512.00567, section 7)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import Loss
from llm_quest.objectives.last_outputs import last_outputs

if TYPE_CHECKING:
    from llm_quest.data.classes import ImageBatch
    from llm_quest.data.labelled import LabelBatch


class ImageClassification(nn.Module):
    """`ImageClassification(model)(batch) -> Loss`: total in nats, count = images. metrics: accuracy."""

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, batch: ImageBatch) -> Loss:
        return classified(self.model(batch.images).float(), batch.labels, self.smoothing)


class TextClassification(nn.Module):
    """The same of texts. model: its head gives one number for each class (the technique score_head), read at a text's
    last real token."""

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, batch: LabelBatch) -> Loss:
        return classified(last_outputs(self.model, batch.tokens, batch.positions), batch.labels, self.smoothing)


def classified(logits: Tensor, labels: Tensor, smoothing: float) -> Loss:
    """The loss of rows of logits."""
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    count = torch.full_like(total.detach(), len(labels))
    right = (logits.argmax(dim=-1) == labels).sum(dtype=torch.float32)
    return Loss(total, count, {"accuracy": (right, count)})
