"""Classification: sum over images of -log p(class | image), with label smoothing if asked for.

smoothed target = (1 - s) one_hot(label) + s / C            (Szegedy et al. 2016, arXiv:1512.00567, section 7)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Loss

if TYPE_CHECKING:
    from llm_quest.data.classes import ImageBatch


class ImageClassification(nn.Module):
    """`ImageClassification(model)(batch) -> Loss`: total in nats, count = images. metrics: accuracy."""

    def __init__(self, model: nn.Module, *, smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, batch: ImageBatch) -> Loss:
        logits = self.model(batch.images).float()
        total = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self.smoothing)
        count = torch.full_like(total.detach(), len(batch.labels))
        right = (logits.argmax(dim=-1) == batch.labels).sum(dtype=torch.float32)
        return Loss(total, count, {"accuracy": (right, count)})
