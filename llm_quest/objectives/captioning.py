"""Captioning and visual question answering: sum over learned tokens of -log p(token t+1 | image, tokens <= t). The
question, the image placeholders and the padding have no loss, and no logits are computed for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llm_quest.contracts import Loss
from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.objectives.cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from llm_quest.data.image_text import ImageTextBatch


class CaptioningLoss(nn.Module):
    """`CaptioningLoss(model)(batch) -> Loss`: total in nats, count = learned tokens. model: a VisionLanguage. metrics:
    none."""

    def __init__(self, model: nn.Module, *, form: str = "auto"):
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, batch: ImageTextBatch) -> Loss:
        x = self.model.hidden_states(batch.input_ids, image_features=self.model.get_image_features(batch.images))  # type: ignore[operator]
        head = self.model.head
        targets = batch.targets.flatten()
        learned = targets != IGNORE_INDEX
        total = linear_cross_entropy(x.flatten(0, 1)[learned], head.weight, targets[learned], self.form, head.softcap)  # type: ignore[union-attr, arg-type]
        return Loss(total, learned.sum(dtype=torch.float32), {})
